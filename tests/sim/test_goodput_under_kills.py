"""Goodput under kills: decoupled learners go on without the one that recovers; synchronous training waits for it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm

LEARNERS, STEP_S, STEPS = 4, 0.1, 240
AWAY_S = 8.0
"""How long a killed learner recovers: long against the second after which it counts as lost."""
KILLS = [(2.05 + 9.0 * turn, turn % LEARNERS) for turn in range(4)]
CHURN = fm.sim.Churn([change for at, who in KILLS for change in ((at, who, False), (at + AWAY_S, who, True))])
SOURCE = {"x": np.ones((64, 4), np.float32)}


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ params["w"]) ** 2)


def goodput(policy: fm.Policy, faults: list[fm.sim.Churn], **given: Any) -> float:
    """The work of steps that count, as a share of what the learners could have done in the time of the fit."""
    models = fm.sim.Constant(STEP_S), fm.sim.Network(1e-4, 1e9)
    cluster = fm.SimulatedCluster(LEARNERS, *models, arithmetic=False, faults=faults)
    trainer = fm.Trainer(loss, optax.sgd(0.1), cluster=cluster, replicas=LEARNERS, policies=policy)
    result = trainer.fit({"w": jnp.ones((4, 2))}, SOURCE, batch_size=4 * LEARNERS, steps=STEPS, progress=False, **given)
    assert result.virtual_seconds is not None
    counted = result.ledger.used + result.ledger.folded
    return counted * STEP_S / (LEARNERS * result.virtual_seconds)


@pytest.mark.filterwarnings("ignore::flowml.FlowmlWarning")
def test_decoupled_learners_beat_synchronous_restart_under_the_same_kills() -> None:
    decoupled = fm.policies.decoupled_diloco(5, quorum=1)
    for policy in (fm.Policy(), decoupled):
        assert goodput(policy, []) > 0.95
    waits = goodput(fm.Policy(), [CHURN], on_loss="replace")
    goes_on = goodput(decoupled, [CHURN], replicas="elastic")
    computing_s = STEPS * STEP_S
    assert waits == pytest.approx(computing_s / (computing_s + len(KILLS) * AWAY_S), rel=0.05)
    assert 1.3 * waits < goes_on < 0.95
