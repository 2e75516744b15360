"""Defines devices, which run the nodes of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from sys import intern

from flowml.errors import PlacementError


@dataclass(frozen=True)
class Device:
    """A device of a worker, which runs nodes.

    Attributes:
        name: such as `"worker:1/cpu:0"`.
        platform: the JAX platform.
        memory_bytes: memory in bytes; None if unknown.
        flops_per_s: rate of computation in flop/s.
        bytes_per_s: rate of memory access in bytes/s.
        dispatch_s: seconds to start a task.
        python: whether its worker runs Python functions that a program calls.

    The defaults are typical of one CPU core. A cluster replaces them by what it measured.
    """

    name: str
    platform: str = "cpu"
    memory_bytes: int | None = None
    flops_per_s: float = 2e10
    bytes_per_s: float = 5e9
    dispatch_s: float = 2e-5
    python: bool = True

    @property
    def worker(self) -> str:
        return worker_of(self.name)

    def __str__(self) -> str:
        return self.name


def worker_of(device: str) -> str:
    """The name of a device's worker: one string for all its devices, which thousands of places keep."""
    return intern(device.split("/", 1)[0])


def as_devices(devices: Iterable[Device | str]) -> tuple[Device, ...]:
    """Devices from names: `"worker:0"` stands for `"worker:0/cpu:0"`.

    Raises PlacementError if there are no devices, one is given twice, or something else is given.
    """
    if isinstance(devices, str) or not isinstance(devices, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PlacementError(f"devices={devices!r} is not a list of devices; give one such as ['worker:0', 'worker:1']")
    devices = tuple(devices)
    for device in devices:
        if not isinstance(device, Device | str) or not device:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PlacementError(f"devices names {device!r}, which is no device; give names such as 'worker:0'")
    found = tuple(d if isinstance(d, Device) else Device(_full(d)) for d in devices)
    if not found:
        raise PlacementError("no devices given; name at least one, e.g. devices=['worker:0']")
    names = [d.name for d in found]
    twice = [n for n, times in Counter(names).items() if times > 1]
    if twice:
        raise PlacementError(f"device {sorted(twice)[0]!r} is given twice; name each device once")
    return found


def _full(name: str) -> str:
    return name if "/" in name else f"{name}/cpu:0"


def platforms_of(devices: Iterable[Device]) -> tuple[str, ...]:
    """The platforms to lower for, by the names with which JAX lowers."""
    return tuple(dict.fromkeys("cuda" if d.platform == "gpu" else d.platform for d in devices))


def find_device(name: str, devices: Sequence[Device], asked_by: str) -> Device:
    """The device called `name`; a worker's name alone means its first device. Raises PlacementError if unknown."""
    for device in devices:
        if name in (device.name, device.worker):
            return device
    known = ", ".join(d.name for d in devices)
    raise PlacementError(
        f"{asked_by} names device {name!r}, which does not exist; there are: {known}", worker=worker_of(name)
    )
