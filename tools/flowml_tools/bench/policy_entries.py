"""The policies that `flowml bench policies` compares, and why others of `flowml.policies` are not among them.

All have the same optimizer, SGD, and none was tuned. The rate is scaled by one rule, so that each example moves the
parameters as far: it is divided by the replicas where the work of each one is an update of its own, and multiplied by
the steps whose mean gradient is one update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from flowml_tools.command import CommandError

REPLICAS, BATCH = 6, 48
RATE = 0.3
PAUSE_S = 0.008
"""The mean seconds of the pause that is a step of a replica which is not slow."""


@dataclass(frozen=True)
class Entry:
    """What to give to `Trainer(policies=)`, the rate of SGD, and the pieces of a replica's share of a batch."""

    policies: Any
    rate: float = RATE
    microbatches: int = 1

    @property
    def load(self) -> float:
        """How many times its share of a batch a replica computes."""
        import flowml as fm

        quorum = self.policies.quorum if isinstance(self.policies, fm.Policy) else None
        return float(quorum.among(REPLICAS).load) * REPLICAS if isinstance(quorum, fm.Coded) else 1.0


def entries() -> dict[str, Entry]:
    """The policies, by the calls of `fm.policies` that make them."""
    import optax

    import flowml as fm
    from flowml_tools.bench.policy_fits import digits
    from flowml_tools.bench.stragglers import logits_of

    p, alone, inputs = fm.policies, RATE / REPLICAS, digits(0)[1]["x"][:256]
    threshold = 1.5 * PAUSE_S
    return {
        # The same updates as one large batch.
        "synchronous()": Entry(p.synchronous()),
        "all_reduce()": Entry(p.all_reduce()),
        "ring()": Entry(p.ring()),
        "factors()": Entry(p.factors()),
        "every(4)": Entry(p.every(4), rate=4 * RATE),
        "coded(1)": Entry(p.coded(1)),
        "coded_reduce(2, 2, 1)": Entry(p.coded_reduce(2, 2, 1)),
        "speculate(2)": Entry(p.speculate(2)),
        # Updates by a part of the work, or with late work.
        "quorum(0.75)": Entry(p.quorum(0.75)),
        f"backup_workers({REPLICAS - 1})": Entry(p.backup_workers(REPLICAS - 1)),
        "deadline(0.75)": Entry(p.deadline(0.75)),
        f"drop_compute({threshold:g})": Entry(p.drop_compute(threshold), microbatches=4),
        "compensate(0.75)": Entry(p.compensate(0.75)),
        "vote(8)": Entry(p.vote(8)),
        # Compressed gradients.
        "qsgd(8)": Entry(p.qsgd(8)),
        "one_bit()": Entry(p.one_bit()),
        "power_sgd(2)": Entry(p.power_sgd(2)),
        "deep_compression(0.05)": Entry(p.deep_compression(0.05)),
        "skeleton(0.05)": Entry(p.skeleton(0.05)),
        "parameter_server(0.0001)": Entry(p.parameter_server(0.0001)),
        # Stale parameters.
        "double_buffer()": Entry(p.double_buffer()),
        "ssp(3)": Entry(p.ssp(3), rate=alone),
        "softsync(3)": Entry(p.softsync(3)),
        "asynchronous()": Entry(p.asynchronous(), rate=alone),
        "adam_epoch(0.75)": Entry(p.adam_epoch(0.75), rate=alone),
        f"adam_auto({BATCH // REPLICAS})": Entry(p.adam_auto(BATCH // REPLICAS), rate=alone),
        "adam_convolution(4)": Entry(p.adam_convolution(4), rate=alone),
        "downpour(4, 4)": Entry(p.downpour(4, 4), rate=alone),
        # Parameters of their own.
        "local_sgd(4)": Entry(p.local_sgd(4)),
        "diloco(8)": Entry(p.diloco(8)),
        "diloco(8, fragments=2, delay=2, alpha=0.5)": Entry(p.diloco(8, fragments=2, delay=2, alpha=0.5)),
        "decoupled_diloco(8, 0.75)": Entry(p.decoupled_diloco(8, 0.75)),
        "sparse_loco(8)": Entry(p.sparse_loco(8)),
        "no_loco(8)": Entry(p.no_loco(8)),
        "elastic_averaging(4, 0.15)": Entry(p.elastic_averaging(4, 0.15)),
        "gossip('ring')": Entry(p.gossip("ring")),
        "choco([fm.filters.quantise(4)])": Entry(p.choco([fm.filters.quantise(4)])),
        "gaia(0.01, sites=2)": Entry(p.gaia(0.01, sites=2)),
        "admm(1, every=4)": Entry(p.admm(1, every=4)),
        "ensemble_compression(…, 8, 16, …)": Entry(p.ensemble_compression(logits_of, inputs, 8, 16, optax.sgd(RATE))),
        "average_once()": Entry(p.average_once()),
    }


LEFT_OUT = {
    "hogwild": "its replicas are devices of one worker, which is one machine, so none of them can be a slow machine",
}
"""Functions of `flowml.policies` without a row, and why."""


def parsed(text: str) -> list[str]:
    """The names of `quorum(0.75),diloco`: parts between commas that are not in brackets."""
    names, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            names.append("")
        else:
            names[-1] += character
    return [name.strip() for name in names]


def chosen(names: Sequence[str]) -> dict[str, Entry]:
    """The entries of these names, each the call of an entry or the function in it; all without names. In the order of
    `entries`. Raises CommandError for others."""
    known = entries()
    if not names:
        return known
    functions = [call.partition("(")[0] for call in known]
    for name in names:
        function = name.partition("(")[0]
        if function in LEFT_OUT:
            raise CommandError(f"--policies: {function} has no row: {LEFT_OUT[function]}")
        if name not in known and name not in functions:
            if function in functions:
                rows = [call for call in known if call.partition("(")[0] == function]
                raise CommandError(f"--policies: there is no row {name!r}; of {function} there is {', '.join(rows)}")
            near = get_close_matches(name, [*known, *functions], n=1, cutoff=0.5)
            raise CommandError(
                f"--policies: there is no {name!r}; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(dict.fromkeys(functions))}")
            )
    return {call: entry for call, entry in known.items() if call in names or call.partition("(")[0] in names}
