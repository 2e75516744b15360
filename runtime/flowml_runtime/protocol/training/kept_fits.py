"""Decides what a worker keeps of fits for the case that their driver dies, and which driver may go on with one.

Each worker has a machine of its own. A snapshot has a *key*. A worker keeps its part of two at most:

    complete   the newest snapshot of which the driver has said that all workers have their parts
    begun      the one that the workers tell the driver now

So what is complete somewhere is there everywhere: a part is dropped only when this worker knows that a later snapshot
is complete, or that the one before it was given up.

    no driver --Claim--> owned --DriverLost, Released--> orphaned --Claim--> owned by another
                                                         orphaned --Tick after `orphan_s`--> nothing is kept

* A fit has one driver. Another that claims it is told which one has it. Only the loss of a driver, which the whole
  cluster sees, makes room for the next: a driver that was suspended and lost is refused from then on, as all lost peers
  are. A driver lost earlier does not come back, because the name of a driver is never used again.
* What another peer than the driver of a fit exports or completes is dropped.
* Of orphaned fits the newest `MOST_ORPHANS` are kept, and each for `orphan_s` seconds. If that is 0, none are.

The caller stores the arrays before it gives the event, and frees those that a Drop names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowml_runtime.protocol.errors import ProtocolError

MOST_ORPHANS = 2
MOST_LOST = 4


def key_of(plan_id: str, run: int, number: int) -> str:
    """The key of a snapshot, from its plan, its run and the number of its Hold."""
    return f"{plan_id}/{run}/{number}"


@dataclass(frozen=True)
class Claim:
    """A driver wants to train a fit."""

    driver: str
    fit: str
    number: int


@dataclass(frozen=True)
class Exported:
    """Buffers of a part of snapshot `key` are here."""

    driver: str
    fit: str
    key: str


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


Event = Claim | Exported | Completed | Released | DriverLost | Tick


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
class Wake:
    """Give a Tick at this time."""

    at: float


Action = Answer | Drop | Wake


@dataclass
class _Fit:
    driver: str
    """"" if it is orphaned."""
    until: float = 0.0
    """When an orphaned one is dropped."""
    complete: str = ""
    begun: str = ""
    lost: tuple[str, ...] = ()
    """The drivers that had it and were lost, the newest `MOST_LOST`."""

    @property
    def keys(self) -> list[str]:
        return [key for key in dict.fromkeys((self.complete, self.begun)) if key]


@dataclass
class KeptFits:
    """The machine of one worker. Times are in seconds, and never go back."""

    orphan_s: float
    _fits: dict[str, _Fit] = field(default_factory=dict[str, _Fit])

    def step(self, event: Event, now: float) -> list[Action]:
        """Process one event."""
        match event:
            case Claim():
                return self._claim(event)
            case Exported(driver, fit, key):
                return self._exported(self._of(driver, fit), fit, key)
            case Completed(driver, fit, key):
                return self._completed(self._of(driver, fit), fit, key)
            case Released(driver, fit, over):
                if self._of(driver, fit) is None:
                    return []
                return self._drop(fit) if over else self._orphan(fit, now)
            case DriverLost(driver):
                return self._lose(driver, now)
            case Tick():
                over = [n for n, fit in self._fits.items() if not fit.driver and fit.until <= now]
                return [*(a for name in over for a in self._drop(name)), *self._wakes()]

    def keys(self, fit: str) -> tuple[str, list[str]]:
        """The snapshot of a fit that is known to be complete, and all of which parts are kept."""
        found = self._fits.get(fit)
        return (found.complete, found.keys) if found is not None else ("", [])

    def validate(self) -> None:
        """Raises ProtocolError if an invariant does not hold."""
        orphans = [name for name, fit in self._fits.items() if not fit.driver]
        if len(orphans) > (MOST_ORPHANS if self.orphan_s else 0):
            raise ProtocolError(f"{len(orphans)} fits without a driver are kept: {orphans}")

    def _of(self, driver: str, fit: str) -> _Fit | None:
        """The fit, if it is that driver's."""
        found = self._fits.get(fit)
        return found if found is not None and found.driver == driver else None

    def _claim(self, claim: Claim) -> list[Action]:
        fit = self._fits.setdefault(claim.fit, _Fit(claim.driver))
        if not fit.driver:
            fit.driver = claim.driver
        owner = "" if fit.driver == claim.driver else fit.driver
        return [Answer(claim.driver, claim.fit, claim.number, owner, fit.lost)]

    def _exported(self, fit: _Fit | None, name: str, key: str) -> list[Action]:
        if fit is None:
            return [Drop(name, key)]
        if key in fit.keys:
            return []
        before, fit.begun = fit.begun, key
        return [Drop(name, before)] if before and before != fit.complete else []

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
        if not self.orphan_s or not fit.keys:
            return [Drop(name, key) for key in fit.keys]
        fit.driver, fit.until = "", now + self.orphan_s
        self._fits[name] = fit  # as the newest
        orphans = [n for n, f in self._fits.items() if not f.driver]
        return [*(a for old in orphans[:-MOST_ORPHANS] for a in self._drop(old)), *self._wakes()]

    def _drop(self, name: str) -> list[Action]:
        return [Drop(name, key) for key in self._fits.pop(name).keys]

    def _wakes(self) -> list[Action]:
        times = [fit.until for fit in self._fits.values() if not fit.driver]
        return [Wake(min(times))] if times else []
