"""Describes the events of a training run in sentences, for test scenarios and for `flowml trace --story`.

An event of a worker has a number, and a message carries the number of the event that caused it. So (worker, number)
identifies an event in a run, and each event refers to the event that caused it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flowml_runtime import wire
from flowml_runtime.protocol.training import actions, driver, snapshot
from flowml_runtime.protocol.training.terms import RETIRED, ReplicaLost


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of one machine. `cause` names the event that caused it (`worker#run.number`), if any."""

    run: int
    number: int
    cause: str
    text: str


def entry(
    me: str,
    run: int,
    number: int,
    event: actions.Event | driver.Event,
    wanted: Sequence[actions.Action | driver.Action],
) -> Entry | None:
    """Describe an event of `me` and the resulting actions. None if it only passed values on."""
    cause = ""
    if isinstance(event, actions.Received):
        if isinstance(
            event.message,
            wire.Batch
            | wire.Source
            | wire.OwnState
            | wire.ModelState
            | wire.Gossip
            | wire.Collective
            | wire.Traffic
            | wire.Staleness
            | wire.Forwarded,
        ):
            return None
        cause = f"{event.peer}#{run}.{event.message.cause}" if event.message.cause else ""
    elif isinstance(event, actions.StepFinished):
        cause = f"{me}#{run}.{event.cause}"
    done = [
        wants(a)
        for a in wanted
        if not isinstance(a, driver.NoteFates | driver.NoteCommit | driver.NoteWaits | driver.Note | driver.NoteLeftOut)
    ]
    return Entry(run, number, cause, "; ".join([happened(event), *done]))


def said(message: wire.Wire | wire.TrainingMessage) -> str:
    """Describe a message."""
    match message:
        case wire.StartTraining():
            return f"run {message.run} of {message.total_clocks} clocks begins"
        case wire.StopTraining():
            return f"run {message.run} ends"
        case wire.Ask(replica=replica, clocks=clocks, returned=returned):
            back = f"returns {_items(returned)}" if returned else ""
            asks = f"asks for work for {_many('clock', clocks)}" if clocks else ""
            return f"replica {replica} {' and '.join(filter(None, (asks, back)))}"
        case wire.Grant(replica=replica, items=items, exhausted=exhausted):
            given = ", ".join(f"item {i.sequence} for clock {c}" for c, i in items) or "nothing"
            return f"replica {replica} gets {given}{', the last there is' if exhausted else ''}"
        case wire.Begin(replica=replica, clock=clock, item=item):
            return f"replica {replica} begins clock {clock} with item {item.sequence}"
        case wire.Computed(replica=replica, clock=clock, microbatches=count):
            return f"replica {replica} has computed {count} microbatches of clock {clock}"
        case wire.Halt(clock=clock):
            return f"enough microbatches of clock {clock} are computed"
        case wire.Settled(replica=replica, fates=fates, missing=missing, late=late):
            without = f" without {_many('group', missing)}" if missing else ""
            without += f", late in {_many('group', late)}" if late else ""
            return ", ".join(f"item {i.sequence} of replica {replica} is {fate}{without}" for i, fate in fates)
        case wire.Hold(clock=clock, replica=None):
            return f"replicas {_held(clock)}"
        case wire.Hold(replica=replica, within=0):
            return f"replica {replica} may retire"
        case wire.Hold(replica=replica, within=within):
            return f"replica {replica} stops after a push within {within} clocks"
        case wire.Paused(replica=replica, hold=hold, clock=clock):
            return f"replica {replica} has stopped before clock {clock}, because replicas {_held(hold)}"
        case wire.Export():
            return "all replicas have stopped, tell what you keep"
        case wire.Buffers(owner=owner):
            return f"this is what {owner} keeps" if owner else "these are all buffers"
        case wire.LeaveOut(replica=replica):
            return f"go on without replica {replica}"
        case wire.LeftOut(replica=replica, stores=stores):
            known = (f"store {store} has what it did before clock {clock}" for store, clock in stores)
            return f"of replica {replica} {', '.join(known)}"
        case wire.Retired(replica=replica, of_site=True):
            return f"the site of replica {replica} has retired"
        case wire.Retired(replica=replica, stage=stage):
            return f"stage {stage} of replica {replica} has retired"
        case wire.Report(replica=replica, clock=clock):
            return f"replica {replica} reports clock {clock}"
        case _:
            return _said_of_store(message)


def _said_of_store(message: wire.Wire | wire.TrainingMessage) -> str:
    match message:
        case wire.Contribution(store=store, part=part, replica=replica, clock=clock, of_site=True):
            return f"the site of replica {replica} gives part {part} of store {store} at clock {clock}"
        case wire.Contribution(store=store, part=part, replica=replica, clock=clock):
            return f"replica {replica} gives part {part} of store {store} at clock {clock}"
        case wire.Arrived(store=store, replica=replica, clock=clock):
            return f"replica {replica} is complete at store {store} at clock {clock}"
        case wire.Commit(clock=clock, excluded=excluded, group=group, folded=folded, site=site):
            of = (f" for group {group}" if group else "") + ("" if site is None else f" at site {site}")
            late = "".join(f" and clock {c} of replica {r}" for r, c in folded)
            whose = f"without {_many('replica', excluded)}" if excluded else "with all"
            return f"clock {clock} is committed{of} {whose}{late}"
        case wire.Published(store=store, version=version, floor=floor):
            return f"store {store} is at version {version}, {_floor(floor)}"
        case wire.Applied(store=store, replica=replica, clock=clock, version=version):
            return f"version {version} of store {store} holds what replica {replica} gave at clock {clock}"
        case wire.StoreValue(store=store, version=version):
            return f"store {store} is at version {version}"
        case wire.Shared(clock=clock, stores=stores, empty=True):
            return f"{_many('store', stores)}: one has nothing to apply at clock {clock}"
        case wire.Shared(clock=clock, stores=stores, round=number):
            return f"{_many('store', stores)} share values in round {number} of clock {clock}"
        case _:
            return type(message).__name__


def happened(event: actions.Event | driver.Event) -> str:
    """Describe an event."""
    match event:
        case actions.Received(peer, message):
            return f"hears from {peer}: {said(message)}"
        case actions.Tick():
            return "has waited long enough"
        case actions.StepFinished(_, replica, stage, clock):
            return f"has finished clock {clock} on stage {stage} of replica {replica}"
        case actions.Computed(_, replica, stage):
            return f"has computed a microbatch on stage {stage} of replica {replica}"
        case actions.Updated(_, replica, store, clock):
            return f"sees that replica {replica} has updated store {store} at clock {clock}"
        case ReplicaLost(replica):
            return f"hears that replica {replica} is lost"
        case driver.WorkerLost(worker, reason):
            return f"hears that {worker} is lost: {reason}"
        case driver.StepFailed(message):
            return f"hears that step {message.step} failed on {message.worker}: {message.error}"
        case driver.Begin():
            return "begins the fit"
        case driver.Pause():
            return "wants a snapshot"
        case driver.Offer():
            return "workers may write a snapshot" if event.folder else "workers may not write a snapshot"
        case driver.Withdraw():
            return "gives up a snapshot for now"
        case driver.Stop():
            return "ends the fit"


def wants(action: actions.Action | driver.Action) -> str:
    """Describe an action."""
    match action:
        case actions.Send(to, message) | actions.Leave(to, message):
            return f"tells {', '.join(to)}: {said(message)}"
        case actions.Start(_, replica, stage, clock, item):
            return f"starts clock {clock} on stage {stage} of replica {replica} with item {item.sequence}"
        case actions.Abandon(replica, stage, clock):
            return f"abandons clock {clock} on stage {stage} of replica {replica}"
        case actions.Count(replica, stage, clock, counts, stores):
            fate = "counts" if counts else "does not count"
            where = f"stage {stage} of replica {replica} for {_many('store', stores)}"
            return f"{fate} what clock {clock} has gathered on {where}"
        case actions.Wake(_, at):
            return f"waits until {at:g} s at most"
        case actions.Fail(run, error):
            return f"cannot go on with run {run}: {error}"
        case actions.Open():
            return "makes ready what it runs"
        case actions.Close(run):
            return f"stops run {run}"
        case driver.SendStore(store, to):
            return f"sends store {store} to {', '.join(to)}"
        case driver.SendSource():
            return "sends the source"
        case driver.SendBuffers():
            return "sends the buffers of a snapshot"
        case snapshot.Save(stopped):
            return f"saves a snapshot before clock {max(stopped.clocks)}"
        case actions.Export():
            return "tells what it keeps between steps"
        case driver.LeaveOut(worker):
            return f"goes on without {worker}"
        case driver.Over():
            return "has all: the fit is over"
        case driver.Feed(replica, item):
            return f"feeds item {item.sequence} to replica {replica}"
        case driver.Keep(store):
            return f"keeps the final value of store {store}"
        case _:
            return _wants_of_store(action)


def _wants_of_store(action: actions.Action | driver.Action) -> str:
    match action:
        case actions.Show(store, version):
            return f"reads version {version} of store {store} from now on"
        case actions.Load(store):
            return f"holds store {store}"
        case actions.Apply(store, version, contributions):
            weights = ", ".join(f"{factor:g}" for _, factor in contributions)
            return f"makes version {version} of store {store} from {len(contributions)} contributions × {weights}"
        case actions.Couple(_, clock, _, stores, _, _, ()):
            return f"updates {_many('store', stores)} with the values that are shared at clock {clock}"
        case actions.Couple(_, clock, number, stores, _, _, to):
            return f"shares values of {_many('store', stores)} in round {number} of clock {clock} with {', '.join(to)}"
        case actions.Uncouple(stores):
            return f"does not update {_many('store', stores)}"
        case actions.Forward(to, messages, contributions):
            store, clock = messages[0].store, messages[0].clock
            whom = ", ".join(dict.fromkeys(to))
            return f"sends {whom} the sum of {len(contributions)} contributions to store {store} at clock {clock}"
        case actions.CountSum(leader, clock, counts, stores):
            fate = "counts" if counts else "does not count"
            return f"{fate} the sum of the site of replica {leader} at clock {clock} for {_many('store', stores)}"
        case actions.PassOn(to, message):
            return f"passes on to {', '.join(to)}: {said(message)}"
        case actions.Publish(store, version, floor, value, to):
            if not value:
                return f"tells {', '.join(to)}: store {store} is {_floor(floor)}"
            return f"publishes version {version} of store {store}, {_floor(floor)}, to {', '.join(to)}"
        case actions.Return(store, version, value):
            return f"has finished store {store} at version {version}{'' if value else ', a copy'}"
        case actions.Release():
            return "forgets what came"
        case _:
            return type(action).__name__


def _floor(floor: int) -> str:
    return "waiting for no replica" if floor == RETIRED else f"complete before clock {floor}"


def _held(clock: int) -> str:
    """What a Hold before a clock says."""
    return {0: "stop now", RETIRED: "run to the end", snapshot.AT_END: "stop at their end"}.get(
        clock, f"stop before clock {clock}"
    )


def _many(noun: str, numbers: Iterable[int]) -> str:
    numbers = tuple(numbers)
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _items(items: Iterable[wire.Item]) -> str:
    return _many("item", (i.sequence for i in items))
