"""The stores that live on this worker: holds their values, runs the home machine, applies and publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import jax
import numpy as np

from flowml.devices import worker_of
from flowml.plan import StoreSpec
from flowml_runtime import wire
from flowml_runtime.execution.programs import Array, LoadedProgram, TaskFunction, aligned_copy, buffer_struct
from flowml_runtime.execution.services import host_view
from flowml_runtime.protocol.training import home as protocol
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
    """Hosts the home machine of one worker for one run. Called by the run's machine thread only."""

    def __init__(self, run: Run, programs: Mapping[str, LoadedProgram]) -> None:
        self._run = run
        self._programs = programs
        self._specs = run.training.stores
        mine = [i for i, s in enumerate(self._specs) if any(worker_of(home) == run.me for home in s.copies)]
        self._machine = protocol.Home(run.terms, mine)
        self._held: dict[int, _Held] = {}
        self._payloads: dict[int, Sequence[Array]] = {}
        self._handles = count()

    def load(self, message: wire.StoreValue, arrays: Sequence[Array]) -> None:
        """Take in a store's first value: parameters, then state."""
        spec = self._specs[message.store]
        home = next(h for h in spec.copies if worker_of(h) == self._run.me)
        program = self._programs[home]
        split = len(spec.specs)
        payload = [s for p in spec.parts for s in p.payload]
        zeros = tuple(np.zeros(b.shape, b.dtype) for b in map(buffer_struct, payload))
        self._held[message.store] = _Held(
            spec, home, program.tasks[spec.apply], program, list(arrays[:split]), list(arrays[split:]), zeros
        )
        self.step(protocol.StoreLoaded(message.store, message.version))

    def receive(self, message: wire.Contribution, arrays: Sequence[Array]) -> None:
        handle = next(self._handles)
        if not message.empty:
            self._payloads[handle] = arrays
        self.step(
            protocol.ContributionReceived(
                store=message.store,
                part=message.part,
                replica=message.replica,
                incarnation=message.incarnation,
                clock=message.clock,
                base_version=message.base_version,
                weight=message.weight,
                handle=handle,
                empty=message.empty,
            )
        )

    def step(self, event: protocol.Event) -> None:
        for action in self._machine.step(event):
            match action:
                case protocol.Apply():
                    self._apply(action)
                case protocol.Publish():
                    self._publish(action)
                case protocol.SendArrived(store, replica, clock):
                    self._arrived(store, replica, clock)
                case protocol.Release(handle):
                    self._payloads.pop(handle, None)
                case protocol.Finished(store):
                    self._finish(store)

    def _apply(self, action: protocol.Apply) -> None:
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

    def _publish(self, action: protocol.Publish) -> None:
        held = self._held[action.store]
        specs = held.spec.specs if action.value else ()
        values = host_view(held.params, held.program.device) if action.value else ()
        message = wire.Published(
            plan_id=self._run.plan_id,
            run=self._run.number,
            store=action.store,
            version=action.version,
            clocks=action.clocks,
            specs=specs,
        )
        for worker in dict.fromkeys(worker_of(d) for d in held.spec.read_from((held.home,))):
            self._run.count_publish(action.store, sum(s.nbytes for s in specs), worker)
            self._run.send(worker, message, values)

    def _arrived(self, store: int, replica: int, clock: int) -> None:
        message = wire.Arrived(
            plan_id=self._run.plan_id, run=self._run.number, store=store, replica=replica, clock=clock
        )
        assert self._run.leader is not None
        self._run.send(self._run.leader, message)

    def _finish(self, store: int) -> None:
        # Seats may have retired, and told of their traffic, before the last version was published.
        self._run.send(self._run.driver, self._run.traffic())
        held = self._held[store]
        first = held.home == held.spec.home  # other copies are equal to this one
        message = wire.StoreValue(
            plan_id=self._run.plan_id,
            run=self._run.number,
            store=store,
            version=self._machine.version(store),
            specs=(*held.spec.specs, *held.spec.state_specs) if first else (),
        )
        values = host_view([*held.params, *held.state], held.program.device) if first else ()
        self._run.send(self._run.driver, message, values)
