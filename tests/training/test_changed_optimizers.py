"""A fit that goes on with another learning rate is told so, where the state of both optimizers has one form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import optax
import pytest

import flowml as fm
from tests.training.test_checkpoints import STEPS, STOP, case

OTHERS = {
    "learning rate": (optax.sgd(0.1), optax.sgd(0.2), None),
    "schedule": (optax.adam(optax.linear_schedule(0.1, 0.0, 8)), optax.adam(optax.linear_schedule(0.1, 0.0, 9)), None),
    "outer": (optax.sgd(0.1), optax.sgd(0.1), [fm.policies.diloco(2, optax.sgd(r)) for r in (0.7, 0.8)]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_update_is_a_warning_and_the_same_one_is_none(
    threads_cluster: fm.Cluster, tmp_path: Path, name: str
) -> None:
    before, after, policies = OTHERS[name]
    kinds: list[Any] = policies or [None, None]
    one = case(threads_cluster, tmp_path, kinds[0], before)
    one.fit(steps=2, checkpoint=one.checkpoint())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case(threads_cluster, tmp_path, kinds[0], before).fit(steps=STOP, checkpoint=one.checkpoint(), resume="auto")
    other = case(threads_cluster, tmp_path, kinds[1], after)
    with pytest.warns(fm.FlowmlWarning, match="the update of the optimizer is another one than that which wrote"):
        result = other.resumed()
    assert result.history[-1]["step"] == STEPS - 1
