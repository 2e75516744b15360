"""Says which buffers live between the steps of a run, so that a snapshot holds all of them and a later run goes on.

A *resident* is what one owner keeps: named arrays, which `export` gives as plain arrays and `restore` takes back. The
owner's name says what it belongs to, and not on which worker it is:

    home/LAYER/...                        parameters, optimizer state, what decoders and public copies remember
    replica/NUMBER/stage/NUMBER/LAYER/... own parameters, sums of gradients, residuals, what neighbours have
    reader/WORKER/LAYER                   what the filters of published versions remember
    site/LEADER/LAYER/...                 what the filters of the sums of a site remember
    waiting/LAYER/...                     contributions that wait for a later clock or for others, decoded

Every object that keeps an array from one step to the next registers itself in the `Residents` of its worker's run. A
test walks all objects of a run and finds those that do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Any, TypeVar

import numpy as np

from flowml.errors import FlowmlError
from flowml.policy import filters
from flowml_runtime import wire
from flowml_runtime.execution.lane import Lane
from flowml_runtime.execution.programs import Array

Arrays = Mapping[str, Array]
K = TypeVar("K")


@dataclass(frozen=True)
class Resident:
    """The buffers of one owner. `lane` is the one whose thread changes them; without one nothing does between steps.

    With `state` they are replaced and never overwritten: what it gives is another object once they were replaced.
    """

    owner: str
    export: Callable[[], Arrays]
    restore: Callable[[Arrays], None]
    lane: Lane | None = None
    state: Callable[[], object] | None = None


@dataclass
class Residents:
    """All residents of one run on one worker."""

    found: dict[str, Resident] = field(default_factory=dict[str, Resident])

    def add(self, resident: Resident) -> None:
        if resident.owner in self.found:
            raise FlowmlError(f"two objects keep buffers as {resident.owner!r}")
        self.found[resident.owner] = resident

    def forget(self) -> None:
        """The run is over. What these refer to is freed, and not kept by a cycle through the run."""
        self.found = {}

    def restore(self, owner: str, arrays: Arrays) -> None:
        if owner not in self.found:
            raise FlowmlError(
                f"a snapshot has buffers of {owner!r}, which this run does not keep; resume with the policies, "
                "replicas and stages of the fit that wrote it"
            )
        self.found[owner].restore(arrays)


def row(name: str, values: Iterable[Any]) -> dict[str, Array]:
    """Several arrays, by the name of all and their number."""
    return {f"{name}/{i}": np.asarray(value) for i, value in enumerate(values)}


def row_of(arrays: Arrays, name: str) -> Sequence[Array]:
    """What `row` has named."""
    return [arrays[key] for key in takewhile(arrays.__contains__, (f"{name}/{i}" for i in count()))]


def number(value: int) -> Array:
    """A whole number as an array."""
    return np.asarray(value, np.int64)


def states(name: str, found: Mapping[tuple[int, ...], filters.State]) -> dict[str, Array]:
    """The buffers of filters, by what they filter."""
    return {
        f"{name}/{'.'.join(map(str, key))}/{buffer}": np.asarray(array)
        for key, state in found.items()
        for buffer, array in state.items()
    }


def states_of(arrays: Arrays, name: str) -> dict[tuple[int, ...], dict[str, Array]]:
    """What `states` has named."""
    found: dict[tuple[int, ...], dict[str, Array]] = {}
    for key, array in arrays.items():
        if key.startswith(f"{name}/"):
            where, buffer = key.removeprefix(f"{name}/").split("/", 1)
            found.setdefault(tuple(map(int, where.split("."))), {})[buffer] = np.asarray(array)
    return found


def of_stage(replica: int, stage: int, store: str, what: str) -> str:
    """The owner of what a stage keeps for a store."""
    return f"replica/{replica}/stage/{stage}/{store}/{what}"


def told_whole(owner: str) -> bool:
    """Whether the driver needs the buffers of an owner to say what a snapshot holds."""
    return owner.endswith("/model/state")


def of_site(leader: int, store: str, what: str) -> str:
    """The owner of what the leader of a site keeps for a store."""
    return f"site/{leader}/{store}/{what}"


def of_waiting(store: str, part: wire.Waiting) -> str:
    """The owner of a part of a contribution that waits."""
    of = f"site/{part.replica}" if part.of_site else f"replica/{part.replica}"
    return f"waiting/{store}/{of}/clock/{part.clock}/{part.part}"


def loaded(_: Arrays) -> None:
    """Restores nothing, because what was exported comes in another message: values of stores as their first ones,
    contributions that wait as contributions."""


def of_home(store: str, what: str) -> str:
    """The owner of what a home keeps for a store."""
    return f"home/{store}/{what}"
