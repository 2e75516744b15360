"""Holds the leaves of the model's state that stay on one stage of one replica, between the microbatches of a fit.

A microbatch takes the values that the one before it has left. A step that ends adopts those of the last microbatch
that counts in it; a step that is abandoned leaves no trace. Both clocks use this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flowml.plan import Training
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, JaxDevice
from flowml_runtime.execution.services import host_view
from flowml_runtime.worker.training.finite import all_finite
from flowml_runtime.worker.training.resident import Arrays, Resident, of_stage, row, row_of
from flowml_runtime.worker.training.run import Run

Adopt = Callable[[Sequence[Array]], Sequence[Array]]
"""Brings arrays to the device of a stage."""


class ModelState:
    """The leaves of one stage. The thread that runs its steps uses them, and no other until it has stopped."""

    def __init__(self, training: Training, stage: int, *, refuses: bool) -> None:
        """`refuses` says that a step adopts no values with NaN or infinity in place of finite ones."""
        leaves = [leaf for leaf in training.state if leaf.stage == stage]
        self.specs = tuple(leaf.spec for leaf in leaves)
        self._feeds = {leaf.feed: i for i, leaf in enumerate(leaves)}
        self._fetches = {leaf.fetch: i for i, leaf in enumerate(leaves)}
        self._refuses = refuses
        self._values: tuple[Array, ...] = ()
        """After the last step that has ended."""
        self._newest: list[Array] = []
        self._left: dict[int, dict[int, Array]] = {}
        """What each microbatch of this step has left, by microbatch and leaf."""

    @property
    def values(self) -> tuple[Array, ...]:
        return self._values

    def begin(self, values: Sequence[Array] | None = None) -> None:
        """A step begins; the first one with these values."""
        if values is not None:
            self._values = tuple(values)
        self._newest, self._left = list(self._values), {}

    def export(self) -> Arrays:
        """What a snapshot keeps."""
        return row("leaf", self._values)

    def restore(self, arrays: Arrays, adopt: Adopt) -> None:
        self._values = tuple(adopt(row_of(arrays, "leaf")))

    def feed(self, slots: Sequence[int]) -> dict[int, Array]:
        """The values in those of the feed slots that are leaves of state."""
        return {s: self._newest[self._feeds[s]] for s in slots if s in self._feeds}

    def fetch(self, slot: int, microbatch: int, value: Array) -> bool:
        """Keep the new value of a leaf. False if the fetch slot is none."""
        if slot not in self._fetches:
            return False
        leaf = self._fetches[slot]
        self._newest[leaf] = self._left.setdefault(microbatch, {})[leaf] = value
        return True

    def end(self, used: int) -> None:
        """A step ends, of whose microbatches the first `used` count."""
        left = self._left.get(used - 1, {})
        new = tuple(left.get(i, value) for i, value in enumerate(self._values))
        if not self._refuses or all_finite(new) or not all_finite(self._values):
            self._values = new
        self._newest, self._left = [], {}


class HostedModel(ModelState):
    """The leaves of a stage on a real worker, which come from the driver and go back to it."""

    def __init__(self, run: Run, at: tuple[int, int], adopt: Adopt, device: JaxDevice) -> None:
        super().__init__(run.training, at[1], refuses=run.start.on_nonfinite == "refuse")
        self._run = run
        self._at = at
        self._adopt = adopt
        self._device = device
        if self.specs:
            owner = of_stage(*at, "model", "state")
            run.residents.add(Resident(owner, self.export, partial(self.restore, adopt=adopt)))

    def start(self, step: int, in_vain: Callable[[], bool]) -> None:
        """A step begins. The first one waits for the driver, unless a snapshot was restored."""
        first: Sequence[Array] | None = None
        if self.specs and not self.values:
            run = self._run
            with run.changed:
                run.wait_for(lambda: self._at in run.model, in_vain, "the model's state from the driver", step)
                first = self._adopt(run.model[self._at])
        self.begin(first)

    def send(self, cause: int) -> None:
        """Send the driver the state, after the last step."""
        run, (replica, stage) = self._run, self._at
        ids: dict[str, Any] = {"plan_id": run.plan_id, "run": run.number, "cause": cause}
        message = wire.ModelState(**ids, replica=replica, stage=stage, specs=self.specs)
        run.send(run.driver, message, host_view(self.values or run.model[self._at], self._device))
