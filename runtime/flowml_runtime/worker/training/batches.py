"""Holds the data of one stage: the shipped source of a fit, or the fed batches that have not been used yet, and the
programs for their shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowml.training.pieces import Piece
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.step_program import StepProgram, prepare
from flowml_runtime.worker.training.examples import Fed, of_batch, of_source
from flowml_runtime.worker.training.run import Run


class Batches:
    """The examples of the steps of one stage. A step waits here for its data."""

    def __init__(self, run: Run, device: str, in_vain: Callable[[], bool]) -> None:
        """`in_vain()` is true when the step that waits is no longer needed."""
        self._run = run
        self._device = device
        self._in_vain = in_vain
        self._fed: Fed[tuple[str, dict[int, Array]]] = Fed(ahead=run.training.speculation is not None)
        """The variant and the leaves of each."""
        self._leaves: dict[int, Array] = {}
        """Those of the step that has begun."""

    def fed(self, item: wire.Item) -> bool:
        """Whether the driver sends the examples of a work item. Of an array source it sends only short items."""
        return self._run.start.source == "fed" or item.size != self._run.training.item_size

    def give(self, batch: wire.Batch, arrays: Sequence[Array]) -> None:
        """Store the leaves of a work item."""
        leaves = dict(zip(batch.slots, arrays, strict=True))
        self._fed.give(batch.device, batch.sequence, (batch.variant, leaves))
        self._run.changed.notify_all()

    def wait(self, item: wire.Item, step: int) -> str:
        """The variant of a fed work item, once it is here."""
        with self._run.changed:
            what = f"work item {item.sequence} from the driver"
            self._run.wait_for(lambda: self._fed.has(self._device, item.sequence), self._in_vain, what, step)
            found = self._fed.take(self._device, item.sequence)
        assert found is not None
        variant, self._leaves = found
        return variant

    def examples(
        self, item: wire.Item, slots: Sequence[int], microbatch: int, piece: Piece, step: int
    ) -> dict[int, Array]:
        """The examples of a microbatch of a work item, by slot."""
        run, start = self._run, self._run.start
        if not self.fed(item):
            with run.changed:
                run.wait_for(lambda: all(s in run.source for s in slots), self._in_vain, "the data source", step)
            return of_source(start, run.source, slots, item.epoch, piece)
        return of_batch(self._leaves, slots, microbatch, piece)


class Variants:
    """The programs of a stage for batches of several shapes. One of them is bound; the first is that of the fit."""

    def __init__(
        self, first: LoadedProgram, find: Callable[[str], LoadedProgram], bind: Callable[[LoadedProgram], None]
    ) -> None:
        self._found = {"": (first, prepare(first))}
        self._find = find
        self._bind = bind
        self._bound = ""

    @property
    def program(self) -> StepProgram:
        return self._found[self._bound][1]

    def use(self, variant: str) -> None:
        """Bind a variant. The step before has flushed the outbox."""
        if variant == self._bound:
            return
        if variant not in self._found:
            loaded = self._find(variant)
            self._found[variant] = loaded, prepare(loaded)
        self._bind(self._found[variant][0])
        self._bound = variant
