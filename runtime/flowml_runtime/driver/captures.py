"""Brings the large arrays that programs close over to the devices that read them, each once for all programs.

A device keeps such an array under a name, like any kept value, while a loaded plan uses it: the plans hold its handle.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping

from flowml.devices import Device, worker_of
from flowml.errors import FlowmlError
from flowml.plan import ArraySpec, Plan
from flowml_runtime.driver.holdings import Holdings
from flowml_runtime.driver.remote import Kind, Remote

Captures = Mapping[tuple[str, int], Remote]
"""(device, constant of the plan) -> the array there."""


class Captured:
    """The arrays that are on the devices of one cluster. Safe to use from any thread."""

    def __init__(self, held: Holdings, is_here: Callable[[str], bool]) -> None:
        """`is_here` says whether a worker is in this process, so that it can take the caller's array itself."""
        self._held = held
        self._is_here = is_here
        self._lock = threading.Lock()
        self._known: weakref.WeakValueDictionary[tuple[str, ArraySpec, str], Remote] = weakref.WeakValueDictionary()
        """(digest, type, device) -> the array there."""

    def of(self, plan: Plan, devices: tuple[Device, ...]) -> Captures:
        """The large arrays of a plan on its devices, brought there if necessary. They stay while they are referenced.

        Raises ClusterError if a device has no room, WorkerLostError, and FlowmlError for a plan that was read from a
        file.
        """
        wanted = dict.fromkeys(
            (p.device, i) for p in plan.programs for _, i in p.constants if plan.constants[i].captured
        )
        if not wanted:
            return {}
        with self._lock:  # two programs that are loaded at once bring an array once
            return {(device, index): self._one(plan, device, index, devices) for device, index in wanted}

    def _one(self, plan: Plan, device: str, index: int, devices: tuple[Device, ...]) -> Remote:
        constant = plan.constants[index]
        captured, spec = constant.captured, constant.spec
        assert captured is not None
        key = captured.digest, spec, device
        found = self._known.get(key)
        if found is not None and found.is_usable():
            return found
        if captured.data is None:
            raise FlowmlError(
                f"plan {plan.name!r} closes over an array {spec.dtype}{list(spec.shape)} that its file does not hold; "
                "call the dataflow function, which has it"
            )
        self._held.check_room({device: spec.nbytes}, devices, f"plan {plan.name!r}")
        kind = Kind(spec, device, f"{spec.dtype}{list(spec.shape)}, closed over by {plan.name}")
        lent = self._held.lend(captured.data, kind, plan.name, whole=self._is_here(worker_of(device)))
        self._known[key] = lent
        return lent
