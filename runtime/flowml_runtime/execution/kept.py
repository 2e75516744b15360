"""Holds the values that stay on a worker between the calls of its drivers.

    feed of a step    opens a cell for each output that the step keeps, and finds the cells of the inputs that it reads
    Keep              fills a cell
    Feed              takes the value of a cell, or parks the step until it is filled
    Drop              forgets a cell; steps that were fed with it still have it

A cell is opened before its value is made, so a step may be fed before the step that makes its inputs has run. A step
that overwrites a value waits until the steps that were fed with it before have ended. A value that was put here and
that no step has read has no cell: a loop may leave ten thousand small values, and take each of them once.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType

from flowml.errors import FlowmlError, WorkerLostError
from flowml_runtime.execution.mailbox import Claim, Scope
from flowml_runtime.execution.programs import Array

_NO_VALUE = re.compile(r"(?:the )?input.*? has no value: ")


class NotMadeError(FlowmlError):
    """A kept value does not exist, because the step that should have made it failed or its driver freed it."""


class Cell:
    """A kept value, or the place for one. `Kept` guards it.

    A step opens one for each output, so a cell begins with the values of its class: making one calls no Python.
    """

    value: Array = None
    error: str = ""
    """Why there will be no value: the first cause, if the step lacked an input for the same reason."""
    lost: str = ""
    """The worker whose loss is the cause."""
    readers: int = 0
    """The steps that were fed with it and have not ended."""
    waiting: tuple[tuple[Claim, bool], ...] = ()
    """Claims, and whether each is of a step that overwrites the value."""

    @staticmethod
    def of(value: Array = None, error: str = "") -> Cell:
        cell = Cell()
        cell.value, cell.error = value, error
        return cell

    def free(self, *, sole: bool) -> bool:
        """Whether a step can take the value at once; `sole`: and overwrite it."""
        return self.value is not None and not self.error and not (sole and self.readers)

    def ready(self, *, sole: bool) -> bool:
        """Whether a step can take it; `sole`: and overwrite it."""
        return bool(self.error) or (self.value is not None and (not sole or self.readers == 1))

    def why(self, name: str) -> FlowmlError:
        """The error of a step whose input `name` this is."""
        if self.lost:
            return WorkerLostError(self.error, worker=self.lost)
        return NotMadeError(f"{f'input {name!r}' if name else 'the input'} has no value: {self.error}")


class Kept:
    """The kept values of one worker. A driver names its values by numbers. Safe to use from any thread; never waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[str, dict[int, Cell | Array]] = {}
        self._making: dict[Scope, dict[int, Cell]] = {}
        """The outputs that steps were fed for and have not made, by slot."""
        self._causes: dict[Scope, tuple[str, str]] = {}
        """Why the driver has cancelled a step of these, and the worker whose loss is the cause."""

    def put(self, driver: str, names: Sequence[int], values: Sequence[Array]) -> None:
        """Keep values that the driver sent."""
        with self._lock:
            self._cells.setdefault(driver, {}).update(zip(names, values, strict=True))

    def open(self, driver: str, scope: Scope, first: int, slots: Iterable[int]) -> None:
        """A step was fed: its outputs `slots` will be named `first` + slot."""
        making = {slot: Cell() for slot in slots}
        if not making:
            return
        with self._lock:
            self._making[scope] = making
            self._cells.setdefault(driver, {}).update(zip([first + s for s in making], making.values(), strict=True))

    def find(self, driver: str, names: Sequence[int], last: Iterable[int] = ()) -> list[Cell]:
        """The cells of these names, for a step that is fed. `leave` them when it ends.

        The names in `last` are forgotten, because the step takes their values away from the driver.
        """
        with self._lock:
            mine = self._cells.get(driver, {})
            cells = [_cell(mine, name) for name in names]
            for cell in cells:
                cell.readers += 1
            for name in last:
                mine.pop(name, None)
            return cells

    def take(
        self, driver: str, names: Sequence[int], sole: Sequence[bool], last: Sequence[int]
    ) -> list[Cell | Array] | None:
        """Like `find`, for a step that runs at once: None, without effect, if it would have to wait for a value.

        A step overwrites the values that are `sole`. A value without a cell that is in `last` is given as it is.
        """
        with self._lock:
            mine = self._cells.get(driver, {})
            found = list(map(mine.get, names))
            kinds = set(map(type, found))
            if NoneType in kinds:
                return None
            if Cell in kinds or len(last) < len(names):
                for cell, alone in zip(found, sole, strict=True):
                    if type(cell) is Cell and not cell.free(sole=alone):
                        return None
                gone = frozenset(last)
                found = [
                    cell if name in gone and type(cell) is not Cell else _cell(mine, name)
                    for name, cell in zip(names, found, strict=True)
                ]
                for cell in found:
                    if type(cell) is Cell:
                        cell.readers += 1
            for name in last:
                del mine[name]
            return found

    def value(self, driver: str, name: int) -> Array:
        """A value as it is now: None if it is not made, or forgotten."""
        with self._lock:
            found = self._cells.get(driver, {}).get(name)
            return value_of(found)

    def fill(self, scope: Scope, slots: Sequence[int], values: Sequence[Array]) -> None:
        """A step has made outputs. If the driver has freed one, only steps that were fed with it get it."""
        woken: list[Claim] = []
        with self._lock:
            making = self._making.get(scope, {})
            for slot, value in zip(slots, values, strict=True):
                cell = making.pop(slot, None)
                if cell is not None:
                    cell.value = value
                    if cell.waiting:
                        woken += _settled(cell)
            if not making:
                self._making.pop(scope, None)
                self._causes.pop(scope, None)
        _wake(woken)

    def explain(self, scope: Scope, error: str, lost: str) -> None:
        """The driver cancels a step because of `error`, or of a `lost` worker: so say its missing outputs later."""
        with self._lock:
            if scope in self._making:
                self._causes.setdefault(scope, (error, lost))

    def end(self, scope: Scope, error: str, lost: str = "") -> None:
        """A step has ended. The outputs that it has not made will not come, because of `error`, or what the driver has
        explained. It is the text of the loss if a worker is `lost`."""
        woken: list[Claim] = []
        with self._lock:
            error, lost = self._causes.pop(scope, (error, lost))
            for cell in self._making.pop(scope, {}).values():
                cell.error, cell.lost = _NO_VALUE.sub("", error, 1) or "the step that makes it ended early", lost
                woken += _settled(cell)
        _wake(woken)

    def abandon(self, plan_id: str) -> None:
        """A plan was unloaded: its steps make no more outputs."""
        with self._lock:
            scopes = [s for s in self._making if s[0] == plan_id]
        for scope in scopes:
            self.end(scope, "its program was unloaded")

    def leave(self, cells: Iterable[Cell]) -> None:
        """A step that was fed with these cells has ended."""
        woken: list[Claim] = []
        with self._lock:
            for cell in cells:
                cell.readers -= 1
                if cell.waiting:
                    woken += _settled(cell)
        _wake(woken)

    def claim(self, cell: Cell, *, sole: bool) -> Claim:
        """Claim a value, or the reason why there is none. With `sole` it is for a step that overwrites it."""
        claim = Claim(self._lock)
        with self._lock:
            if cell.ready(sole=sole):
                claim.settle(None)
            else:
                cell.waiting = (*cell.waiting, (claim, sole))
        return claim

    def taken(self, fed: Sequence[Array | Cell], sole: Sequence[bool]) -> list[Array] | None:
        """The inputs of a step, if all values are made and, where `sole`, no other step is still to read them."""
        with self._lock:
            for given, alone in zip(fed, sole, strict=True):
                if type(given) is Cell and (given.value is None or given.error or (alone and given.readers > 1)):
                    return None
            return [given.value if type(given) is Cell else given for given in fed]

    def expire(self, cells: Iterable[Cell], claim: Claim) -> bool:
        """End an overdue wait. False, without effect, if the claim is done or not for one of the cells."""
        with self._lock:
            for cell in cells:
                if not claim.done and any(waiting is claim for waiting, _ in cell.waiting):
                    cell.waiting = tuple(w for w in cell.waiting if w[0] is not claim)
                    claim.settle(None, cancelled=True)
                    break
            else:
                return False
        claim.wake()
        return True

    def drop(self, driver: str, names: Iterable[int]) -> None:
        """Forget cells. Steps that were fed with them keep them."""
        with self._lock:
            mine = self._cells.get(driver, {})
            for name in names:
                mine.pop(name, None)

    def forget(self, driver: str) -> None:
        """Forget everything of a driver."""
        with self._lock:
            self._cells.pop(driver, None)

    def sizes(self) -> Mapping[str, int]:
        """The number of kept values of each driver."""
        with self._lock:
            return {driver: len(cells) for driver, cells in self._cells.items() if cells}


def value_of(kept: Cell | Array) -> Array:
    """What `Kept.take` gives, as an array."""
    return kept.value if type(kept) is Cell else kept


def _cell(mine: dict[int, Cell | Array], name: int) -> Cell:
    """The cell of a name, which a value gets when the first step reads it."""
    found = mine.get(name)
    if found is None:
        return Cell.of(error="its driver has freed it")
    if type(found) is not Cell:
        found = mine[name] = Cell.of(found)
    return found


def _settled(cell: Cell) -> list[Claim]:
    """Settle the claims that can go on, and return them. The lock is held."""
    done = [claim for claim, sole in cell.waiting if cell.ready(sole=sole)]
    if done:
        cell.waiting = tuple(w for w in cell.waiting if not any(w[0] is claim for claim in done))
    for claim in done:
        claim.settle(None)
    return done


def _wake(claims: Iterable[Claim]) -> None:
    for claim in claims:
        claim.wake()


def cells_of(arrays: Iterable[Array]) -> list[Cell]:
    """The kept values among the inputs of a step."""
    return [a for a in arrays if type(a) is Cell]
