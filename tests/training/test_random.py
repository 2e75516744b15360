"""Random small models under random policies and layouts: training ends, the account is right, synchrony is exact."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from tests.training.reference import FEATURES, assert_close, data, optax_loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*for all layers at once:flowml.FlowmlWarning"),
    pytest.mark.filterwarnings("ignore:.*, and the fit has :flowml.FlowmlWarning"),  # periods and steps are drawn apart
]
"""Policies are mixed at random, so some quorums take no effect beside others."""

SOURCE = data()
WORKERS = 4


@dataclass(frozen=True)
class Model:
    """A stack of layers, some of which are used twice or skip their input past themselves."""

    widths: tuple[int, ...]
    skips: tuple[bool, ...]
    tied: bool

    def params(self) -> dict[str, Any]:
        sizes = (FEATURES, *self.widths)
        keys = jax.random.split(jax.random.key(len(sizes)), len(sizes))
        layers = {
            f"l{i}": {"w": jax.random.normal(keys[i], (m, n)) / np.sqrt(m), "b": jnp.zeros(n)}
            for i, (m, n) in enumerate(pairwise(sizes))
        }
        return {**layers, "out": {"w": jax.random.normal(keys[-1], (sizes[-1], 2)) / 4}}

    def loss(self, params: Any, batch: Any) -> Any:
        x = batch["x"]
        for i, skip in enumerate(self.skips):
            with fm.layer(f"l{i}"):
                layer = params[f"l{i}"]
                y = jnp.tanh(x @ layer["w"] + layer["b"])
                x = x + y if skip and x.shape == y.shape else y
        with fm.layer("out"):
            y = x @ params["out"]["w"]
            if self.tied:
                y = y + batch["x"] @ params["l0"]["w"][:, :2]
            return jnp.mean((y - batch["y"]) ** 2)


@st.composite
def models(draw: st.DrawFn) -> Model:
    widths = tuple(draw(st.lists(st.sampled_from([4, 12, 20]), min_size=1, max_size=3)))
    skips = tuple(draw(st.booleans()) for _ in widths)
    return Model(widths, skips, draw(st.booleans()))


WAITING = st.sampled_from(
    [
        fm.Policy(),
        fm.policies.every(3),
        fm.policies.factors(),
        fm.policies.asynchronous(),
        fm.policies.asynchronous(staleness=2, every=2),
        fm.Policy(staleness=1, quorum=fm.Quorum(1.0)),
        fm.policies.every(2, apply="sum"),
        fm.policies.all_reduce(),
        fm.policies.every(3, topology=fm.Ring()),
        fm.policies.all_reduce(every=2, apply="sum"),
    ]
)
DROPPING = st.sampled_from(
    [
        fm.policies.quorum(0.75),
        fm.policies.quorum(1),
        fm.policies.quorum(0.5, every=2),
        fm.policies.quorum(0.5, staleness=1),
        fm.policies.quorum(0.75, payload=fm.Factors()),
        fm.policies.quorum(0.5, late="fold"),
        fm.policies.quorum(0.5, late="requeue", every=2),
        fm.Policy(quorum=fm.Quorum(0.6, of="samples")),
        fm.Policy(quorum=fm.Deadline(0.5, grace=0.01)),
        fm.Policy(quorum=fm.Deadline(0.5, late=fm.Fold(0.5))),
        fm.Policy(staleness=2, quorum=fm.Quorum(0.5, late="fold")),
    ]
)
SYNCHRONOUS = (fm.Policy(), fm.policies.factors(), fm.policies.all_reduce(), fm.Policy(topology=fm.Tree(2)))


@dataclass(frozen=True)
class Setting:
    model: Model
    policies: dict[str, fm.Policy]
    replicas: int
    stages: int
    microbatches: int
    schedule: str
    steps: int
    slow: int | None


@st.composite
def settings(draw: st.DrawFn) -> Setting:
    model = draw(models())
    stages = draw(st.integers(1, len(model.widths) + 1))
    replicas = draw(st.integers(1, WORKERS // stages))
    kind = draw(st.sampled_from([st.sampled_from(SYNCHRONOUS), WAITING, DROPPING, WAITING | DROPPING]))
    names = draw(st.sampled_from([("*",), ("l0*", "*"), ("out*", "l0/w", "*")]))
    alone = replicas == 1  # a ring, a tree or a hierarchy needs others
    fits = kind.filter(lambda p: not (alone and isinstance(p.topology, fm.Ring | fm.Tree)))
    return Setting(
        model=model,
        policies={name: draw(fits) for name in names},
        replicas=replicas,
        stages=stages,
        microbatches=draw(st.integers(1, 3)),
        schedule=draw(st.sampled_from(["1f1b", "gpipe"])),
        steps=draw(st.integers(1, 9)),
        slow=draw(st.none() | st.integers(0, WORKERS - 1)),
    )


@hypothesis.given(setting=settings())
@hypothesis.settings(
    max_examples=16, suppress_health_check=[*hypothesis.HealthCheck], phases=[hypothesis.Phase.generate]
)
def test_any_composition(threads_cluster: fm.Cluster, setting: Setting) -> None:
    model, optimizer = setting.model, optax.sgd(0.05, momentum=0.9)
    batch_size = 2 * setting.replicas * setting.microbatches
    trainer = fm.Trainer(
        model.loss,
        optimizer,
        cluster=threads_cluster,
        replicas=setting.replicas,
        placement=fm.Pipeline(setting.stages),
        microbatches=setting.microbatches,
        schedule=setting.schedule,
        policies=setting.policies,
        delays={} if setting.slow is None else {f"worker:{setting.slow}": 0.003},
    )
    result = trainer.fit(model.params(), SOURCE, batch_size=batch_size, steps=setting.steps)

    assert [r["step"] for r in result.history] == list(range(setting.steps))
    assert all(np.isfinite(r["loss"]) for r in result.history)
    ledger = result.ledger  # the fit itself has validated it
    per_epoch = len(SOURCE["x"]) // batch_size
    epochs = -(-setting.steps // per_epoch)
    assert ledger.outstanding == 0
    assert ledger.used + ledger.dropped + ledger.folded + ledger.unseen == epochs * per_epoch * setting.replicas
    if all(p.quorum.never_drops(setting.replicas) for p in setting.policies.values() if p.clocked):
        assert ledger.used == setting.steps * setting.replicas
        assert ledger.dropped == 0
    if all(p in SYNCHRONOUS for p in setting.policies.values()):
        expected = optax_loop(model.loss, model.params(), optimizer, SOURCE, setting.steps, batch_size=batch_size)
        assert_close(result.params, expected.params)
        assert_close(result.opt_state, expected.opt_state, tolerance=1e-4)
        np.testing.assert_allclose([r["loss"] for r in result.history], expected.losses, rtol=1e-5)
