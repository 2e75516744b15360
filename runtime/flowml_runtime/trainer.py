"""`Trainer` trains a model on a cluster, from a loss, an optimizer and a policy for each layer.

The driver compiles the training plan and sends parameters to their homes and data to the stages that read it.
After that it only answers the workers: it hands out work items on request, enters each in the ledger, and keeps the
history of losses. The workers train without it until the homes send the trained parameters back.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import msgspec

from flowml.arguments import choice, flag
from flowml.data import Source, as_source, epoch_order
from flowml.devices import platforms_of
from flowml.effects import EffectsChoice, EffectsOption
from flowml.errors import FlowmlError, PlacementError, UnsupportedError
from flowml.ir._jax import jit_is_off, trace_context
from flowml.numbers import whole_number
from flowml.placement import Placement
from flowml.placement.homes import Homes
from flowml.plan import Plan, Training
from flowml.policy import Policy
from flowml.policy.published import PolicyRule
from flowml.splits import Shuffle, dealt
from flowml.training.adapted import WantedError, adapted
from flowml.training.compiler import compile_training
from flowml.training.spec import TrainingSpec
from flowml.training.state import Rule
from flowml.training.step import Weight, by_examples, name_of
from flowml.training.untrained import trained_leaves
from flowml.training.variants import difference, placed_alike
from flowml_runtime.cluster import Cluster
from flowml_runtime.current import blocks
from flowml_runtime.driver.checkpoint import Checkpoint
from flowml_runtime.driver.collector import paused_collector
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.progress import shown
from flowml_runtime.driver.training.delays import Delays, delays_of, rows_of, workers_of
from flowml_runtime.driver.training.feeding import MAX_SHAPES, first_batch
from flowml_runtime.driver.training.fit import Fit
from flowml_runtime.driver.training.fit_arguments import Asked, Callback, Last, check_items, compiling, rest_of
from flowml_runtime.driver.training.initial import first_state, nonfinite_of, own_array, warn_of_watchers
from flowml_runtime.driver.training.lasting import Losses, OnLoss, Runs, begun, prepare
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.outcome import FitOptions, OnNonFinite
from flowml_runtime.driver.training.probe import Looked, looking
from flowml_runtime.driver.training.program import Program, discard
from flowml_runtime.driver.training.result import TrainingResult, result_of, whole_of, with_shapes
from flowml_runtime.driver.training.resuming import saving_of, writing
from flowml_runtime.driver.training.saving import Saving
from flowml_runtime.driver.training.snapshots import Figures, figures
from flowml_runtime.driver.training.structs import check_state, check_values, structs, structs_of
from flowml_runtime.driver.training.training_session import TrainingCluster
from flowml_runtime.driver.training.validation import Validation, joined, loss_metrics, parts
from flowml_runtime.evaluation import Evaluation
from flowml_runtime.interrupts import heeding_interrupts
from flowml_runtime.sim.cluster import SimulatedCluster, kind_of

MAX_PROGRAMS = 2 * MAX_SHAPES + 8
"""How many programs a trainer keeps, at least those of one fit. One more discards that which was used longest ago."""


class Trainer:
    """Trains a model whose layers may be on different workers and may have different synchronization policies.

    Args:
        loss: `loss(params, batch)` or `loss(params, batch, rng)` -> scalar, or (scalar, aux). It must be a mean over
            the examples of the batch, because it is evaluated on shares of a batch and averaged. With `rng`, the key
            of a work item is `fold_in(key(seed), item)`; with several microbatches their index is folded in too.
            With `has_state` it is `loss(params, state, batch[, rng])` -> (scalar, state) or (scalar, (state, aux)).
        optimizer: any `optax.GradientTransformation`.
        cluster: defaults to the cluster of the current `with` block. It may be a `flowml.SimulatedCluster`.
        replicas: the number of copies of the model. Each replica gets an equal share of the global batch.
        placement: how one replica is partitioned; see `flowml.dataflow`. Device names are those of replica 0.
        microbatches: the number of pieces into which the pipeline splits a replica's share of a batch.
        schedule: `"1f1b"` or `"gpipe"`.
        homes: workers that hold parameters and compute nothing else (parameter servers): how many, which are the last
            ones, or patterns of their names. By default layers live on the workers of replicas.
        policies: parameter path pattern -> `flowml.Policy`. The first match wins; a parameter without a match gets
            `Policy()`. A single policy is for all parameters, and a function of (path, shape) chooses for each.
        weight: the weight of a batch, for a loss that is a mean over something other than examples, such as the tokens
            that are not padding. Give the name of a leaf of aux (`"tokens"`, `"counts/tokens"`), or a function of
            the batch. The loss stays a mean; each microbatch and replica counts by its weight, so that a step equals
            one on the whole batch. In a mean of what replicas made of their own parameters, each counts by the weights
            of its steps. Weights must be at least 0 and finite; others are treated like a gradient that is not finite,
            where gradients are added up. A step whose weights are all 0 has gradient 0, loss NaN and 0 replicas.
        delays: worker name -> seconds added to each of its steps, to make workers slow in experiments; or a model of
            `flowml.sim`, which is drawn for each worker and step with the seed of the fit.
        check_replicas: the number of steps between two checks that replicas which each apply sums of gradients
            (`all_reduce`, rings) hold the same bits. A fit also ends with a check. 0 turns all checks off.
        on_nonfinite: what to do with a gradient that holds NaN or infinity. `"refuse"` leaves out what a replica sends
            for that layer and step, warns, and counts it in `result.ledger`; where replicas add gradients up, all of
            them leave out the sum. Such a loss is left out of the history's mean and counted too, with a warning if its
            gradients are finite and applied. `"raise"` ends the fit at the first such gradient or loss with
            WorkerError. `"apply"` applies the gradient and counts none, and such a loss is in the mean.
        has_state: whether the loss takes and returns the state of a model, such as batch statistics. Each leaf stays on
            the stage that computes it; a microbatch takes what the one before it has left.
        state_rules: state path pattern -> how the values of replicas are joined at the end of a fit: `"mean"` (the
            default for floats), `"max"` (the default for integers), `"sum"` of what each replica has added, `"first"`
            (that of replica 0, the default for keys, raw ones too) or `"local"` (not joined; replica 0's is shown).
        effects: what becomes of callbacks and debug prints; see `flowml.dataflow`.

    Raises:
        ValueError, PolicyError: if arguments contradict each other.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        cluster: Cluster | SimulatedCluster | None = None,
        replicas: int = 1,
        placement: Placement = "auto",
        homes: Homes | None = None,
        microbatches: int = 1,
        schedule: str = "1f1b",
        policies: Mapping[str, Policy] | Policy | PolicyRule | None = None,
        weight: Weight | None = None,
        delays: Delays | None = None,
        check_replicas: int = 100,
        on_nonfinite: OnNonFinite = "refuse",
        has_state: bool = False,
        state_rules: Mapping[str, Rule] | None = None,
        effects: EffectsChoice = "run",
    ) -> None:
        methods = (getattr(optimizer, "init", None), getattr(optimizer, "update", None))
        if callable(optimizer) or not all(map(callable, methods)):
            raise TypeError(
                f"optimizer must be an optax.GradientTransformation such as optax.adam(1e-3), got {optimizer!r}"
            )
        if not isinstance(cluster, Cluster | SimulatedCluster | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"cluster={cluster!r} is of type {type(cluster).__name__}; give an fm.Cluster")
        how = replicas, placement, microbatches, schedule, policies, weight, flag("has_state", has_state)
        self._spec = TrainingSpec(loss, optimizer, *how, homes=homes)
        if state_rules is not None and not has_state:
            raise ValueError("state_rules is for a loss with state; give Trainer(has_state=True) too")
        self._state_rules = state_rules
        self._cluster, self._delays = cluster, delays_of(delays)
        self._on_nonfinite: OnNonFinite = cast(OnNonFinite, choice("on_nonfinite", on_nonfinite, get_args(OnNonFinite)))
        self._check_replicas = whole_number("check_replicas", check_replicas)
        self._programs: dict[Any, Program] = {}
        self._effects, self._evaluation = EffectsOption(effects), Evaluation(self._spec.placement, effects)
        self._own_metrics = loss_metrics(self._spec)
        self._fitting = threading.Lock()
        self._looked, self._wants = False, frozenset[str]()  # what the optimizer is known to want
        weakref.finalize(self, discard, self._programs).atexit = False

    @property
    def spec(self) -> TrainingSpec:
        """What is trained, and how."""
        return self._spec

    @property
    def cluster(self) -> Cluster | SimulatedCluster | None:
        """The cluster that it was given; None if it takes the current one."""
        return self._cluster

    def with_policies(
        self, policies: Mapping[str, Policy] | Policy | PolicyRule | None, cluster: SimulatedCluster | None = None
    ) -> Trainer:
        """A trainer of the same model with other policies, and on `cluster` if it is given."""
        other = copy.copy(self)
        other._spec, other._cluster = replace(self._spec, policies=policies), cluster or self._cluster
        other._programs, other._fitting = {}, threading.Lock()
        weakref.finalize(other, discard, other._programs).atexit = False
        return other

    def plan(self, params: Any, batch: Any, state: Any = None) -> Plan:
        """The plan for one global batch (arrays or `jax.ShapeDtypeStruct`s), with its policies. Runs nothing."""
        self._check_state(state, shapes=True)
        batch = structs(batch, "batch leaf")
        return self._first_program(self._here(), self._spec, params, state, batch)[0].compiled.plan

    def fit(
        self,
        params: Any,
        source: Any,
        *,
        batch_size: int,
        epochs: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        shuffle: Shuffle = True,
        last: Last = "drop",
        opt_state: Any = None,
        state: Any = None,
        callbacks: Sequence[Callback] = (),
        validation: Any = None,
        validate_every: int | None = None,
        progress: bool | None = None,
        checkpoint: Checkpoint | None = None,
        resume: Literal["auto"] | None = None,
        on_loss: OnLoss | None = None,
        min_replicas: int | None = None,
        replicate: int = 0,
        replicas: Literal["elastic"] | None = None,
    ) -> TrainingResult:
        """Train from `params` and return the result. The arguments are not modified.

        Args:
            params: pytree of arrays, or an equinox module. What is not floating is not trained; the result has it too.
            source: a pytree of arrays, a row for each example, or an object with `len(source)` and `source[indices]` ->
                batch. It stays in this process, may return the same buffer each time, and examples of up to 32 shapes.
            batch_size: the examples of a global batch, a multiple of replicas x microbatches.
            last: `"drop"` skips the examples at the end of an epoch that do not fill a batch. `"use"` makes a shorter
                batch of them, whose replicas and microbatches count by their examples: the step is one on that batch.
            epochs, steps: how long to train; give one of them.
            seed: seeds the order of each epoch (`flowml.data.epoch_order`) and the keys.
            shuffle: False visits the examples in order; `fm.Shards` and `fm.WithReplacement` are other ways.
            opt_state: continue from this instead of `optimizer.init(params)`. Epochs count from 0, in their same order.
            state: the first state of the model, for a loss with `has_state`.
            callbacks: called with each step's record, in the caller's thread. The workers run at most two steps ahead
                and then wait; a callback longer than the cluster's `deadline_s` may make them miss a deadline.
            validation: a source, on which the loss is measured, or (source, metrics) as for `evaluate`. Results are in
                the records and in `result.validation`. Replicas stop until the driver has a copy of what they keep.
            validate_every: the number of steps between two validations; the default is an epoch. One is at the end.
            progress: show a line of progress on stderr. The default is to show it if stderr is a terminal.
            checkpoint: where and how often to write snapshots, from which a later fit goes on.
            resume: `"auto"` goes on from the newest complete snapshot of `checkpoint`, or begins if there is none.
                Epochs, steps and the ledger are those of the whole fit; the history begins with the first new step.
            on_loss: what to do when a worker is lost. `"raise"`, the default, ends the fit. `"replace"` starts it again
                and goes on from the newest snapshot, in the driver; `"shrink"` goes on with the others.
            min_replicas: the fewest replicas with which `"shrink"` goes on, and `"elastic"` begins and goes on.
            replicate: copies of each worker's state, so that fits that go on do no step again that callbacks have seen.
            replicas: `"elastic"` means `on_loss="shrink"`, and also takes in replicas as their workers join.

        Raises:
            ValueError: if the batch size does not divide, the source is too small, or a batch does not fit the loss.
            WorkerLostError, WorkerError, DeadlineError: within seconds, if a worker fails.
            FlowmlError: if a fit of this trainer is already running.
            CheckpointError: if the snapshot is of another fit or behind its end, or no file can be read or written.
        """
        check_values(params, "parameter")
        self._check_state(state)
        size = batch_size, epochs, steps, seed, dealt(shuffle, self._spec.replicas, batch_size), last
        lost = on_loss, min_replicas, replicate, replicas
        asked = Asked.of(source, size, callbacks, progress, (validation, validate_every), (checkpoint, resume), lost)
        cluster = self._here()
        with self._alone(), writing(asked, cluster) as asked, heeding_interrupts():
            runs = self._begin(cluster, asked, params, opt_state, state)
            outcome = runs.run(asked.callbacks)
        saving = runs.fit.saving
        result = result_of(saving.trees, outcome, with_shapes(runs.plan, runs.fit.shapes), saving.model, runs.first)
        return self._told(cluster, result, asked, params, state)

    def _begin(self, cluster: TrainingCluster, asked: Asked, params: Any, opt_state: Any, state: Any) -> Runs:
        """Compile and load what a fit needs."""
        homes, some = prepare(cluster, self._spec, asked)
        workers_of(cluster.devices, self._delays, homes, elastic=some, lost=cluster.lost)  # raises before it compiles
        data, batch_size = asked.data, asked.batch_size
        order = epoch_order(data.examples, asked.seed, 0, shuffle=asked.shuffle)
        model = Model.of(state, self._state_rules, self._spec.replicas)
        spec = replace(self._spec, weight=by_examples) if asked.rest and self._spec.weight is None else self._spec
        batch = first_batch(data, order, batch_size, spec.replicas)
        begin = partial(self._first_program, spec=spec, params=params, state=state, batch=batch)
        everywhere, program, params = begun(begin, cluster, spec, asked.on_loss, elastic=some)
        check_items(program.training, asked)
        about = figures(program.training, data, batch_size, asked.seed, asked.shuffle, asked.rest, kind_of(cluster))
        grows, least = asked.elastic, asked.min_replicas
        losses = Losses(cluster, program, asked.on_loss, least, elastic=grows, begins_smaller=some)
        saving = self._saving(cluster, program, losses.training, params, opt_state, model, asked, about)
        looked = self._look_at_loss(program, params, data, order, batch_size)
        handle = losses.load(looked.look)
        looked.warn()
        saving = saving.again(handle.plan.training, asked.total) if losses.gone and handle.plan.training else saving
        variant = partial(self._variant, everywhere, losses, structs_of(params, state))
        options = self._options(cluster, program, asked)

        def make(handle: LoadedPlan, run: int, saving: Saving) -> Fit:
            now = replace(options, run=run)
            with paused_collector(len(cluster.devices)):
                return Fit(cluster.session, handle, data, now, program.compiled, variant, saving, model.replicas)

        return Runs(program, make, make(handle, options.run, saving), losses)

    def evaluate(
        self,
        params: Any,
        source: Any,
        metrics: Callable[..., Any],
        *,
        state: Any = None,
        batch_size: int = 128,
        last: Last = "use",
    ) -> dict[str, Any]:
        """The means over all examples of `metrics(params, batch)` -> dict of means over the examples of the batch.

        If the loss has state, it is `metrics(params, state, batch)`. It runs on the cluster, with the placement of
        training. The last batch may be shorter; each counts by its examples. `last="drop"` leaves it out. On a
        `SimulatedCluster` it takes no virtual time. Raises TypeError for a metric of integers, such as a count,
        ValueError for one whose shape depends on the number of examples: see `predict`.
        """
        found, data = self._evaluated(metrics, params, state), as_source(source)
        size = whole_number("batch_size", batch_size, least=1)
        used = data.examples - (0 if rest_of(data, size, last) else data.examples % size)
        return self._evaluation.means(*found, data, size, self._plan_of(params), used)

    def predict(
        self, params: Any, source: Any, fn: Callable[..., Any], *, state: Any = None, batch_size: int = 128
    ) -> Any:
        """What `fn(params, batch)`, or `fn(params, state, batch)` if the loss has state, returns for each example, in
        order: a pytree of arrays with a row for each. It runs as `evaluate` does."""
        found = self._evaluated(fn, params, state)
        return self._evaluation.predictions(*found, source, batch_size, self._plan_of(params))

    def _validation(self, cluster: TrainingCluster, program: Program, asked: Asked) -> Validation:
        """What measures the parameters of a fit."""
        if not cluster.session.arithmetic:
            raise UnsupportedError(
                "a simulated fit without arithmetic has no parameters to validate; leave validation= out, or give "
                "fm.SimulatedCluster(arithmetic=True)"
            )
        source, metrics = parts(asked.validation, self._spec)
        rows, plan = max(1, asked.batch_size // self._spec.replicas), program.compiled.plan

        def measure(params: Any, state: Any) -> dict[str, Any]:
            values = [whole_of(program.spec.untrained, params), *([state] if self._spec.has_state else ())]
            found = self._evaluation.means(cluster, metrics or self._own_metrics, values, source, rows, plan)
            return found if metrics else joined(found)

        return Validation(asked.validate_every, measure)

    def _evaluated(self, fn: Callable[..., Any], params: Any, state: Any) -> tuple[Any, Callable[..., Any], list[Any]]:
        if not callable(fn):
            raise TypeError(f"{fn!r} is of type {type(fn).__name__}; give a function of the parameters and a batch")
        self._check_state(state)
        return self._here(), fn, [params, state] if self._spec.has_state else [params]

    def _plan_of(self, params: Any) -> Plan | None:
        """The newest plan on the cluster in use, of those for parameters of this structure if there are some."""
        leaves, session = len(trained_leaves(params)), self._here().session
        mine = sorted(self._programs.values(), key=lambda p: (p.session is session, p.parameters == leaves))
        return mine[-1].compiled.plan if mine and mine[-1].session is session else None

    def _check_state(self, state: Any, *, shapes: bool = False) -> None:
        """Raise ValueError unless there is state where the loss has it, TypeError if it has only `shapes`."""
        if (state is not None) != self._spec.has_state:
            raise ValueError(
                "the loss has state (has_state=True), and none is given; give state=, such as the batch statistics"
                if self._spec.has_state
                else "state= is given, and the loss has none; give Trainer(has_state=True), or leave state out"
            )
        if not shapes:
            check_state(state)

    def _options(self, cluster: TrainingCluster, program: Program, asked: Asked) -> FitOptions:
        run = program.reserve(asked.total)
        shrinks = asked.on_loss == "shrink"
        workers = workers_of(cluster.devices, self._delays, elastic=shrinks, lost=cluster.lost)
        return FitOptions(
            run=run,
            total=asked.total,
            batch_size=asked.batch_size,
            seed=asked.seed,
            shuffle=asked.shuffle,
            delays=rows_of(self._delays, workers, asked.seed, program.next_step - run),
            check_replicas=self._check_replicas,
            on_nonfinite=nonfinite_of(program.spec.optimizer, self._on_nonfinite),
            progress=asked.progress,
            rest=asked.rest,
        )

    def _saving(
        self,
        cluster: TrainingCluster,
        program: Program,
        training: Training,
        params: Any,
        opt_state: Any,
        model: Model,
        asked: Asked,
        about: Figures,
    ) -> Saving:
        """The values with which a fit begins, and its snapshots."""
        params = jax.tree_util.tree_map(own_array, params)
        optimizer, outer = program.spec.optimizer, program.compiled.outer
        state = first_state(optimizer, outer, params, opt_state)
        warn_of_watchers(state, self._on_nonfinite)
        if asked.checkpoint is not None:
            about = msgspec.structs.replace(about, update=program.update_name(state, params))
        saving = saving_of(asked, training, (params, state, program.spec.untrained), model, about)
        if asked.validation is not None:
            saving.validation = self._validation(cluster, program, asked)
        saving.copies, saving.total = asked.copies, asked.total
        saving.keeps = asked.on_loss != "raise" or asked.kept is not None
        return saving

    def _look_at_loss(self, program: Program, params: Any, source: Source, order: Any, batch_size: int) -> Looked:
        """What looks whether the average of the loss over replicas and microbatches is the loss of the batch, once."""
        if source.examples < batch_size or self._looked or self._spec.has_state or not program.session.arithmetic:
            return Looked()
        self._looked = True
        return looking(program.spec, program.compiled.plan, params, source, order, batch_size)

    def _told(
        self, cluster: TrainingCluster, result: TrainingResult, asked: Asked, params: Any, state: Any
    ) -> TrainingResult:
        """The result, after those that watch a simulated cluster have heard of it."""
        if isinstance(cluster, SimulatedCluster):
            cluster.on_result(result)
            if cluster.on_fit is not None:
                order = epoch_order(asked.data.examples, asked.seed, 0, shuffle=asked.shuffle)
                batch = first_batch(asked.data, order, asked.batch_size, self._spec.replicas)
                cluster.on_fit(self, params, batch, state)
        return result

    def _here(self) -> TrainingCluster:
        cluster: TrainingCluster = self._cluster if self._cluster is not None else blocks.current()
        cluster.session.check_owner()
        return cluster

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Allow one fit at a time. Raises FlowmlError in another thread, and in a callback of the fit itself."""
        if not self._fitting.acquire(blocking=False):
            raise FlowmlError("this Trainer is in the middle of a fit; wait for it to end, or make another Trainer")
        try:
            yield
        finally:
            self._fitting.release()

    def _variant(self, cluster: TrainingCluster, losses: Losses, values: tuple[Any, Any], batch: Any) -> LoadedPlan:
        """A plan for batches of another shape, whose programs can run steps of the fit's plan, of the replicas left."""
        base = losses.program
        program = self._program(cluster, base.spec, values, batch)
        if difference(base.compiled, program.compiled):  # the shape has led to another placement, for one
            program = self._program(cluster, base.spec, values, batch, like=base)
            if differs := difference(base.compiled, program.compiled):
                shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree_util.tree_leaves(batch))
                raise FlowmlError(
                    f"batches of one fit may differ in shape, but one of {shapes} changes {differs}; give "
                    "batches of one shape, policies that send plain gradients, and aux whose shapes do not depend on "
                    "the batch's"
                )
        return program.load(losses.gone)

    def _first_program(
        self, cluster: TrainingCluster, spec: TrainingSpec, params: Any, state: Any, batch: Any
    ) -> tuple[Program, Any]:
        """The program, and the parameters as it takes them: those that are trained, with the value if it is wanted."""
        taken, given = adapted(spec, params, own_array, self._wants, batch)
        try:
            return self._program(cluster, taken, structs_of(given, state), batch), given
        except WantedError as error:
            self._wants = self._wants | {error.what}
            return self._first_program(cluster, spec, params, state, batch)

    def _program(
        self,
        cluster: TrainingCluster,
        spec: TrainingSpec,
        values: tuple[Any, Any],
        batch: Any,
        like: Program | None = None,
    ) -> Program:
        """The program for ShapeDtypeStructs of (parameters, state) and a batch; placed as `like` is, if it is given."""
        if jit_is_off():
            raise UnsupportedError("jax.disable_jit() is on, and workers run what is compiled; train without it")
        leaves, tree = jax.tree_util.tree_flatten((values, batch))
        shapes = tuple((x.shape, str(x.dtype)) for x in leaves)
        key = (cluster.session, cluster.devices, spec.weight, spec.untrained, shapes, tree, trace_context(), like)
        program = self._programs.pop(key, None)
        if program is None:
            platforms = platforms_of(cluster.devices)
            links = cluster.links_for(spec.placement, len(spec.divide(cluster.devices)[0]) // spec.replicas)
            alike = like and placed_alike(spec, like.compiled.plan, cluster.devices)
            placed, devices = alike or (spec, cluster.devices)
            try:
                told = shown(partial(compiling, name_of(spec.loss), batch))
                with told, paused_collector(len(cluster.devices)):
                    effects = self._effects.on(devices)
                    compiled = compile_training(
                        placed, values[0], batch, devices, links, platforms, state=values[1], effects=effects
                    )
            except PlacementError as error:
                raise cluster.session.explained(error, "'the training step'") from None
            self._effects.tell(name_of(spec.loss), compiled.left_out)
            program = Program(compiled, cluster.session, spec)
        self._programs[key] = program  # as the newest
        if len(self._programs) > MAX_PROGRAMS:
            oldest = next(iter(self._programs))
            discard({oldest: self._programs.pop(oldest)})
        return program


__all__ = ["Trainer", "TrainingResult"]
