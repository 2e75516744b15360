"""What stays on the workers in one call: checks the inputs that are there, and makes the handles of the outputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from flowml.devices import Device
from flowml_runtime.driver.call_io import signature
from flowml_runtime.driver.holdings import Holdings
from flowml_runtime.driver.lineage import Lineage, Mark, Parent, inherited
from flowml_runtime.driver.loaded_plan import LoadedPlan, check_donations
from flowml_runtime.driver.remote import Kind, Remote, lineages, number_of
from flowml_runtime.execution.programs import Array


def outputs(
    handle: LoadedPlan, buffers: Sequence[Any], held: Holdings, devices: Sequence[Device]
) -> tuple[list[Remote], int]:
    """Check the inputs that stay on workers, and make the handles of the outputs that will: they, and the number of
    the first."""
    remotes = [b for b in buffers if type(b) is Remote]
    Remote.check_all(remotes, held)
    if handle.overwrites and remotes:
        twice = check_donations(handle, buffers)
        if twice:
            raise ValueError(twice)
    if not handle.kinds:
        return [], 0
    call = f"a call of {handle.plan.name}"
    held.check_room(handle.growth(buffers), devices, call)
    batch = held.batch(handle.kinds, call, handle.kept_bytes)
    batch.lineage = _lineage(handle, handle.kinds, buffers)
    return batch.handles(), batch.first


def results(
    handle: LoadedPlan,
    buffers: Sequence[Any],
    kept: Sequence[Remote],
    held: Holdings,
    devices: Sequence[Device],
    fetched: Sequence[Array],
) -> list[Any]:
    """The flat results of a call. Constants that shall stay on a worker are brought to one."""
    flat = handle.restore(fetched, buffers, kept)
    if handle.brought:
        device = handle.plan.devices[0] if handle.plan.devices else devices[0].name
        left = [handle.plan.outputs[p] for p in handle.brought]
        kinds = [Kind(o.spec, device, o.name) for o in left]
        batch = held.bring([flat[p] for p in handle.brought], kinds, f"a call of {handle.plan.name}")
        batch.lineage = kept[0].lineage if kept else _lineage(handle, kinds, buffers)
        brought = batch.handles()
        for position, remote in zip(handle.brought, brought, strict=True):
            flat[position] = remote
    return flat


def _lineage(handle: LoadedPlan, kinds: Sequence[Kind], buffers: Sequence[Any]) -> Lineage:
    """That of the outputs of a call."""
    remotes = [b for b in buffers if type(b) is Remote]
    given = lineages(remotes)
    if any(parent.mark is not None for parent in given):  # the first call after a save
        for remote in remotes:
            if remote.lineage.mark is not None:
                remote.lineage.mark.readers[handle.maker, remote.number] = None
    parents = parents_of(remotes) if any(parent.elements for parent in given) else given
    line = inherited(
        parents, handle.maker, lambda: frozenset(signature(b)[:2] for b in buffers if type(b) is not Remote)
    )
    if line and any(parent.maker == handle.maker for parent in given):
        line -= _rearranged(remotes, handle.maker)
    return Lineage(kinds, handle.maker, line)


def parents_of(remotes: Sequence[Remote]) -> list[Parent]:
    """What these come from, by the elements in which they were saved."""
    return list({remote.lineage.elements.get(remote.number, remote.lineage) for remote in remotes})


def _rearranged(remotes: Sequence[Remote], maker: Hashable) -> frozenset[Mark]:
    """The marks of outputs of an earlier call of the same function that it gets in another order than it has returned
    them in. Then nothing tells whether an output comes from the saved one of its name, or from another of its type with
    which the caller has exchanged it."""
    numbers = list(map(number_of, remotes))
    if numbers == sorted(numbers):  # nearly always
        return frozenset()
    found = frozenset[Mark]()
    newest: dict[tuple[Any, ...], int] = {}
    for remote, number in zip(remotes, numbers, strict=True):
        lineage = remote.lineage
        if lineage.maker != maker:
            continue
        at = lineage, remote.kind.signature[:2]
        if number < newest.get(at, number):
            found |= lineage.line
        newest[at] = number
    return found
