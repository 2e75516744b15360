"""Lists the named policies that `flowml.advise` compares, those that change training least first.

Left out are those that are about a model or its data and not about machines: `admm`, `vote` and `average_once`, whose
results are other ones, and what is about one kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowml.errors import PolicyError
from flowml.policy import named
from flowml.policy.spec import Policy

ROUND = 32
"""The local steps between two exchanges of DiLoCo and its relatives. A comparison has several rounds."""


def candidates(
    replicas: int, microbatches: int = 1, step_s: float = 0.0, sites: Sequence[Sequence[int]] = ()
) -> tuple[dict[str, Policy], dict[str, str]]:
    """Policies for so many replicas, by the call that makes each, and why others are not among them.

    Args:
        step_s: the seconds that an ordinary step of a replica computes.
        sites: the replicas of each site, if links between sites are others than those inside.
    """
    pull = float(f"{0.9 / replicas:.2g}")
    makers: dict[str, Callable[[], Policy]] = {
        # The same updates as one large batch.
        "synchronous()": named.synchronous,
        "all_reduce()": named.all_reduce,
        "ring()": named.ring,
        "factors()": named.factors,
        "coded(1)": lambda: named.coded(1),
        "speculate(2)": lambda: named.speculate(2),
        # Updates by a part of the work, or with late work.
        "deadline(0.75)": lambda: named.deadline(0.75),
        "quorum(0.75)": lambda: named.quorum(0.75),
        f"backup_workers({_most(replicas)})": lambda: named.backup_workers(_most(replicas)),
        "compensate(0.75)": lambda: named.compensate(0.75),
        # Compressed gradients.
        "qsgd(8)": lambda: named.qsgd(8),
        "deep_compression(0.01)": lambda: named.deep_compression(0.01),
        # Stale parameters.
        "double_buffer()": named.double_buffer,
        "asynchronous(3)": lambda: named.asynchronous(3),
        f"softsync({min(4, replicas)})": lambda: named.softsync(min(4, replicas)),
        "asynchronous()": named.asynchronous,
        # Parameters of their own.
        "local_sgd(8)": lambda: named.local_sgd(8),
        "gossip('ring')": lambda: named.gossip("ring"),
        f"diloco({ROUND})": lambda: named.diloco(ROUND),
        f"diloco({ROUND}, fragments=2, delay=4)": lambda: named.diloco(ROUND, fragments=2, delay=4),
        f"decoupled_diloco({ROUND}, 0.75)": lambda: named.decoupled_diloco(ROUND, 0.75),
        f"sparse_loco({ROUND})": lambda: named.sparse_loco(ROUND),
        f"no_loco({ROUND})": lambda: named.no_loco(ROUND),
        # The same without waiting.
        f"elastic_averaging(8, {pull})": lambda: named.elastic_averaging(8, pull),
    }
    if microbatches > 1 and step_s > 0:
        makers[f"drop_compute({1.5 * step_s:.3g})"] = lambda: named.drop_compute(float(f"{1.5 * step_s:.3g}"))
    if len(sites) > 1:
        makers["gaia(0.01)"] = lambda: named.gaia(0.01, sites=tuple(map(tuple, sites)))
    return made(makers)


def made(makers: dict[str, Callable[[], Policy]]) -> tuple[dict[str, Policy], dict[str, str]]:
    """The policies, and the reasons of those that are not sound."""
    found: dict[str, Policy] = {}
    refused: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except PolicyError as error:
            refused[name] = str(error)
    return found, refused


def _most(replicas: int) -> int:
    """All replicas but one of sixteen, and at least one."""
    return max(1, replicas - max(1, replicas // 16))
