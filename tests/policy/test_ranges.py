"""Each number of each method has a range. A value in it makes a policy, and any other raises one line that says what to
give: of random numbers, and of what is no number. The ranges stand here once more, beside the code that checks them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml.numbers import MOST, real, whole

Range = Callable[[Any], bool]


def count(value: Any, least: int = 1) -> bool:
    found = whole(value)
    return found is not None and least <= found <= MOST


def count_or_none(value: Any) -> bool:
    return value is None or count(value)


def from_zero(value: Any) -> bool:
    return count(value, 0)


def within(low: float, high: float, *, ends: str = "[]") -> Range:
    def holds(value: Any) -> bool:
        found = real(value)
        if found is None:
            return False
        above = found >= low if ends[0] == "[" else found > low
        return above and (found <= high if ends[1] == "]" else found < high)

    return holds


def below(most: int, least: int = 0) -> Range:
    return lambda value: whole(value) is not None and least <= value <= most


def is_clocks(value: Any) -> bool:
    found = real(value)
    return found is not None and found >= 0 and (found == math.inf or (found == int(found) and found <= MOST))


def share(value: Any) -> bool:
    """A share in (0, 1] or, as a whole number, a count."""
    return count(value) if whole(value) is not None else within(0, 1, ends="(]")(value)


def only_share(value: Any) -> bool:
    return whole(value) is None and within(0, 1, ends="(]")(value)


def seconds(value: Any) -> bool:
    return within(0, math.inf, ends="[)")(value)


def some_seconds(value: Any) -> bool:
    return within(0, math.inf, ends="(]")(value)


def positive(value: Any) -> bool:
    return within(0, math.inf, ends="()")(value)


def bounded(value: Any) -> bool:
    return is_clocks(value) and value != math.inf


def not_all(value: Any) -> bool:
    """A share below 1, or a count: with all replicas none is late."""
    return share(value) and (whole(value) is not None or value < 1)


def block(value: Any) -> bool:
    """With blocks of one element nothing is smaller."""
    return from_zero(value) and value != 1


def bits(value: Any) -> bool:
    return whole(value) in (8, 4, 2, 1)


EVERY = 8
RANGES: dict[str, tuple[Callable[..., Any], dict[str, Range]]] = {
    "every": (fm.policies.every, {"k": count}),
    "asynchronous": (fm.policies.asynchronous, {"staleness": is_clocks}),
    "quorum": (fm.policies.quorum, {"share_or_count": share}),
    "backup_workers": (fm.policies.backup_workers, {"n": count}),
    "deadline": (lambda share=0.5, grace=1.0: fm.policies.deadline(share, grace), {"share": not_all, "grace": seconds}),
    "drop_compute": (fm.policies.drop_compute, {"seconds": positive}),
    "compensate": (fm.policies.compensate, {"share": lambda value: not_all(value) and whole(value) != 1}),
    "softsync": (fm.policies.softsync, {"n": within(1, MOST)}),
    "local_sgd": (fm.policies.local_sgd, {"every": count}),
    "diloco": (
        lambda every=EVERY, **given: fm.policies.diloco(every, **given),
        {"every": count, "fragments": below(EVERY, 1), "delay": below(EVERY - 1), "alpha": within(0, 1)},
    ),
    "decoupled_diloco": (
        lambda every=EVERY, quorum=1, **given: fm.policies.decoupled_diloco(every, quorum, **given),
        {"every": count, "quorum": share, "grace": seconds, "fragments": below(EVERY, 1)},
    ),
    "sparse_loco": (
        lambda every=EVERY, **given: fm.policies.sparse_loco(every, **given),
        {"every": count, "keep": share, "bits": bits, "decay": within(0, 1, ends="(]")},
    ),
    "elastic_averaging": (
        lambda every=EVERY, pull=0.1: fm.policies.elastic_averaging(every, pull),
        {"every": count, "pull": within(0, 1, ends="(]")},
    ),
    "downpour": (
        lambda push=EVERY, pull=EVERY: fm.policies.downpour(push, pull),
        {"push": count, "pull": count_or_none},
    ),
    "admm": (
        lambda rho=1.0, share=1.0, staleness=4, **given: fm.policies.admm(rho, share, staleness, **given),
        {
            "rho": positive,
            "share": share,
            "staleness": is_clocks,
            "every": count,
            "l1": seconds,
            "l2": seconds,
            "low": within(-math.inf, math.inf, ends="[)"),
            "high": within(-math.inf, math.inf, ends="(]"),
        },
    ),
    "gossip": (fm.policies.gossip, {"every": count}),
    "no_loco": (
        lambda every=EVERY, pull=1.0: fm.policies.no_loco(every, pull=pull),
        {"every": count, "pull": within(0, 2, ends="()")},
    ),
    "choco": (
        lambda pull=0.5, every=EVERY: fm.policies.choco((fm.filters.top_k(0.1),), pull, every=every),
        {"pull": within(0, 1, ends="(]"), "every": count},
    ),
    "hogwild": (fm.policies.hogwild, {"every": count}),
    "gaia": (
        lambda threshold=0.01, **given: fm.policies.gaia(threshold, **given),
        {
            "threshold": seconds,
            "staleness": bounded,
            "every": count,
            "sites": lambda v: v is None or (count(v) and v >= 2),
        },
    ),
    "coded": (fm.policies.coded, {"stragglers": from_zero}),
    "coded_reduce": (
        lambda children=4, levels=2, stragglers=1: fm.policies.coded_reduce(children, levels, stragglers),
        {"children": below(63, 2), "levels": below(5, 1), "stragglers": below(3)},
    ),
    "speculate": (fm.policies.speculate, {"portions": count, "after": seconds, "copies": from_zero}),
    "ssp": (fm.policies.ssp, {"staleness": is_clocks}),
    "parameter_server": (
        lambda l1=0.1, staleness=0: fm.policies.parameter_server(l1, staleness),
        {"l1": positive, "staleness": is_clocks},
    ),
    "adam_convolution": (fm.policies.adam_convolution, {"k": count}),
    "adam_epoch": (fm.policies.adam_epoch, {"share": only_share}),
    "adam_auto": (lambda batch=1, k=4: fm.policies.adam_auto(batch, k), {"batch": count, "k": count}),
    "ensemble_compression": (
        lambda every=EVERY, steps=1: fm.policies.ensemble_compression(
            lambda p, x: x, np.ones((2, 2)), every, steps, optax.sgd(0.1)
        ),
        {"every": count, "steps": count},
    ),
    "vote": (fm.policies.vote, {"rows": count}),
    "power_sgd": (fm.policies.power_sgd, {"rank": count}),
    "qsgd": (fm.policies.qsgd, {"bits": bits}),
    "deep_compression": (fm.policies.deep_compression, {"share": only_share}),
    "skeleton": (fm.policies.skeleton, {"share": only_share}),
}
"""Name -> a call whose other arguments are good, and the range of each number."""

PARTS: dict[str, tuple[Callable[..., Any], dict[str, Range]]] = {
    "top_k": (fm.filters.top_k, {"share": share}),
    "random_k": (fm.filters.random_k, {"share": share}),
    "random_skip": (fm.filters.random_skip, {"share": within(0, 1, ends="(]")}),
    "significance": (fm.filters.significance, {"threshold": seconds}),
    "kkt": (fm.filters.kkt, {"l1": positive}),
    "low_rank": (fm.filters.low_rank, {"rank": count}),
    "quantise": (lambda bits=8, **given: fm.filters.quantise(bits, **given), {"bits": bits, "block": block}),
    "compress": (fm.filters.compress, {"level": below(9, 1)}),
    "with_error_feedback": (
        lambda decay=1.0: fm.filters.top_k(0.1).with_error_feedback(decay),
        {"decay": within(0, 1, ends="(]")},
    ),
    "Quorum": (lambda share=0.5, **given: fm.Quorum(share, **given), {"share": share, "limit_s": some_seconds}),
    "Deadline": (
        lambda share=0.5, **given: fm.Deadline(share, **given),
        {"share": share, "grace": seconds, "limit_s": some_seconds},
    ),
    "Deadline with a grace": (lambda share=0.5: fm.Deadline(share, grace=1.0), {"share": not_all}),
    "Coded": (fm.Coded, {"stragglers": from_zero}),
    "Speculate": (fm.Speculate, {"portions": count, "after": seconds, "copies": from_zero}),
    "Fold": (fm.Fold, {"decay": within(0, 1, ends="(]")}),
    "Every": (
        lambda push=EVERY, **given: fm.Every(push, **given),
        {"push": count, "pull": count_or_none, "offset": below(7), "fragments": below(EVERY, 1), "delay": below(7)},
    ),
    "Delta": (fm.Delta, {"alpha": within(0, 1)}),
    "Weights": (fm.Weights, {"alpha": within(0, 1)}),
    "StalenessScaled": (fm.StalenessScaled, {"rate": positive}),
    "Mix": (fm.Mix, {"pull": within(0, 1, ends="(]")}),
    "Consensus": (fm.Consensus, {"rho": positive}),
    "Vote": (fm.Vote, {"rows": count}),
    "Prox": (
        lambda l1=0.1, **given: fm.Prox(l1, **given),
        {
            "l1": positive,
            "l2": seconds,
            "low": within(-math.inf, math.inf, ends="[)"),
            "high": within(-math.inf, math.inf, ends="(]"),
        },
    ),
    "Tree": (fm.Tree, {"fanout": count}),
    "Gossip": (fm.Gossip, {"every": count, "pull": within(0, 2, ends="()")}),
    "Hierarchy": (fm.Hierarchy, {"sites": count_or_none}),
    "Policy": (fm.Policy, {"staleness": is_clocks, "every": count}),
}
"""The same of filters and of the values of knobs."""


def is_huge(value: Any) -> bool:
    """Whether no message holds this whole number. A factor or a time may have it, as a float."""
    found = whole(value)
    return found is not None and abs(found) > MOST


NO_NUMBERS = {"synchronous", "all_reduce", "factors", "double_buffer", "average_once", "ring", "one_bit"}
OTHERS = {
    "of",
    "late",
    "scale",
    "outer",
    "optimizer",
    "graph",
    "filters",
    "apply",
    "local",
    "code",
    "predict",
    "inputs",
}
"""Arguments that are no numbers, which `test_bad_input` tries."""

VALUES = st.one_of(
    st.integers(-4, 12),
    st.floats(-2, 3, allow_subnormal=False),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(min_value=-(10**20), max_value=10**20),
    st.sampled_from([None, True, False, "a", "0.5", 1j, (), [1], np.float32(0.5), np.int64(3), np.array([1.0]), 9]),
)


def test_each_number_of_each_method_has_a_range_here() -> None:
    assert set(RANGES) | NO_NUMBERS == set(fm.policies.__all__)
    for name, (_, ranges) in RANGES.items():
        parameters = inspect.signature(getattr(fm.policies, name)).parameters.values()
        numbers = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - OTHERS
        assert set(ranges) == numbers, name


def test_each_filter_has_its_numbers_here() -> None:
    assert {"sign", "key_cache", "Form", "nbytes"} | set(PARTS) >= set(fm.filters.__all__)


@pytest.mark.parametrize(
    ("name", "argument"), [(n, a) for n, (_, ranges) in {**RANGES, **PARTS}.items() for a in ranges]
)
@settings(max_examples=60, deadline=None)
@given(value=VALUES)
@example(value=9)
@example(value=0)
@example(value=math.inf)
def test_what_is_in_range_is_taken_and_what_is_not_is_refused_in_one_line(name: str, argument: str, value: Any) -> None:
    make, ranges = (RANGES | PARTS)[name]
    try:
        make(**{argument: value})
    except (fm.PolicyError, TypeError) as error:
        assert not ranges[argument](value) or is_huge(value), f"{name}({argument}={value!r}) is refused: {error}"
        text = str(error)
        assert "\n" not in text
        assert "; " in text or ": " in text, f"{name}({argument}={value!r}) says no fix: {text}"
        assert isinstance(error, fm.PolicyError), f"{name}({argument}={value!r}): {text}"
    else:
        assert ranges[argument](value), f"{name}({argument}={value!r}) is taken"
