"""`flowml doctor` reports on this machine. It measures what it can, and looks the rest up.

A report is a stream of facts. Each is printed as soon as it is known, so that the output also shows progress. `--json`
collects the same facts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import flowml
from flowml_runtime.environment.streams import on_terminal

SUMMARY = "what this machine has, measured: cores, memory, links, versions"
DESCRIPTION = "Measure what matters to flowml on this machine. Takes a few seconds; only the links are remembered."
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "grpcio", "msgspec")
FEW_FILES = 1024
LITTLE_SHARED_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class Fact:
    """One line of the report. `--json` writes `value`, in SI units; the printed report shows `text`."""

    section: str
    name: str
    value: object
    text: str
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object; rates are in bytes/s, times in s")


def main(arguments: argparse.Namespace) -> int:
    facts = _collect() if arguments.json else list(_print(_facts()))
    if arguments.json:
        print(json.dumps(_nested(facts), indent=2))
    return 0


def _facts() -> Iterator[Fact]:
    yield from _versions()
    yield from _machine()
    yield from _devices()
    yield from _links()
    yield from _programs()


def _print(facts: Iterator[Fact]) -> Iterator[Fact]:
    section = ""
    advice: list[str] = []
    for fact in facts:
        if fact.section != section:
            section = fact.section
            print(section)
        print(f"  {fact.name:<18}{fact.text}", flush=True)
        if fact.advice:
            advice.append(fact.advice)
        yield fact
    for line in advice:
        print(f"advice: {line}")


def _collect() -> list[Fact]:
    facts: list[Fact] = []
    for fact in _facts():
        facts.append(fact)
        if on_terminal():
            print(f"\r\033[K{fact.section}: {fact.name}", end="", file=sys.stderr, flush=True)
    if on_terminal():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return facts


def _nested(facts: list[Fact]) -> dict[str, object]:
    sections: dict[str, dict[str, object]] = {}
    for fact in facts:
        sections.setdefault(fact.section, {})[fact.name] = fact.value
    return {**sections, "advice": [f.advice for f in facts if f.advice]}


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "flowml", flowml.__version__, f"{flowml.__version__} ({Path(flowml.__file__).parent})")
    yield Fact("versions", "python", platform.python_version(), f"{platform.python_version()} ({sys.executable})")
    for package in PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Fact("versions", package, None, "not installed as a package")
        else:
            yield Fact("versions", package, version, version)


def _machine() -> Iterator[Fact]:
    import psutil

    from flowml_runtime.environment.machine import cores, memory_bytes

    yield Fact("machine", "system", platform.platform(), platform.platform())
    count = os.cpu_count() or 1
    yield Fact("machine", "cores", count, str(count))
    usable = cores()
    yield Fact("machine", "usable cores", len(usable), f"{len(usable)} (numbers {', '.join(map(str, usable))})")
    quota = _cpu_quota()
    if quota is not None:
        slow = f"the container gives {quota:g} cores' worth of time; --workers {max(1, int(quota))} fits it"
        yield Fact("machine", "cpu quota", quota, f"{quota:g} cores", slow if quota < len(usable) else "")
    memory = psutil.virtual_memory()
    yield Fact("machine", "memory", memory.total, _size(memory.total))
    yield Fact("machine", "available memory", memory.available, _size(memory.available))
    limit = memory_bytes()
    if limit < memory.total:
        yield Fact("machine", "memory limit", limit, f"{_size(limit)} (container)")
    yield from _shared_memory()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = "raise the limit of open files (ulimit -n 4096) before you start many workers"
    yield Fact("machine", "open files", files, str(files), few if files < FEW_FILES else "")


def _shared_memory() -> Iterator[Fact]:
    if not Path("/dev/shm").is_dir():
        return
    free = shutil.disk_usage("/dev/shm").free
    little = f"/dev/shm has {_size(free)} free; in a container, start it with a larger --shm-size"
    yield Fact("machine", "shared memory", free, f"{_size(free)} free", little if free < LITTLE_SHARED_MEMORY else "")


def _cpu_quota() -> float | None:
    """How many cores' worth of time the container may use; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # no cgroup, or "max"
        return None


def _devices() -> Iterator[Fact]:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        yield Fact("devices", "jax", None, f"none: {reason}", "JAX finds no device; try JAX_PLATFORMS=cpu")
        return
    for device in devices:
        yield Fact("devices", f"{device.platform}:{device.id}", device.device_kind, device.device_kind)


def _links() -> Iterator[Fact]:
    from flowml_tools import measure

    rate = measure.memcpy()
    yield Fact("links", "memcpy", {"bytes_per_s": rate}, _rate(rate))
    for name, link in measure.LINKS.items():
        try:
            speed = link()
        except measure.Unmeasured as error:
            yield Fact("links", name, None, f"failed: {error}", "something keeps processes from talking over 127.0.0.1")
            continue
        value = {"bytes_per_s": speed.bytes_per_s, "round_trip_s": speed.round_trip_s}
        yield Fact("links", name, value, f"{_rate(speed.bytes_per_s)}, round trip {speed.round_trip_s * 1e6:.0f} µs")


def _programs() -> Iterator[Fact]:
    dot = shutil.which("dot")
    if dot is None:
        missing = "not found; only .dot files need it (apt install graphviz), SVG and HTML do not"
        yield Fact("programs", "dot", None, missing)
        return
    version = _version_of(dot)
    yield Fact("programs", "dot", version, f"{version} ({dot})")


def _version_of(dot: str) -> str:
    try:
        return subprocess.run([dot, "-V"], capture_output=True, text=True, check=False, timeout=10).stderr.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run: {error}"


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
