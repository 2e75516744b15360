"""Decides what a worker keeps of fits for the case that their driver dies, and which driver may go on with one.

Each worker has a machine of its own. A snapshot has a *key*. A worker keeps its part of two at most:

    complete   the newest snapshot of which the driver has said that all workers have their parts
    begun      the one that the workers tell the driver now

So what is complete somewhere is there everywhere: a part is dropped only when this worker knows that a later snapshot
is complete, or that the one before it was given up.

    no driver --Claim--> owned --DriverLost, Released--> orphaned --Claim--> owned by another
                                                         orphaned --Tick after `orphan_s`, Leave--> written
              owned by another <--Claim-- written --Written--> nothing is kept

* A fit has one driver. Another that claims it is told which one has it. Only the loss of a driver, which the whole
  cluster sees, makes room for the next: a driver that was suspended and lost is refused from then on, as all lost peers
  are. A driver lost earlier does not come back, because the name of a driver is never used again.
* What another peer than the driver of a fit exports or completes is dropped.
* A worker may keep copies of the parts of others too. Such a fit need not last: it is dropped with its driver, and the
  next snapshot tells what is complete.
* Of a fit of which nothing is kept yet, only the drivers are known that were lost: one that is suspended may have its
  directory.
* Of orphaned fits the newest `MOST_ORPHANS` are kept, and each for `orphan_s` seconds. If that is 0, none are.
* Then each worker writes its parts to the directory of the fit. It keeps them until it is told that the snapshot is
  whole there, or until it has tried `MOST_TRIES` times. So a driver that comes meanwhile finds the snapshot on the
  workers or on the disk. A worker that is to leave writes at once.

The caller stores the arrays before it gives the event, and frees those that a Drop names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowml_runtime.protocol.errors import ProtocolError

MOST_ORPHANS = 2
MOST_LOST = 4
MOST_FORGOTTEN = 16
MOST_TRIES = 2
AGAIN_S = 30.0
"""How long after it has written its parts a worker looks whether those of the others are there too."""


def key_of(plan_id: str, run: int, number: int) -> str:
    """The key of a snapshot, from its plan, its run and the number of its Hold."""
    return f"{plan_id}/{run}/{number}"


@dataclass(frozen=True)
class Claim:
    """A driver wants to train a fit, which writes into a directory, where `keep` snapshots stay."""

    driver: str
    fit: str
    number: int
    lasts: bool = True
    directory: str = ""
    keep: int = 1


@dataclass(frozen=True)
class Exported:
    """Buffers of a part of snapshot `key` are here, and all parts of `complete` are somewhere, if it is not ""."""

    driver: str
    fit: str
    key: str
    complete: str = ""


@dataclass(frozen=True)
class Completed:
    """All workers have their parts of snapshot `key`."""

    driver: str
    fit: str
    key: str


@dataclass(frozen=True)
class Released:
    """A driver does not train a fit any more. `over`: nobody will."""

    driver: str
    fit: str
    over: bool


@dataclass(frozen=True)
class DriverLost:
    driver: str


@dataclass(frozen=True)
class Tick:
    pass


@dataclass(frozen=True)
class Leave:
    """This worker is about to end."""


@dataclass(frozen=True)
class Written:
    """What a Write asks for has been done. `whole`: nothing is left to do, because all of a snapshot is on the disk."""

    fit: str
    whole: bool


Event = Claim | Exported | Completed | Released | DriverLost | Tick | Leave | Written


@dataclass(frozen=True)
class Answer:
    """Tell the driver that has claimed a fit who trains it: `owner`, or "" for itself, after those that were `lost`."""

    driver: str
    fit: str
    number: int
    owner: str
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Drop:
    """Free what is here of a snapshot."""

    fit: str
    key: str


@dataclass(frozen=True)
class Write:
    """Write what is here of these snapshots, the oldest first, into the directory of the fit, and give Written.
    `again`: it has been written, and others may have completed it. A `lost` driver may still have the directory."""

    fit: str
    keys: tuple[str, ...]
    directory: str
    keep: int
    lost: tuple[str, ...]
    again: bool


@dataclass(frozen=True)
class Wake:
    """Give a Tick at this time."""

    at: float


Action = Answer | Drop | Write | Wake


@dataclass
class _Fit:
    driver: str
    """"" if it is orphaned."""
    until: float = 0.0
    """When an orphaned one is written, or dropped."""
    tries: int = 0
    """How often it was to be written since it is orphaned."""
    writing: bool = False
    complete: str = ""
    begun: str = ""
    lost: tuple[str, ...] = ()
    """The drivers that had it and were lost, the newest `MOST_LOST`."""
    lasts: bool = True
    directory: str = ""
    keep: int = 1

    @property
    def keys(self) -> list[str]:
        return [key for key in dict.fromkeys((self.complete, self.begun)) if key]


@dataclass
class KeptFits:
    """The machine of one worker. Times are in seconds, and never go back."""

    orphan_s: float
    _fits: dict[str, _Fit] = field(default_factory=dict[str, _Fit])
    _forgotten: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """The lost drivers of fits of which nothing is kept, the newest `MOST_FORGOTTEN`."""
    _leaves: bool = False

    def step(self, event: Event, now: float) -> list[Action]:
        """Process one event."""
        match event:
            case Claim():
                return self._claim(event)
            case Exported(driver, fit, key, complete):
                return self._exported(self._of(driver, fit), fit, key, complete)
            case Completed(driver, fit, key):
                return self._completed(self._of(driver, fit), fit, key)
            case Released(driver, fit, over):
                if self._of(driver, fit) is None:
                    return []
                return self._drop(fit) if over else self._orphan(fit, now)
            case DriverLost(driver):
                return self._lose(driver, now)
            case Tick():
                return self._end_some(now)
            case Leave():
                self._leaves = True
                return self._end_some(now)
            case Written(fit, whole):
                return self._written(fit, now, whole=whole)

    def keys(self, fit: str) -> tuple[str, list[str]]:
        """The snapshot of a fit that is known to be complete, and all of which parts are kept."""
        found = self._fits.get(fit)
        return (found.complete, found.keys) if found is not None else ("", [])

    def validate(self) -> None:
        """Raises ProtocolError if an invariant does not hold."""
        most = MOST_ORPHANS if self.orphan_s else 0
        if len(self._forgotten) > MOST_FORGOTTEN:
            raise ProtocolError(f"the drivers of {len(self._forgotten)} forgotten fits are known")
        for orphans in (self._waiting(), self._in_writing()):
            if len(orphans) > most:
                raise ProtocolError(f"{len(orphans)} fits without a driver are kept: {orphans}")

    @property
    def writes(self) -> bool:
        """Whether a fit is being written."""
        return bool(self._in_writing())

    @property
    def is_driven(self) -> bool:
        """Whether a driver trains a fit that would be kept without it."""
        return bool(self.orphan_s) and any(fit.driver and fit.lasts and fit.keys for fit in self._fits.values())

    def _of(self, driver: str, fit: str) -> _Fit | None:
        """The fit, if it is that driver's."""
        found = self._fits.get(fit)
        return found if found is not None and found.driver == driver else None

    def _claim(self, claim: Claim) -> list[Action]:
        fit = self._fits.get(claim.fit)
        if fit is None:
            lost = self._forgotten.pop(claim.fit, ())
            fit = self._fits[claim.fit] = _Fit(claim.driver, lasts=claim.lasts, lost=lost)
        if not fit.driver:
            fit.driver, fit.tries, fit.writing = claim.driver, 0, False
        if fit.driver == claim.driver:
            fit.directory, fit.keep = claim.directory, claim.keep
        owner = "" if fit.driver == claim.driver else fit.driver
        return [Answer(claim.driver, claim.fit, claim.number, owner, fit.lost)]

    def _exported(self, fit: _Fit | None, name: str, key: str, complete: str) -> list[Action]:
        if fit is None:
            return [Drop(name, key)]
        known = [] if complete in ("", fit.complete) else self._completed(fit, name, complete)
        if key in fit.keys:
            return known
        before, fit.begun = fit.begun, key
        return [*known, *([Drop(name, before)] if before and before != fit.complete else [])]

    def _completed(self, fit: _Fit | None, name: str, key: str) -> list[Action]:
        if fit is None:
            return [Drop(name, key)]
        before = fit.keys
        fit.complete, fit.begun = key, ""
        return [Drop(name, old) for old in before if old != key]

    def _lose(self, driver: str, now: float) -> list[Action]:
        mine = [(name, fit) for name, fit in self._fits.items() if fit.driver == driver]
        for _, fit in mine:
            fit.lost = (*fit.lost, driver)[-MOST_LOST:]
        return [action for name, _ in mine for action in self._orphan(name, now)]

    def _orphan(self, name: str, now: float) -> list[Action]:
        fit = self._fits.pop(name)
        if not self.orphan_s or not fit.keys or not fit.lasts:
            self._forget(name, fit)
            return [Drop(name, key) for key in fit.keys]
        fit.driver, fit.until, fit.tries = "", now + self.orphan_s, 0
        self._fits[name] = fit  # as the newest
        return self._end_some(now)

    def _forget(self, name: str, fit: _Fit) -> None:
        """Keep nothing of a fit but the drivers that were lost."""
        if fit.lost:
            self._forgotten[name] = fit.lost
        for old in list(self._forgotten)[:-MOST_FORGOTTEN]:
            del self._forgotten[old]

    def _end_some(self, now: float) -> list[Action]:
        """End the orphaned fits whose time is over, and those that are too many."""
        waiting = self._waiting()
        most = 0 if self._leaves else MOST_ORPHANS
        some = [n for i, n in enumerate(waiting) if self._fits[n].until <= now or i < len(waiting) - most]
        return [*(action for name in some for action in self._end(name)), *self._wakes()]

    def _end(self, name: str) -> list[Action]:
        """No driver has come for an orphaned fit: write it, or drop it."""
        fit = self._fits[name]
        if not fit.directory or fit.tries == MOST_TRIES:
            return self._drop(name)
        fit.tries, fit.writing = fit.tries + 1, True
        write = Write(name, tuple(fit.keys), fit.directory, fit.keep, fit.lost, again=fit.tries > 1)
        late = self._in_writing()[:-MOST_ORPHANS]  # the disk is too slow for so many
        return [write, *(action for old in late for action in self._drop(old))]

    def _written(self, name: str, now: float, *, whole: bool) -> list[Action]:
        fit = self._fits.get(name)
        if fit is None or not fit.writing:  # a driver has come meanwhile
            return []
        if whole or self._leaves or fit.tries == MOST_TRIES:
            return self._drop(name)
        fit.writing, fit.until = False, now + AGAIN_S
        return self._end_some(now)

    def _waiting(self) -> list[str]:
        """The orphaned fits that are not being written, the one that is orphaned for the longest time first."""
        return [name for name, fit in self._fits.items() if not fit.driver and not fit.writing]

    def _in_writing(self) -> list[str]:
        return [name for name, fit in self._fits.items() if fit.writing]

    def _drop(self, name: str) -> list[Action]:
        return [Drop(name, key) for key in self._fits.pop(name).keys]

    def _wakes(self) -> list[Action]:
        times = [self._fits[name].until for name in self._waiting()]
        return [Wake(min(times))] if times else []
