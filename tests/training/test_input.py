"""Bad input: a clear error before anything runs, which names the offender and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowml as fm
from flowml.errors import FlowmlError, PlacementError, PolicyError
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss

SOURCE = data()
SGD = optax.sgd(0.1)


def fit(cluster: fm.Cluster, params: Any = None, source: Any = None, loss: Any = mlp_loss, **options: Any) -> Any:
    """A fit that is right in all that is not given."""
    given = {k: options.pop(k) for k in ("steps", "epochs", "batch_size", "opt_state") if k in options}
    length: dict[str, Any] = {
        "batch_size": BATCH,
        **({} if {"steps", "epochs"} & set(given) else {"steps": 1}),
        **given,
    }
    trainer = fm.Trainer(loss, options.pop("optimizer", SGD), cluster=cluster, **options)
    return trainer.fit(mlp() if params is None else params, SOURCE if source is None else source, **length)


LAYOUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"replicas": 2, "microbatches": 5},
        ValueError,
        r"batch_size 24 does not divide into 2 replicas x 5 microbatches; use a multiple of 10",
    ),
    ({"batch_size": 97}, ValueError, r"batch_size 97 needs at least that many examples; the source has 96"),
    ({"batch_size": 0}, ValueError, r"batch_size=0: give at least 1"),
    ({"steps": 1, "epochs": 1}, ValueError, r"give fit\(\) either epochs= or steps="),
    ({"steps": None, "epochs": None}, ValueError, r"give fit\(\) either epochs= or steps="),
    ({"epochs": 0}, ValueError, r"epochs=0, steps=None: there is nothing to do; give at least 1"),
    (
        {"replicas": 3, "placement": fm.Pipeline(2)},
        PlacementError,
        r"3 replicas of 2 stages need 6 devices, there are 4; start more workers or ask for fewer",
    ),
    ({"replicas": 5}, PlacementError, r"5 replicas need at least as many devices, there are 4; start more workers"),
    (
        {"replicas": 0},
        ValueError,
        r"replicas=0: give at least 1",
    ),
    ({"schedule": "zigzag"}, ValueError, r"schedule='zigzag' is unknown; give '1f1b' or 'gpipe'"),
    ({"placement": {"fc*": "worker:9"}}, PlacementError, r"worker:9"),
    (
        {"delays": {"worker:7": 0.1}},
        FlowmlError,
        r"delays names 'worker:7', which does not exist; there are worker:0, worker:1, worker:2, worker:3",
    ),
    ({"delays": {"worker:0": -1.0}}, ValueError, r"delays\['worker:0'\]=-1.0: give seconds of at least 0"),
    ({"optimizer": "adam"}, TypeError, r"optimizer must be an optax.GradientTransformation .* got 'adam'"),
]


@pytest.mark.parametrize(("options", "error", "message"), LAYOUTS, ids=[str(o) for o, _, _ in LAYOUTS])
def test_layouts_and_lengths(
    threads_cluster: fm.Cluster, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(threads_cluster, **options)


POLICIES: list[tuple[dict[str, Any], str]] = [
    ({"conv*": fm.Policy()}, r"policies\['conv\*'\] matches no parameter; there are: fc0/bias, fc0/kernel"),
    ({"fc0": fm.Policy()}, r"there are: fc0/bias, .*; give 'fc0/\*' for those of layer 'fc0'"),
    ({"fc*": "sync"}, r"policies\['fc\*'\] is 'sync', of type str; give an fm.Policy or one of fm.policies"),
]


@pytest.mark.parametrize(("policies", "message"), POLICIES, ids=["pattern", "layer", "value"])
def test_policies(threads_cluster: fm.Cluster, policies: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        fit(threads_cluster, policies=policies, replicas=2)


def test_a_pattern_of_integers_only(threads_cluster: fm.Cluster) -> None:
    filtered = fm.Policy(filters=(fm.filters.top_k(0.1),))
    with pytest.raises(PolicyError, match=r"'ids'\] matches only .* not trained \(ids\): .* no rule or filter applies"):
        fit(threads_cluster, params={**mlp(), "ids": jnp.arange(3)}, policies={"ids": filtered}, replicas=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fm.Policy(payload=fm.Factors(), every=2), r"Factors\(\) with every=2 is not sound"),
        (
            lambda: fm.Policy(staleness=3, quorum=fm.Quorum(2, late=fm.Fold(0.5))),
            r"without clocks no contribution is late",
        ),
        (lambda: fm.policies.quorum(0.5, staleness=fm.UNBOUNDED), r"staleness=UNBOUNDED is not sound"),
        (lambda: fm.Quorum(0.0), r"a fraction lies in \(0, 1\]"),
        (lambda: fm.policies.every(0), r"an int of at least 1"),
        (
            lambda: fm.policies.quorum(0.5, topology=fm.Ring()),
            r"topology=fm.Ring\(\) with quorum=Quorum\(0.5\) is not sound",
        ),
        (
            lambda: fm.policies.asynchronous(topology=fm.AllReduce()),
            r"with staleness=UNBOUNDED is not sound: each sum waits",
        ),
        (lambda: fm.policies.factors(topology=fm.Tree()), r"with payload=Factors\(\) is not sound"),
        (lambda: fm.Policy(topology=fm.Ring), r"topology=Ring is a class; give a value of it, as topology="),  # pyright: ignore
    ],
    ids=["factors", "fold", "unbounded", "nobody", "never", "some", "stale sums", "sums of factors", "a class"],
)
def test_policies_that_are_not_sound(make: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


def no_scalar(params: Any, batch: Any) -> Any:
    return params["fc0"]["bias"] * batch["x"].mean()


def three_values(params: Any, batch: Any) -> Any:
    return mlp_loss(params, batch), 1, 2


def whole_number(params: Any, batch: Any) -> Any:
    return mlp_loss(params, batch).astype(jnp.int32)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            no_scalar,
            ValueError,
            r"no_scalar returns float32\[16\]; a loss returns a floating scalar, or \(scalar, aux\)",
        ),
        (
            three_values,
            ValueError,
            r"three_values returns 3 values; a loss returns a floating scalar, or \(scalar, aux\)",
        ),
        (whole_number, ValueError, r"whole_number returns int32\[\]; a loss returns a floating scalar"),
        (lambda params: 0.0, TypeError, r"cannot be called as <lambda>\(params, batch\): too many"),
    ],
)
def test_losses(threads_cluster: fm.Cluster, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(threads_cluster, loss=loss)


def test_parameters(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(TypeError, match=r"parameter 'fc0/name' is of type str, which is not an array; keep what"):
        fit(threads_cluster, params={**mlp(), "fc0": {**mlp()["fc0"], "name": "first"}})
    with pytest.raises(ValueError, match=r"params has no floating arrays"):
        fit(threads_cluster, params={})


def test_an_optimizer_state_of_something_else(threads_cluster: fm.Cluster) -> None:
    adam = optax.adam(1e-2)
    with pytest.raises(ValueError, match=r"^opt_state .* optimizer: it has the leaf '0/count', which [a-z ]+ lacks$"):
        fit(threads_cluster, opt_state=adam.init(mlp()))
    with pytest.raises(
        ValueError, match=r"opt_state belongs to other parameters: '0/mu/fc0/bias' is float32\[8\], not"
    ):
        fit(threads_cluster, optimizer=adam, opt_state=adam.init(mlp(widths=(8, 8))))


def test_arrays_of_different_lengths(threads_cluster: fm.Cluster) -> None:
    with pytest.raises(ValueError, match=r"differ in their first dimension: \(96, 12\), \(95, 2\); each needs one row"):
        fit(threads_cluster, source={**SOURCE, "y": SOURCE["y"][:-1]})
    with pytest.raises(
        ValueError, match=r"… \(192 in all\); its elements seem to be examples; stack them: jax.tree.map"
    ):
        fit(threads_cluster, source=[{name: leaf[i] for name, leaf in SOURCE.items()} for i in range(96)])
    with pytest.raises(TypeError, match=r"a source needs len\(source\) and source\[indices\]"):
        fit(threads_cluster, source=iter([1, 2]))
    with pytest.raises(ValueError, match=r"the source, a Records, has no examples"):
        fit(threads_cluster, source=Records(0))


SEQUENCES = {"x": np.zeros((5, 96, 12), "f"), "y": np.zeros((96, 2), "f")}
"""Time-major inputs beside targets with one row an example."""


class TimeMajor:
    """A source that gives batches, with the examples in the second dimension of "x"."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, indices: Any) -> Any:
        return {"x": SEQUENCES["x"][:, indices], "y": SEQUENCES["y"][indices]}


class OneShape(TimeMajor):
    """A source of single records of shape (3, 2), which are not two examples."""

    def __getitem__(self, indices: Any) -> Any:
        return {"x": np.ones((3, 2), "f")}


FIX = r"give np\.swapaxes\(x, 0, 1\) for it, so that a row is an example"


def test_time_major_batches_are_refused_by_name(threads_cluster: fm.Cluster) -> None:
    told = r"of shape \(5, 96, 12\) has the 96 examples in the second dimension \(time-major\); " + FIX
    with pytest.raises(ValueError, match=rf"first dimension: .*; source leaf 'x' {told}"):
        fit(threads_cluster, source=SEQUENCES)
    with pytest.raises(ValueError, match=rf"the arrays of a batch differ in .*; x {told}"):
        fm.Trainer(mlp_loss, SGD, cluster=threads_cluster).plan(mlp(), SEQUENCES)
    with pytest.raises(
        ValueError, match=rf"gave for 2 indices source leaf 'x' of shape \(5, 2, 12\) has the 2 .*{FIX}"
    ):
        fit(threads_cluster, source=TimeMajor())
    with pytest.raises(ValueError, match=r"the source has 5; if the 96 examples are in the second dimension of source"):
        fit(threads_cluster, source={"x": SEQUENCES["x"]})
    trainer = fm.Trainer(mlp_loss, SGD, cluster=threads_cluster)
    with pytest.raises(ValueError, match=rf"an array of shape \(5, 96\) has the 96 examples .*{FIX}"):
        trainer.predict(mlp(), {"x": np.zeros((96, 2), "f")}, lambda params, batch: jnp.ones((5, len(batch["x"]))))
    loss = lambda params, batch: jnp.mean(params["fc0"]["bias"]) ** 2 + jnp.mean(batch["x"])  # noqa: E731
    assert np.isfinite(fit(threads_cluster, source=OneShape(), loss=loss).history[0]["loss"])


class Rows:
    """A source that gives batches, as a memory-mapped table would."""

    def __len__(self) -> int:
        return len(SOURCE["x"])

    def __getitem__(self, indices: Any) -> Any:
        return {k: v[indices] for k, v in SOURCE.items()}


class Records:
    """A source of single records, as a Grain data source is; `int(index)` is all that it does to an index."""

    def __init__(self, length: int = 96) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return {k: v[int(index)] for k, v in SOURCE.items()}


class Scalars(Records):
    """Records without arrays."""

    values: ClassVar[Sequence[float]] = tuple(float(v) for v in SOURCE["x"][:, 0])

    def __getitem__(self, index: Any) -> Any:
        return {"x": self.values[index.__index__()], "y": index}


def test_sources_of_every_kind_train_alike(threads_cluster: fm.Cluster, process_cluster: fm.Cluster) -> None:
    expected = fit(threads_cluster, steps=6).params
    for source in (Rows(), Records(), {k: jnp.asarray(v) for k, v in SOURCE.items()}):
        assert_same(fit(threads_cluster, source=source, steps=6).params, expected)
    layout = {"replicas": 2, "microbatches": 2}
    arrays = fit(process_cluster, steps=6, **layout)
    for source in (Rows(), Records()):
        fed = fit(process_cluster, source=source, steps=6, **layout)
        assert_same(fed.params, arrays.params)
        assert fed.ledger == arrays.ledger
    scalars = fit(
        threads_cluster,
        source=Scalars(),
        params={"w": jnp.float32(0.5)},
        loss=lambda params, batch: jnp.mean((params["w"] * batch["x"] - batch["y"]) ** 2),
        steps=2,
    )
    assert np.isfinite(scalars.params["w"])


def test_a_source_that_changes_its_mind(threads_cluster: fm.Cluster) -> None:
    class Shrinking(Rows):
        def __getitem__(self, indices: Any) -> Any:
            return super().__getitem__(indices[:6])

    with pytest.raises(
        ValueError, match=r"source\[indices\] gave shape \(6, 12\) for 'x' and 24 indices; its first dimension"
    ):
        fit(threads_cluster, source=Shrinking())
    assert np.isfinite(fit(threads_cluster).history[0]["loss"])


def test_one_fit_at_a_time(threads_cluster: fm.Cluster) -> None:
    trainer = fm.Trainer(mlp_loss, SGD, cluster=threads_cluster)

    def again(record: Any) -> None:
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=1)

    with pytest.raises(FlowmlError, match="this Trainer is in the middle of a fit"):
        trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=3, callbacks=[again])
    assert len(trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=3).history) == 3
