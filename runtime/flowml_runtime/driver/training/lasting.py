"""Runs a fit to its end through the loss of workers: one run after another, each from the snapshot before.

    run -> a worker is lost -> the survivors stop -> the plan is loaded again, with others -> the next run

    replace    lost workers are started again, and the plan is the same
    shrink     replicas with a stage on a lost worker are left out, and their stores move (`flowml.training.without`)
    elastic    the same, and replicas whose workers join take part from a snapshot on (`regrouping`), or from the one
               before a loss that leaves too few without them

Where no replica waits for another, a run goes on without a lost worker that had nothing but replicas
(`protocol.training.departed`), and there is no next run.

A worker that has given notice is left out or replaced in the same way, from a snapshot on and with nothing done again.

A run is an epoch of membership: every message names the plan and the run that it belongs to, and all others are
dropped. A new run has another plan, as the workers name it, and the same executables.

The driver keeps the newest snapshot in memory (`saving`), where no loss of a worker can reach it. It lies between two
clocks and has the ledger of that moment. What was done after it is done again, so in the final state each work item has
one fate, and nothing is lost or applied twice. Records of steps that are done again replace those before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax

from flowml.callers import warn
from flowml.devices import Device
from flowml.errors import FlowmlError, PlacementError, PolicyError, WorkerLostError
from flowml.placement import Pipeline
from flowml.plan import Plan, Training
from flowml.render.units import listed
from flowml.training.spec import TrainingSpec
from flowml.training.without import check_met, check_shrinks, too_few, without
from flowml_runtime.driver.loaded_plan import LoadedPlan
from flowml_runtime.driver.training.fit import Fit
from flowml_runtime.driver.training.fit_arguments import Asked, Callback, OnLoss
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.outcome import Change, Loss, Outcome
from flowml_runtime.driver.training.program import Program
from flowml_runtime.driver.training.regrouping import Regrouped, Regrouping, WithPlaces, lost_replicas
from flowml_runtime.driver.training.saving import Saving
from flowml_runtime.membership.advice import lost_itself, without_remedy
from flowml_runtime.weak import weakly

T = TypeVar("T")

MOST_IN_VAIN = 10
"""How many losses without a new step in between a fit survives. More say that a step itself ends the worker."""
KNOWN_WITHIN_S = 2.0
"""How long an error waits until the cluster knows of the loss too, so that `bring_back(cluster.lost)` helps."""
MOST_ASKED = 4
"""How many lost workers are asked whether not they are lost, but this driver."""

Make = Callable[[LoadedPlan, int, Saving], Fit]
"""A loaded plan, the number of a run, and its snapshots -> the run."""


def prepare(cluster: Any, spec: TrainingSpec, asked: Asked) -> tuple[tuple[Device, ...], bool]:
    """A fit begins: replace workers that were lost before it. Returns the homes that compute nothing, and whether the
    fit begins with the replicas whose workers are there.

    Of workers that others have started only as many come back as the fit needs: some may be gone for long. Without them
    a fit that resumes goes on with fewer replicas, as it would have if its driver had lived.
    """
    cluster.session.time.begin_fit(goes_on=asked.on_loss != "raise")
    others = getattr(cluster, "outlives", False)
    if asked.on_loss == "replace" and not others:
        cluster.bring_back(cluster.lost)
    while asked.on_loss == "replace" and others and cluster.lost and (few := _missing(spec, cluster.devices)):
        width = max(Counter(device.worker for device in cluster.devices).values(), default=1)
        cluster.bring_back(sorted(cluster.lost, key=lambda worker: int(worker.rpartition(":")[2]))[: -(-few // width)])
    smaller = asked.on_loss == "shrink" and asked.resume is not None and others and bool(cluster.lost)
    try:
        homes = spec.divide(cluster.devices)[1]
    except PlacementError as error:
        raise cluster.session.explained(error, "'the training step'") from None
    return homes, asked.elastic or (smaller and _missing(spec, cluster.devices) > 0)


def _missing(spec: TrainingSpec, devices: Sequence[Device]) -> int:
    """How many devices, at least, are missing for the replicas of a fit."""
    stages = spec.placement.stages if isinstance(spec.placement, Pipeline) else 1
    try:
        return max(0, spec.replicas * stages - len(spec.divide(devices)[0]))
    except PlacementError:  # a home that has a name is lost, or nothing computes
        return 1


def begun(
    begin: Callable[[WithPlaces], tuple[Program, T]],
    cluster: Any,
    spec: TrainingSpec,
    on_loss: OnLoss,
    *,
    elastic: bool,
) -> tuple[WithPlaces, Program, T]:
    """The places of a fit, and what `begin` returns for them, which places all replicas. With `on_loss="replace"` a
    lost worker that the placement names is replaced. If the fit cannot begin without a lost one, the error says what
    would."""
    while True:
        places = WithPlaces.of(cluster, spec, elastic=elastic)
        try:
            return places, *begin(places)
        except WorkerLostError as error:
            if on_loss == "replace" and error.worker in cluster.lost:
                cluster.bring_back(error.worker)
            elif on_loss != "shrink" or elastic:
                raise
            else:
                raise WorkerLostError(
                    f"{error}; or give replicas='elastic' in place of on_loss='shrink': such a fit begins without the "
                    "replicas whose workers are lost",
                    worker=error.worker,
                ) from None


class After(NamedTuple):
    """The plan of the next run, the workers that were lost, and those that take their place."""

    handle: LoadedPlan
    lost: tuple[str, ...]
    joined: tuple[str, ...] = ()


class Losses:
    """What a fit does about lost workers."""

    def __init__(
        self,
        cluster: Any,
        program: Program,
        on_loss: OnLoss,
        least: int,
        *,
        elastic: bool = False,
        begins_smaller: bool = False,
    ) -> None:
        """A fit goes on with at least `least` replicas. If it is `elastic` or `begins_smaller`, it begins with those
        whose workers are there. Raises ValueError if these are too few."""
        self.on_loss: OnLoss = on_loss
        self._remedy = "give" if elastic else "give on_loss='replace', or"
        """What to do if too few replicas are left. An elastic fit replaces no worker."""
        self.gone: dict[str, None] = {}
        """The workers whose replicas are left out."""
        self.survived: list[Loss] = []
        """Those after which the fit went on."""
        self.changes: list[Change] = []
        """How its workers have changed otherwise."""
        self._at_load: tuple[After, str, float] | None = None
        """What was done about workers that were lost while the plan was loaded, why they were, and how long it took."""
        self._cluster = cluster
        self.program = program
        self._least = least
        if on_loss == "shrink":
            given = "replicas='elastic'" if elastic else "on_loss='shrink'"
            check_shrinks(program.training, program.spec.optimizer, given)
            if least > len(program.training.replicas):
                raise ValueError(
                    f"min_replicas={least} can never be met: the Trainer has {len(program.training.replicas)} replicas"
                )
            if least > 1:
                _check_least(program, least)
        self.regrouping: Regrouping | None = None
        if on_loss == "shrink":
            self.regrouping = Regrouping(cluster, program, weakly(self._can), joins=elastic)
        if elastic or begins_smaller:
            self._begin_with_those_there()
        if self.gone and not elastic:
            which, were = listed(tuple(self.gone)), "was" if len(self.gone) == 1 else "were"
            warn(f"{which} {were} lost before this fit has begun, which goes on without the replicas that were there")

    @property
    def training(self) -> Training:
        """The training without the replicas that were lost before."""
        training = without(self.program.compiled.plan, self.gone).training if self.gone else self.program.training
        assert training is not None
        return training

    def load(self, meanwhile: Callable[[], None]) -> LoadedPlan:
        """Load the plan of the fit. Calls `meanwhile` while workers compile it."""
        try:
            return self.program.load(self.gone, meanwhile=meanwhile)
        except WorkerLostError as error:
            self.check_driver(error)
            if self.on_loss == "raise":
                raise
            time = self.program.session.time
            began = time.now()
            after = self.after(error)
            self._at_load = after, without_remedy(str(error)), time.now() - began
            return after.handle

    def begins(self, step: int) -> None:
        """The fit begins with this step. Workers may have been lost before."""
        if self._at_load is not None:
            after, why, seconds = self._at_load
            self.survive(Loss(after.lost, why, step, step, seconds), after.joined)

    def check_driver(self, error: FlowmlError) -> None:
        """Raise another error than this one if workers are lost here that are there, and count this driver as lost."""
        named = [error.worker] if isinstance(error, WorkerLostError) and error.worker else []
        there = {device.worker for device in self._cluster.devices}
        others = [w for w in self.program.workers(self.gone) if w not in there and w not in named]
        for worker in (*named, *others)[:MOST_ASKED]:
            if why := self._cluster.why_refused(worker):
                raise WorkerLostError(lost_itself(worker, why), step=error.step) from error
        if self.on_loss == "raise" and named:
            self._cluster.notice(named[0], KNOWN_WITHIN_S)  # another worker may have told first

    def _begin_with_those_there(self) -> None:
        """Leave out the replicas whose workers have not joined yet."""
        there, training = {device.worker for device in self._cluster.devices}, self.program.training
        self.gone = {worker: None for worker in self.program.workers() if worker not in there}
        left = self._left(self.gone)
        if len(left) < self._least:
            few, smaller = self._few(len(left), "have their workers")
            other = f", or give {smaller}" if left and self._least > 1 else ""
            raise ValueError(f"{few} to begin; start {', '.join(self.gone)} with `flowml worker`{other}")
        if few := too_few(training, left):
            raise ValueError(f"{few.why}; start {', '.join(self.gone)} with `flowml worker`")

    def after(self, error: FlowmlError) -> After:
        """Load the plan after workers were lost. Raises `error` if none was, or too few are left."""
        lost, joined = dict[str, None](), frozenset[str]()
        while True:
            there = {device.worker for device in self._cluster.devices}
            named = {error.worker} if isinstance(error, WorkerLostError) else set[str]()
            found = [w for w in self.program.workers(self.gone) if w not in there or w in named]
            if not found:
                raise error
            lost.update(dict.fromkeys(found))
            if self.on_loss == "replace":
                self._cluster.bring_back(found)
            else:
                joined |= self._leave_out(tuple(found), tuple(lost), error)
            try:
                handle = self.program.load(self.gone, anew=True)
                return After(handle, tuple(lost), tuple(sorted(joined.difference(self.gone))))
            except WorkerLostError as another:
                error = another

    def may_leave(self, worker: str) -> bool:
        """Whether the fit goes on without the replicas of a worker, instead of having another in its place."""
        return self.regrouping is not None and self._can({*self.gone, worker})

    def leave(self, worker: str, why: str, step: int) -> None:
        """A run goes on without a lost worker: nothing is done again, and no replica has stopped."""
        self.gone[worker] = None
        if self.regrouping is not None:
            self.regrouping.begin(self.gone)
        self.survive(Loss((worker,), why, step, step, 0.0))

    def survive(self, loss: Loss, joined: tuple[str, ...] = ()) -> None:
        """The fit goes on after a loss, with workers that have joined."""
        self.survived.append(loss)
        if joined:
            self.changes.append(Change(joined, loss.resumed_at, len(self._left(self.gone)), loss.seconds))
        warn(_told(loss, self.on_loss, joined))

    def ready(self) -> bool:
        """Whether the next run can begin with other workers, before any is lost. Called for each message of a fit."""
        if self.regrouping is not None:
            return self.regrouping.ready()
        return bool(self._cluster.leaving) and not self._cluster.leaving.isdisjoint(self.program.workers())

    def regroup(self) -> tuple[LoadedPlan, tuple[str, ...], tuple[str, ...]]:
        """The plan of the next run, and the workers that have joined and that leave, once it is `ready`."""
        were = self.gone
        if self.regrouping is None:
            return self._hand_over()
        handle, gone = self.regrouping.take()
        self.program.take(handle, gone)
        self.gone = dict.fromkeys(sorted(gone))
        return handle, tuple(w for w in were if w not in gone), tuple(w for w in self.gone if w not in were)

    def _hand_over(self) -> tuple[LoadedPlan, tuple[str, ...], tuple[str, ...]]:
        """Have others in the place of workers that leave, which they do now, because the run has ended."""
        leave = tuple(worker for worker in self.program.workers() if worker in self._cluster.leaving)
        for worker in leave:
            self._cluster.notice(worker)
        self._cluster.bring_back(leave)
        try:
            return self.program.load(anew=True), leave, leave
        except WorkerLostError as error:
            return self.after(error).handle, leave, leave

    def _can(self, gone: Collection[str]) -> bool:
        """Whether the fit can go on without these workers."""
        left = self._left(gone)
        return too_few(self.program.training, left) is None and len(left) >= self._least

    def _left(self, gone: Collection[str]) -> list[int]:
        """The replicas that have no stage on these workers."""
        training = self.program.training
        lost = lost_replicas(training, gone)
        return [r for r in range(len(training.replicas)) if r not in lost]

    def _leave_out(self, found: Sequence[str], lost: Sequence[str], error: FlowmlError) -> frozenset[str]:
        """Go on without the workers that were `found` to be lost, among all that are `lost` now. Returns those that
        have joined and take part at once, because too few replicas would be left. While enough are left these do not
        wait until others have compiled."""
        self.gone.update(dict.fromkeys(found))
        joined = frozenset[str]()
        if self.regrouping is not None and not self._can(self.gone):
            joined = self.regrouping.joined(self.gone)
            self.gone = {worker: None for worker in self.gone if worker not in joined}
        left, why = self._left(self.gone), _all_lost(lost, error)
        if left and (few := too_few(self.program.training, left)):
            text = f"{why}. {few.why}; {self._remedy} {few.remedy}"
        elif len(left) < self._least:
            few, smaller = self._few(len(left), "are left")
            text = f"{why}. {few}; {self._remedy} {smaller}"
        else:
            return joined
        raise WorkerLostError(text, worker=lost[0], step=error.step) from error

    def _few(self, left: int, are: str) -> tuple[str, str]:
        """That too few replicas are there, and what to give. The fewest are named if they were given."""
        replicas = len(self.program.training.replicas)
        asked = f"{self._least} (min_replicas=)" if self._least > 1 else "at least one"
        smaller = "a smaller min_replicas" if left else "more replicas, so that some are left"
        return f"{left} of {replicas} replicas {are}, and the fit needs {asked}", smaller


def _check_least(program: Program, least: int) -> None:
    """Raise ValueError if the policies need more replicas than the fewest with which a fit is to go on. One with a time
    limit does not: it takes what has arrived by then."""
    for store in () if any(s.sites for s in program.training.stores) else program.training.stores:
        try:
            check_met(program.training, store, least)
        except PolicyError as error:
            raise ValueError(f"min_replicas={least} cannot hold: with so few replicas {error}") from None


class Runs:
    """The runs of one fit."""

    def __init__(self, program: Program, make: Make, first: Fit, losses: Losses) -> None:
        self.fit = first
        """The newest run."""
        self.first = first.saving.first
        """The first step of the first run."""
        self._regroup_to(first, losses)
        losses.begins(self.first)
        self._program = program
        self._make = make
        self._losses = losses
        self._records: list[Record] = []
        self._told = -1
        """The newest step whose record callbacks have got."""
        self._seen = -1
        """The same, without one in which a callback has raised an error."""
        self._in_vain = 0
        """The newest losses without a new step before them."""
        self._reached = -1
        """`_told` at the newest loss."""

    @property
    def plan(self) -> Plan:
        """The plan with all replicas."""
        return self._program.compiled.plan

    def run(self, callbacks: Sequence[Callback]) -> Outcome:
        """Train to the end. Raises the error of a loss that the fit cannot go on after."""
        if self._losses.on_loss == "raise":
            try:
                return self.fit.run(*self._leaves(), callbacks)
            except FlowmlError as error:
                self._losses.check_driver(error)
                raise

        def take(record: Record) -> None:
            while self._records and self._records[-1]["step"] >= record["step"]:
                self._records.pop()
            self._records.append(record)
            if record["step"] > self._told:
                self._told = record["step"]
                for callback in callbacks:
                    callback(record)
                self._seen = record["step"]

        try:
            return self._run([take])
        except FlowmlError:
            self._leave(take)
            raise
        finally:
            if self._losses.regrouping is not None:
                self._losses.regrouping.forget()

    def _leave(self, take: Callback) -> None:
        """The fit ends with an error. Another may go on from the newest snapshot, so callbacks get what is before."""
        saving = self.fit.saving
        step = saving.newest.content.steps if saving.newest is not None else 0
        for record in self.fit.held(step, 0.0) if self._seen == self._told else ():
            take(record)
        if step <= max(self._seen + 1, self.first):
            saving.leave()

    def _run(self, callbacks: Sequence[Callback]) -> Outcome:
        """One run after the other."""
        time = self._program.session.time
        began, held = time.now(), list[Record]()
        while True:
            try:
                outcome = self.fit.run(*self._leaves(), callbacks, held, time.now() - began)
                losses, changes = tuple(self._losses.survived), tuple(self._losses.changes)
                return replace(outcome, history=self._records, losses=losses, changes=changes)
            except Regrouped:
                held = self._regroup(began)
            except FlowmlError as error:
                held = self._go_on(error, began)

    def _go_on(self, error: FlowmlError, began: float) -> list[Record]:
        """Prepare the next run after a loss. Returns the records that it is to show first."""
        self._losses.check_driver(error)
        before, now = self.fit, self._program.session.time.now
        lost_at = now()
        self._in_vain = self._in_vain + 1 if self._told == self._reached else 1
        self._reached = self._told
        if self._in_vain > MOST_IN_VAIN and isinstance(error, WorkerLostError):
            raise WorkerLostError(
                f"{without_remedy(str(error))}. Workers were lost {self._in_vain} times without a new step in between, "
                "so the step itself may end them; look at their memory and at the code that runs in the step",
                worker=error.worker,
                step=error.step,
            ) from error
        handle, gone, joined = self._losses.after(error)
        self._next(handle)
        why = str(error) if before.lost is None else before.lost.reason
        loss = Loss(gone, why, before.step, self.fit.saving.first, now() - lost_at)
        self._losses.survive(loss, joined)
        return before.held(self.fit.saving.first, lost_at - began)

    def _regroup(self, began: float) -> list[Record]:
        """Prepare the next run with other replicas. Returns the records that it is to show first."""
        before, now = self.fit, self._program.session.time.now
        stopped_at = now()
        handle, joined, left = self._losses.regroup()
        self._next(handle)
        assert handle.plan.training is not None
        replicas = len(handle.plan.training.live)
        self._losses.changes.append(Change(joined, self.fit.saving.first, replicas, now() - stopped_at, left))
        return before.held(self.fit.saving.first, stopped_at - began)

    def _next(self, handle: LoadedPlan) -> None:
        """The next run is of this plan."""
        before, training = self.fit, handle.plan.training
        assert training is not None
        saving = before.saving.again(training, before.total)
        self.fit = self._make(handle, self._program.reserve(before.total), saving)
        self._regroup_to(self.fit, self._losses)

    @staticmethod
    def _regroup_to(fit: Fit, losses: Losses) -> None:
        """Let workers join and leave this run."""
        if losses.regrouping is not None:
            fit.saving.waits_for_push, fit.saving.leaving = True, losses.regrouping.leaving
            losses.regrouping.begin(losses.gone)
        if losses.on_loss != "raise":
            fit.saving.regroups, fit.may_lose, fit.goes_on = losses.ready, losses.may_leave, losses.leave

    def _leaves(self) -> tuple[Sequence[Any], Sequence[Any]]:
        params, state, _ = self.fit.saving.trees
        return jax.tree_util.tree_leaves(params), jax.tree_util.tree_leaves(state)


def _all_lost(workers: Sequence[str], error: FlowmlError) -> str:
    """The text of an error, which may be of the loss of one of these workers, and that the others were lost."""
    text, named = without_remedy(str(error)), error.worker if isinstance(error, WorkerLostError) else None
    others = tuple(worker for worker in workers if worker != named)
    if not others:
        return text
    return f"{text}; {listed(others)} {'was' if len(others) == 1 else 'were'} lost{' too' * (named is not None)}"


def _told(loss: Loss, on_loss: OnLoss, joined: Sequence[str]) -> str:
    one = len(loss.workers) == 1
    was, its = ("was", "its replica") if one else ("were", "their replicas")
    how = f"replaced within {loss.seconds:.1f} s" if on_loss == "replace" else f"left out with {its}"
    new = f", with {listed(tuple(joined))}, which {'has' if len(joined) == 1 else 'have'} joined" if joined else ""
    return (
        f"{listed(loss.workers)} {was} lost at step {loss.step} ({loss.reason}) and {was} {how}; the fit goes on "
        f"from step {loss.resumed_at}{new}"
    )
