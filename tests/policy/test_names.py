"""The names of policies and filters take the arguments that the interface lists, by position and by name."""

from __future__ import annotations

import inspect

import optax
import pytest

import flowml as fm

OUTER = optax.sgd(0.7)
NAMES = {
    "synchronous": {},
    "all_reduce": {},
    "every": {"k": 4},
    "asynchronous": {"staleness": fm.UNBOUNDED},
    "factors": {},
    "quorum": {"share_or_count": 0.75, "of": "samples", "late": "fold"},
    "backup_workers": {"n": 3},
    "drop_compute": {"seconds": 0.1},
    "deadline": {"share": 0.75, "grace": "adaptive"},
    "downpour": {"push": 2, "pull": 4, "optimizer": OUTER},
    "local_sgd": {"every": 4},
    "diloco": {"every": 4, "outer": OUTER, "fragments": 2, "delay": 1, "alpha": 0.5},
    "sparse_loco": {"every": 4, "keep": 0.1, "bits": 4},
    "no_loco": {"every": 4},
    "gossip": {"graph": "torus", "every": 2},
    "elastic_averaging": {"every": 4, "pull": 0.3},
    "softsync": {"n": 2, "scale": False},
    "gaia": {"threshold": 0.01, "local": fm.ParameterServer()},
    "choco": {"filters": (fm.filters.top_k(0.1),), "pull": 0.2, "graph": "torus", "every": 2},
    "hogwild": {},
    "average_once": {},
    "coded": {"stragglers": 1, "code": "cyclic"},
    "coded_reduce": {"children": 2, "levels": 2, "stragglers": 1},
    "compensate": {},
    "double_buffer": {},
    "admm": {"rho": 1.0, "share": 0.5, "staleness": 3},
}
FILTERS = {
    "significance": {"threshold": 0.01, "decay": None},
    "kkt": {"l1": 0.1},
    "top_k": {"share": 0.1},
    "random_k": {"share": 0.1},
    "low_rank": {"rank": 2},
    "quantise": {"bits": 4},
    "sign": {},
    "key_cache": {},
    "compress": {},
}


@pytest.mark.parametrize("name", NAMES)
def test_policies_take_their_arguments_by_position_and_by_name(name: str) -> None:
    make, given = getattr(fm.policies, name), NAMES[name]
    assert list(inspect.signature(make).parameters)[: len(given)] == list(given)
    assert make(**given) == make(*given.values())


@pytest.mark.parametrize("name", FILTERS)
def test_filters_take_their_arguments_by_position_and_by_name(name: str) -> None:
    make, given = getattr(fm.filters, name), FILTERS[name]
    assert list(inspect.signature(make).parameters)[: len(given)] == list(given)
    assert make(**given) == make(*given.values())


def test_arguments_reach_the_knobs() -> None:
    assert fm.policies.quorum(0.75, "samples", "fold").quorum == fm.Quorum(0.75, of="samples", late="fold")
    assert fm.policies.sparse_loco(4, keep=0.1, bits=4).filters[0] == fm.filters.top_k(0.1).with_error_feedback(0.95)
    waiting = fm.policies.admm(1.0, 0.5, 3)
    assert waiting.quorum == fm.Quorum(0.5, late="fold")
    assert (waiting.staleness, waiting.every) == (3, fm.Every(1))
