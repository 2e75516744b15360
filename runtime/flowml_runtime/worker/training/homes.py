"""The stores that live on this worker: holds their values, applies and publishes as the worker's machine says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from flowml.devices import worker_of
from flowml.plan import StoreSpec
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, LoadedProgram, TaskFunction, aligned_copy, buffer_struct
from flowml_runtime.execution.services import host_view
from flowml_runtime.protocol.training.actions import Apply, Load, Publish, Return
from flowml_runtime.worker.training.run import Run


@dataclass
class _Held:
    """A store's value on device `home`: parameters and optimizer state, and what its apply task needs to be called."""

    spec: StoreSpec
    home: str
    apply: TaskFunction
    program: LoadedProgram
    params: list[Array]
    state: list[Array]
    zeros: tuple[Array, ...]


class Homes:
    """Carries out what concerns the stores of one worker in one run. Called by the machine thread only."""

    def __init__(self, run: Run, programs: Mapping[str, LoadedProgram], payloads: dict[int, Sequence[Array]]) -> None:
        self._run = run
        self._programs = programs
        self._payloads = payloads
        self._specs = run.training.stores
        self._held: dict[int, _Held] = {}

    def carry_out(self, action: Load | Apply | Publish | Return) -> None:
        match action:
            case Load():
                self._load(action)
            case Apply():
                self._apply(action)
            case Publish():
                self._publish(action)
            case Return():
                self._return(action)

    def _load(self, action: Load) -> None:
        """Take in a store's first value: parameters, then state."""
        spec, arrays = self._specs[action.store], self._payloads.pop(action.handle)
        home = next(h for h in spec.copies if worker_of(h) == self._run.me)
        program = self._programs[home]
        split = len(spec.specs)
        payload = [s for p in spec.parts for s in p.payload]
        zeros = tuple(np.zeros(b.shape, b.dtype) for b in map(buffer_struct, payload))
        self._held[action.store] = _Held(
            spec, home, program.tasks[spec.apply], program, list(arrays[:split]), list(arrays[split:]), zeros
        )

    def _apply(self, action: Apply) -> None:
        held = self._held[action.store]
        spec = held.spec
        coefficients = np.zeros(spec.arity, np.float32)
        payloads: list[Array] = []
        for i, (handles, coefficient) in enumerate(action.contributions):
            coefficients[i] = coefficient
            payloads.extend(a for h in handles for a in self._payloads.pop(h))
        for _ in range(spec.arity - len(action.contributions)):
            payloads.extend(held.zeros)
        recorder, step = self._run.recorder, self._run.step_of(action.version)
        with recorder.record(f"{held.home} home", "apply", f"store {spec.name}", step):
            results = held.apply(*held.params, *held.state, aligned_copy(coefficients), *payloads)
            if recorder.on:
                jax.block_until_ready(results)  # else its end would not be seen
        split = len(spec.specs)
        held.params, held.state = list(results[:split]), list(results[split:])

    def _publish(self, action: Publish) -> None:
        held = self._held[action.store]
        specs = held.spec.specs if action.value else ()
        values = host_view(held.params, held.program.device) if action.value else ()
        message = wire.Published(
            plan_id=self._run.plan_id,
            run=self._run.number,
            cause=action.cause,
            store=action.store,
            version=action.version,
            floor=action.floor,
            specs=specs,
        )
        for worker in action.to:
            self._run.count_publish(action.store, sum(s.nbytes for s in specs), worker)
            self._run.send(worker, message, values)

    def _return(self, action: Return) -> None:
        held = self._held[action.store]
        message = wire.StoreValue(
            plan_id=self._run.plan_id,
            run=self._run.number,
            cause=action.cause,
            store=action.store,
            version=action.version,
            specs=(*held.spec.specs, *held.spec.state_specs) if action.value else (),
        )
        values = host_view([*held.params, *held.state], held.program.device) if action.value else ()
        self._run.send(self._run.driver, message, values)
