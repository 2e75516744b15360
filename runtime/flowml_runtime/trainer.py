"""`Trainer`: a loss, an optimizer and a policy for each layer, run by the workers of a cluster.

The driver compiles the training plan, ships parameters to their homes and data to the stages that read it,
and then only answers: work items on request, a ledger entry for each, a history of losses. The workers
train on their own until the homes send their stores back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.data import Source, as_source
from flowml.errors import FlowmlError
from flowml.placement import Placement
from flowml.plan import Plan
from flowml.policy import Policy
from flowml.training import TrainingCompiled, TrainingSpec, compile_training
from flowml_runtime.cluster import Cluster, current_cluster
from flowml_runtime.fit import Fit, FitOptions, Record
from flowml_runtime.host.session import LoadedPlan
from flowml_runtime.protocol.ledger import Summary
from flowml_runtime.tables import layer_table

Callback = Callable[[Record], Any]


@dataclass(frozen=True)
class TrainingResult:
    """What a fit leaves: parameters, optimizer state, one record a step, and the account of every work item.

    `history` is a list of dicts: "step", "epoch", "loss", "seconds" since the start, "replicas" whose loss
    is in the mean, and "aux" where the loss returns it. `traffic` counts bytes by layer; `table()` prints it.
    """

    params: Any
    opt_state: Any
    history: list[Record]
    ledger: Summary
    seconds: float
    plan: Plan = field(repr=False)
    traffic: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])

    def table(self) -> str:
        """One line a layer: policy, home, pushes, and the bytes they took against plain gradients every step."""
        return layer_table(self.plan, self.traffic, steps=len(self.history))


class Trainer:
    """Trains a model whose layers may sit on different workers and be kept in step by different rules.

    Args:
        loss: `loss(params, batch)` or `loss(params, batch, rng)` -> scalar, or (scalar, aux). A mean over the
            examples of the batch: it is evaluated on shares of a batch and averaged. With `rng` a work item's
            key is `fold_in(key(seed), item)`, folded again with the microbatch if there are several.
        optimizer: any `optax.GradientTransformation`.
        cluster: defaults to the one whose `with` block this is in.
        replicas: copies of the model. The global batch is shared out among them.
        placement: how one replica is cut; see `flowml.dataflow`. Names of devices are those of replica 0.
        microbatches: pieces that a replica's share of a batch is cut into for the pipeline.
        schedule: `"1f1b"` or `"gpipe"`.
        policies: parameter path pattern -> `flowml.Policy`; the first match wins, `Policy()` where none does.
        delays: worker name -> seconds added to each of its steps: declared slowness, for experiments.

    Raises:
        ValueError, PolicyError: for arguments that do not go together.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        cluster: Cluster | None = None,
        replicas: int = 1,
        placement: Placement = "auto",
        microbatches: int = 1,
        schedule: str = "1f1b",
        policies: Mapping[str, Policy] | None = None,
        delays: Mapping[str, float] | None = None,
    ) -> None:
        if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
            raise TypeError(
                f"optimizer must be an optax.GradientTransformation such as optax.adam(1e-3), got {optimizer!r}"
            )
        self._spec = TrainingSpec(loss, optimizer, replicas, placement, microbatches, schedule, policies)
        self._cluster = cluster
        self._delays = dict(delays or {})
        self._compiled: dict[Any, TrainingCompiled] = {}
        self._loaded: dict[Any, LoadedPlan] = {}
        self._next_step: dict[Any, int] = {}

    def plan(self, params: Any, batch: Any) -> Plan:
        """The plan for one global batch (arrays or `jax.ShapeDtypeStruct`s), policies drawn in. Runs nothing."""
        return self._compile(self._here(), params, batch)[1].plan

    def fit(
        self,
        params: Any,
        source: Any,
        *,
        batch_size: int,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        opt_state: Any = None,
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
    ) -> TrainingResult:
        """Train from `params` and return what comes of it; the arguments are left as they are.

        Args:
            params: pytree of floating arrays.
            source: a pytree of arrays with a row an example, or an object with `len(source)` and
                `source[indices]` -> batch pytree (it stays with the caller, who feeds the workers from it).
            batch_size: examples of a global batch: a multiple of replicas x microbatches. What is left of an
                epoch that is no whole batch is not seen in it.
            epochs, steps: how long; give one of them.
            seed: of the epochs' order (`flowml.data.epoch_order`) and of the keys.
            shuffle: False visits the examples in order.
            opt_state: continue from this instead of `optimizer.init(params)`.
            callbacks: called with each step's record, in the caller's thread.
            progress: show a line of progress on stderr; by default where that is a terminal.

        Raises:
            ValueError: for a batch that does not divide or a source that is too small.
            WorkerLostError, WorkerError, DeadlineError: for what goes wrong on a worker, within seconds.
        """
        cluster = self._here()
        data = as_source(source)
        total = _total_steps(data, batch_size, epochs, steps)
        key, compiled = self._compile(cluster, params, _batch_structs(data, batch_size))
        handle = self._load(cluster, key, compiled.plan)
        first = self._next_step.get(key, 0)
        self._next_step[key] = first + total
        state = self._spec.optimizer.init(params) if opt_state is None else opt_state
        options = FitOptions(
            run=first,
            total=total,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            delays=self._checked_delays(cluster),
            progress=progress,
        )
        fit = Fit(cluster.session, handle, data, options, compiled.aux_tree)
        outcome = fit.run(_leaves(params), _leaves(state), callbacks)
        return TrainingResult(
            params=_unflatten(compiled.params_tree, outcome.params, params),
            opt_state=_unflatten(jax.tree_util.tree_structure(state), outcome.state, state),
            history=outcome.history,
            ledger=outcome.ledger,
            seconds=outcome.seconds,
            plan=compiled.plan,
            traffic=outcome.traffic,
        )

    def _here(self) -> Cluster:
        return self._cluster if self._cluster is not None else current_cluster()

    def _compile(self, cluster: Cluster, params: Any, batch: Any) -> tuple[Any, TrainingCompiled]:
        leaves, tree = jax.tree_util.tree_flatten((params, batch))
        key = (id(cluster), tuple((tuple(x.shape), str(x.dtype)) for x in leaves), tree)
        if key not in self._compiled:
            platforms = tuple(dict.fromkeys(d.platform for d in cluster.devices))
            self._compiled[key] = compile_training(self._spec, params, batch, cluster.devices, platforms=platforms)
        return key, self._compiled[key]

    def _load(self, cluster: Cluster, key: Any, plan: Plan) -> LoadedPlan:
        if key not in self._loaded:
            self._loaded[key] = cluster.session.load(plan)
        return self._loaded[key]

    def _checked_delays(self, cluster: Cluster) -> dict[str, float]:
        workers = {d.worker for d in cluster.devices}
        for worker in self._delays:
            if worker not in workers:
                raise FlowmlError(
                    f"delays names {worker!r}, which does not exist; there are {', '.join(sorted(workers))}"
                )
        return self._delays


def _total_steps(source: Source, batch_size: int, epochs: int | None, steps: int | None) -> int:
    if (epochs is None) == (steps is None):
        raise ValueError("give fit() either epochs= or steps=")
    per_epoch = source.examples // batch_size if batch_size > 0 else 0
    if per_epoch < 1:
        raise ValueError(f"batch_size {batch_size} needs at least that many examples; the source has {source.examples}")
    total = steps if steps is not None else (epochs or 0) * per_epoch
    if total < 1:
        raise ValueError(f"epochs={epochs}, steps={steps}: there is nothing to do; give at least 1")
    return total


def _batch_structs(source: Source, batch_size: int) -> Any:
    leaves = source.arrays if source.arrays is not None else source.take(np.arange(1))
    structs = [jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype)) for x in leaves]
    return jax.tree_util.tree_unflatten(source.tree, structs)


def _leaves(tree: Any) -> list[Any]:
    return [jnp.asarray(x) if not isinstance(x, jax.Array | np.ndarray) else x for x in jax.tree_util.tree_leaves(tree)]


def _unflatten(tree: Any, leaves: Sequence[Any], like: Any) -> Any:
    """Arrays of the dtypes of `like`, in its structure."""
    dtypes = [getattr(x, "dtype", None) for x in jax.tree_util.tree_leaves(like)]
    arrays = [jnp.asarray(x) if d is None else jnp.asarray(x, d) for x, d in zip(leaves, dtypes, strict=True)]
    return jax.tree_util.tree_unflatten(tree, arrays)


__all__ = ["Trainer", "TrainingResult"]
