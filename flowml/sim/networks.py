"""Models networks: how long a message from one peer to another takes, and which links its bytes share with others.

A peer is the number of a worker, or `DRIVER`. `link(a, b)` is the path of one message alone. `shared(a, b)` lists what
the message shares with all others that name the same thing: the uplink of a sender, the downlink of a receiver (where
many senders meet, which is incast), the line between two regions. A simulator divides the rate of each among the
messages that use it at the same time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from flowml.callers import warn
from flowml.errors import SimulationError, TraceError, one_line
from flowml.sim import checks, tables

DRIVER = -1
"""The peer that is the driver."""


class Link(NamedTuple):
    """The path of a message: it takes `latency_s` plus its bytes at `bytes_per_s`."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: float) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


class Shared(NamedTuple):
    """Something whose rate several messages share. Equal names are the same thing."""

    name: tuple[str | int, ...]
    bytes_per_s: float


ITSELF = Link(0.0, math.inf)
"""The path of a message from a peer to itself."""


class NetworkModel(ABC):
    """The links between peers, from 0 to the number of workers, and `DRIVER`."""

    @abstractmethod
    def link(self, a: int, b: int) -> Link:
        """The path of a message from peer a to peer b if nothing else is sent."""

    @abstractmethod
    def shared(self, a: int, b: int) -> tuple[Shared, ...]:
        """What a message from a to b shares with other messages."""

    @abstractmethod
    def check(self, workers: int) -> None:
        """Raise SimulationError if a cluster of so many workers does not fit this network."""


@dataclass(frozen=True)
class Network(NetworkModel):
    """Every pair of peers has an equal link of its own.

    Args:
        latency_s: seconds until the first byte arrives.
        bytes_per_s: rate of one message.
        uplink_bytes_per_s: rate of all messages that a peer sends at a time; None sets no such limit.
        downlink_bytes_per_s: rate of all messages that a peer receives at a time; None sets no such limit.
    """

    latency_s: float
    bytes_per_s: float
    uplink_bytes_per_s: float | None = None
    downlink_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "latency_s", checks.number("Network", "latency_s", self.latency_s))
        object.__setattr__(self, "bytes_per_s", checks.rate("Network", "bytes_per_s", self.bytes_per_s))
        for name in ("uplink_bytes_per_s", "downlink_bytes_per_s"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, checks.rate("Network", name, getattr(self, name)))

    def link(self, a: int, b: int) -> Link:
        return ITSELF if a == b else Link(self.latency_s, self.bytes_per_s)

    def shared(self, a: int, b: int) -> tuple[Shared, ...]:
        if a == b:
            return ()
        up, down = self.uplink_bytes_per_s, self.downlink_bytes_per_s
        return ((Shared(("up", a), up),) if up is not None else ()) + (
            (Shared(("down", b), down),) if down is not None else ()
        )

    def check(self, workers: int) -> None:
        return None


_MAPPING = "give a mapping {(region, region): (latency_s, bytes_per_s)}"


def _pair(what: str, value: object) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise SimulationError(f"Regions: {one_line(repr(value))} is no pair of {what}; {_MAPPING}")
    return value


Delay: TypeAlias = Literal["round trip", "one way"]


@dataclass(frozen=True)
class Regions:
    """The links between regions, by the names of two regions. A pair that is given once holds in both directions.

    Raises:
        SimulationError: for a latency or rate that makes no sense.
    """

    links: Mapping[tuple[str, str], tuple[float, float]]
    names: tuple[str, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        found: dict[tuple[str, str], Link] = {}
        if not isinstance(self.links, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"Regions: links is of type {type(self.links).__name__}; {_MAPPING}")
        for pair, link in self.links.items():
            (a, b), (latency_s, bytes_per_s) = _pair("two regions", pair), _pair("latency and rate", link)
            where = f"Regions[{a!r}, {b!r}]"
            found[a, b] = Link(
                checks.number(where, "latency_s", latency_s), checks.rate(where, "bytes_per_s", bytes_per_s)
            )
        both = {(b, a): link for (a, b), link in found.items()} | found
        object.__setattr__(self, "links", both)
        object.__setattr__(self, "names", tuple(dict.fromkeys(name for pair in found for name in pair)))

    def __repr__(self) -> str:
        return f"<Regions: {', '.join(self.names)}>"

    def link(self, a: str, b: str) -> Link | None:
        """The link from region a to region b; None if the table does not have it."""
        found = self.links.get((a, b))
        return None if found is None else Link(*found)

    @staticmethod
    def read(path: str | PathLike[str], *, delay: Delay = "round trip") -> Regions:
        """Read a CSV file with the columns `a`, `b`, `round_trip_or_delay_ms` and `gbit_per_s`.

        Published tables of this kind list what a ping shows, a round trip, of which a message takes half. With
        `delay="one way"` a message takes all of it.

        Warns if the last line does not end, because its number may be cut short.

        Raises:
            TraceError: if a line cannot be read or a pair is there twice; the text names the line and column.
        """
        return Regions.parse(tables.text_of(Path(path)), str(Path(path)), delay=delay)

    @staticmethod
    def parse(text: str, name: str = "regions", *, delay: Delay = "round trip") -> Regions:
        """Like `read`, from the text of a file that errors call `name`."""
        if delay not in ("round trip", "one way"):
            raise SimulationError(f"Regions: delay={delay!r} is neither 'round trip' nor 'one way'")
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"Regions: the text of {name} is of type {type(text).__name__}; give a str")
        columns = {
            "a": tables.word,
            "b": tables.word,
            "round_trip_or_delay_ms": tables.seconds,
            "gbit_per_s": tables.positive,
        }
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for line, row in tables.read(text, name, columns):
            pair = (row["a"], row["b"])
            if pair in found:
                raise TraceError(
                    f"{name}, line {line}, column 'b': the link of {pair[0]} and {pair[1]} is there twice; "
                    "leave one of the two lines out"
                )
            latency_s = row["round_trip_or_delay_ms"] * (5e-4 if delay == "round trip" else 1e-3)
            found[pair] = (latency_s, row["gbit_per_s"] * 1e9 / 8)
        if not text.endswith("\n"):
            warn(f"{name}: the last line does not end, so its number may be cut short; compare it, and end the line")
        return Regions(found)


@dataclass(frozen=True)
class Sites(NetworkModel):
    """Workers in regions: fast links inside a region, and those of a table between regions.

    Args:
        table: links between regions: a `Regions`, the path of its CSV file, or a mapping
            `{(region, region): (latency_s, bytes_per_s)}`.
        members: the region of each worker, in order; or a mapping from each region to how many workers it has (numbered
            in the order of the mapping).
        local: the network inside each region.
        uplink_bytes_per_s: rate of all messages that leave a region at a time; None sets no such limit.
        shared_lines: whether all messages from one region to another at a time share the rate in the table. If False
            each pair of workers has that rate, as in a table that was measured between two machines.
        driver: the region of the driver; by default that of worker 0.

    Raises:
        SimulationError: for an unknown region, a pair of regions that the table does not have, or no member.
    """

    table: Regions | str | PathLike[str] | Mapping[tuple[str, str], tuple[float, float]]
    members: Sequence[str] | Mapping[str, int]
    local: Network = field(default_factory=lambda: Network(latency_s=1e-4, bytes_per_s=1.25e9))
    uplink_bytes_per_s: float | None = None
    shared_lines: bool = False
    driver: str | None = None
    regions: Regions = field(init=False, repr=False, compare=False)
    sites: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        regions, sites = _regions(self.table), _sites(self.members)
        if not isinstance(self.local, Network):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"Sites: local={self.local!r} is not an fm.sim.Network")
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "sites", sites)
        if self.driver is None:
            object.__setattr__(self, "driver", sites[0])
        if self.uplink_bytes_per_s is not None:
            rate = checks.rate("Sites", "uplink_bytes_per_s", self.uplink_bytes_per_s)
            object.__setattr__(self, "uplink_bytes_per_s", rate)
        if not isinstance(self.driver, str):
            raise SimulationError(
                f"Sites: driver={self.driver!r} is of type {type(self.driver).__name__}; give a region"
            )
        if not isinstance(self.shared_lines, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SimulationError(f"Sites: shared_lines={self.shared_lines!r}; give True or False")
        used = dict.fromkeys([*sites, self.driver])
        for a in used:
            if a not in regions.names:
                raise SimulationError(
                    f"Sites: the table has no region {one_line(a)!r}; it has {', '.join(map(one_line, regions.names))}"
                )
        for a in used:
            for b in used:
                if a != b and regions.link(a, b) is None:
                    raise SimulationError(
                        f"Sites: the table has no link from {one_line(a)} to {one_line(b)}; add it, or "
                        "leave one of the two out of members"
                    )

    def link(self, a: int, b: int) -> Link:
        here, there = self.site(a), self.site(b)
        if here == there:
            return self.local.link(a, b)
        return Link(*self.regions.links[here, there])

    def shared(self, a: int, b: int) -> tuple[Shared, ...]:
        here, there = self.site(a), self.site(b)
        own = self.local.shared(a, b)
        if here == there:
            return own
        up = self.uplink_bytes_per_s
        site = (Shared(("up", here), up),) if up is not None else ()
        line = (Shared(("line", here, there), self.link(a, b).bytes_per_s),) if self.shared_lines else ()
        return own + site + line

    def site(self, peer: int) -> str:
        """The region of a worker or of the driver."""
        return str(self.driver) if peer == DRIVER else self.sites[peer]

    def check(self, workers: int) -> None:
        if workers != len(self.sites):
            raise SimulationError(
                f"Sites: members has {len(self.sites)} workers and the cluster has {workers}; give each a region"
            )


def _regions(table: object) -> Regions:
    if isinstance(table, Regions):
        return table
    if isinstance(table, str | PathLike):
        return Regions.read(table)
    if isinstance(table, Mapping):
        return Regions(table)
    raise SimulationError(f"Sites: table={type(table).__name__} is not a Regions, a mapping or the path of a CSV file")


def _sites(members: object) -> tuple[str, ...]:
    if isinstance(members, Mapping):
        found = [r for r, n in members.items() for _ in range(checks.count("Sites", f"members[{r!r}]", n))]
    elif isinstance(members, Sequence) and not isinstance(members, str):
        found = list(members)
    else:
        raise SimulationError("Sites: members is neither the list of each worker's region nor a mapping to how many")
    wrong = [m for m in found if not isinstance(m, str)]
    if wrong:
        raise SimulationError(f"Sites: members has {wrong[0]!r}, which is not the name of a region")
    if not found:
        raise SimulationError("Sites: members is empty; give at least one worker a region")
    return tuple(found)
