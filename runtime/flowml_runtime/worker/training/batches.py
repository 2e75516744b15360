"""Holds the data of one stage: the shipped source of a fit, or the fed batches that have not been used yet, and the
programs for their shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from flowml.training.pieces import Piece
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, LoadedProgram
from flowml_runtime.execution.step_program import StepProgram, prepare
from flowml_runtime.worker.training.examples import of_batch, of_source
from flowml_runtime.worker.training.run import Run


class Batches:
    """The examples of the steps of one stage. A step waits here for its data."""

    def __init__(self, run: Run, in_vain: Callable[[], bool]) -> None:
        """`in_vain()` is true when the step that waits is no longer needed."""
        self._run = run
        self._in_vain = in_vain
        self._fed: OrderedDict[int, tuple[str, dict[int, Array]]] = OrderedDict()
        """By work item the variant, and the leaves."""

    def fed(self, item: wire.Item) -> bool:
        """Whether the driver sends the examples of a work item. Of an array source it sends only short items."""
        return self._run.start.source == "fed" or item.size != self._run.training.item_size

    def give(self, batch: wire.Batch, arrays: Sequence[Array]) -> None:
        """Store the leaves of a work item. Work items arrive in the order of grants, which is the order of clocks."""
        self._fed.pop(batch.sequence, None)  # the work item was given back and granted again
        self._fed[batch.sequence] = batch.variant, dict(zip(batch.slots, arrays, strict=True))
        self._run.changed.notify_all()

    def wait(self, item: wire.Item, step: int) -> str:
        """The variant of a fed work item, once it is here. Batches before it are of clocks that are over or skipped."""
        with self._run.changed:
            what = f"work item {item.sequence} from the driver"
            self._run.wait_for(lambda: item.sequence in self._fed, self._in_vain, what, step)
            ahead = self._run.training.speculation is not None  # a portion of the next batch may be held meanwhile
            for before in list(self._fed)[: list(self._fed).index(item.sequence)]:
                if not ahead or before < item.sequence:
                    del self._fed[before]
            return self._fed[item.sequence][0]

    def examples(
        self, item: wire.Item, slots: Sequence[int], microbatch: int, piece: Piece, step: int
    ) -> dict[int, Array]:
        """The examples of a microbatch of a work item, by slot."""
        run, start = self._run, self._run.start
        if not self.fed(item):
            with run.changed:
                run.wait_for(lambda: all(s in run.source for s in slots), self._in_vain, "the data source", step)
            return of_source(start, run.source, slots, item.epoch, piece)
        with run.changed:
            _, batch = self._fed[item.sequence]
        return of_batch(batch, slots, microbatch, piece)


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
