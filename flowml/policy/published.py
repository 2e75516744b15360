"""Names of published methods that are a composition of filters, rhythms and applies, beside those of `named`.

`flowml.policies` has both. `adam_auto` is a rule, which chooses a policy for each parameter by its shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowml import policy as algebra
from flowml.errors import PolicyError
from flowml.numbers import MOST, whole
from flowml.policy import filters

PolicyRule = Callable[[str, tuple[int, ...]], algebra.Policy]
"""Chooses the policy of a parameter by its tree path and shape."""


def ring() -> algebra.Policy:
    """Replicas add up gradients on a ring, 2 (n - 1) / n of their bytes each (Patarasuk and Yuan, 2009)."""
    return algebra.Policy(topology=algebra.Ring())


def ssp(staleness: int) -> algebra.Policy:
    """A read may be `staleness` clocks behind the slowest replica (Ho et al., *More Effective Distributed ML via a
    Stale Synchronous Parallel Parameter Server*, NeurIPS 2013)."""
    return algebra.Policy(staleness=staleness)


def parameter_server(l1: float, staleness: float = 0) -> algebra.Policy:
    """Sparse training with a bound of delay: gradients that an L1 penalty cancels are left out, positions are cached,
    and the rest is packed (Li et al., *Scaling Distributed Machine Learning with the Parameter Server*, OSDI 2014).

    The home applies the proximal step of `l1` · |x| after each update, so the loss has no such term.
    """
    chain = (filters.kkt(l1), filters.key_cache(), filters.compress())
    return algebra.Policy(staleness=staleness, filters=chain, apply=algebra.Prox(l1=l1))


def adam_convolution(k: int) -> algebra.Policy:
    """Replicas update parameters of their own, and send the change every `k` steps without waiting (Chilimbi et al.,
    *Project Adam*, OSDI 2014, convolutional layers)."""
    return algebra.Policy(staleness=algebra.UNBOUNDED, every=k, payload=algebra.Delta(), apply=algebra.Sum())


def adam_epoch(share: float = 0.75) -> algebra.Policy:
    """Replicas do not wait for each other, and an epoch ends when `share` of its examples are done (Chilimbi et al.,
    *Project Adam*, OSDI 2014)."""
    ending = algebra.Quorum(share, of="samples", over="epoch")
    return algebra.Policy(staleness=algebra.UNBOUNDED, quorum=ending)


def adam_auto(batch: int, k: int = 4) -> PolicyRule:
    """The layer rules of Project Adam, chosen by shape: `adam_convolution(k)` for kernels of three and more dimensions,
    and without waiting, for matrices of m x n of which `batch` (m + n) < m n, the factors of their gradients.

    Give it to `Trainer(policies=...)` in place of a mapping.

    Args:
        batch: the examples of a step of one replica.
        k: the steps between two pushes of a convolution.

    Raises:
        PolicyError: for a batch below 1.
    """
    size = whole(batch)
    if size is None or not 1 <= size <= MOST:
        raise PolicyError(f"adam_auto(batch={batch!r}): give the examples of a step of one replica, at least 1")
    convolution = adam_convolution(k)
    factors = algebra.Policy(staleness=algebra.UNBOUNDED, payload=algebra.Factors())
    plain = algebra.Policy(staleness=algebra.UNBOUNDED)

    def rule(path: str, shape: tuple[int, ...]) -> algebra.Policy:
        if len(shape) > 2:
            return convolution
        return factors if len(shape) == 2 and size * sum(shape) < shape[0] * shape[1] else plain

    return rule


def ensemble_compression(predict: Any, inputs: Any, every: int, steps: int, optimizer: Any) -> algebra.Policy:
    """Every `every` steps the mean output of the replicas' models on `inputs` is distilled into one model, with which
    all go on (Sun et al., *Ensemble-compression*, ECML 2017). See `flowml.Distill` for the other arguments."""
    if predict is None or inputs is None:
        raise PolicyError(
            "ensemble_compression() needs predict(params, inputs) -> outputs and the inputs on which the outputs are "
            "averaged; give both"
        )
    student = algebra.Distill(predict, inputs, steps=steps, optimizer=optimizer)
    return algebra.Policy(every=every, payload=algebra.Weights(), apply=student)


def vote(rows: int) -> algebra.Policy:
    """Each replica votes for the `rows` rows of a parameter whose gradients are largest, and 2 · `rows` are applied
    (Meng et al., *PV-tree*, NeurIPS 2016)."""
    return algebra.Policy(apply=algebra.Vote(rows))


def power_sgd(rank: int) -> algebra.Policy:
    """Gradients are sent as factors of low rank, with error feedback (Vogels et al., *PowerSGD*, NeurIPS 2019)."""
    return algebra.Policy(filters=(filters.low_rank(rank).with_error_feedback(),))


def one_bit() -> algebra.Policy:
    """Gradients are sent as signs, with error feedback (Seide et al., *1-Bit Stochastic Gradient Descent*, 2014)."""
    return algebra.Policy(filters=(filters.sign().with_error_feedback(),))


def qsgd(bits: int) -> algebra.Policy:
    """Gradients are rounded at random to `bits` bits, without bias (Alistarh et al., *QSGD*, NeurIPS 2017)."""
    return algebra.Policy(filters=(filters.quantise(bits, stochastic=True),))


def deep_compression(share: float = 0.001) -> algebra.Policy:
    """A share of the elements of each gradient is sent, the largest, and the others are kept for later (Lin et al.,
    *Deep Gradient Compression*, ICLR 2018)."""
    only_share("deep_compression", share, "top_k")
    return algebra.Policy(filters=(filters.top_k(share).with_error_feedback(),))


def skeleton(share: float) -> algebra.Policy:
    """A share of the elements of each gradient is sent, drawn anew at each push by both sides, and the others are kept
    for later (Stich et al., *Sparsified SGD with Memory*, NeurIPS 2018)."""
    only_share("skeleton", share, "random_k")
    return algebra.Policy(filters=(filters.random_k(share).with_error_feedback(),))


def only_share(name: str, value: object, other: str) -> None:
    """Raise PolicyError for a whole number, which the filter would take for a number of elements."""
    if whole(value) is not None:
        raise PolicyError(
            f"{name}({value}): give a share of the elements in (0, 1], such as 0.01, or 1.0 for all; a number of "
            f"elements is fm.Policy(filters=(fm.filters.{other}({value}).with_error_feedback(),))"
        )
