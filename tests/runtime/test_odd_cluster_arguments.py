"""Arguments of a cluster of a wrong type or range get one sentence, and nothing is started."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml_runtime.launch.launched import LaunchedCluster
from tests.runtime.test_cluster import NoLeaks

COUNT = "give a whole number of at least 1"
SECONDS = "give seconds above 0, at most 1e+09"
FLAG = "give True or False"
BEFORE = "127.0.0.1:1"


def connect(address: Any = BEFORE, token: Any = "t", **options: Any) -> fm.Cluster:
    return fm.Cluster.connect(address, token, **options)


LOCAL: list[tuple[dict[str, Any], str]] = [
    *[({name: odd}, f"{name}={odd!r} is of type {type(odd).__name__}; {COUNT}")
      for name in ("workers", "devices_per_worker") for odd in ("2", None, 2.5, True, [], np.float32(2))],
    *[({name: odd}, f"{name}={odd}: give at least 1") for name in ("workers", "devices_per_worker") for odd in (0, -1)],
    ({"devices_per_worker": 10**9}, "devices_per_worker=1000000000: give at most 1024"),
]  # fmt: skip
STARTED: list[tuple[dict[str, Any], str]] = [
    ({"allow_python": "no"}, f"allow_python='no' is of type str; {FLAG}"),
    ({"allow_python": None}, f"allow_python=None is of type NoneType; {FLAG}"),
    ({"checksum": 2}, f"checksum=2 is of type int; {FLAG}"),
    ({"platform": None}, "platform is of type NoneType; give text"),
    ({"platform": ""}, "platform is empty; give text"),
    ({"start_timeout_s": "x"}, f"start_timeout_s='x': {SECONDS}"),
    ({"start_timeout_s": None}, f"start_timeout_s=None: {SECONDS}"),
    ({"start_timeout_s": -1}, f"start_timeout_s=-1: {SECONDS}"),
    ({"start_timeout_s": math.nan}, f"start_timeout_s=nan: {SECONDS}"),
    ({"start_timeout_s": 10**400}, SECONDS),
    ({"transport": None}, "transport=None is unknown; give 'auto' or 'grpc'"),
    ({"transport": ["grpc"]}, "transport=['grpc'] is unknown; give 'auto' or 'grpc'"),
    ({"workers": 10**9}, "1000000000 workers need at least"),
]
DEADLINES: list[tuple[dict[str, Any], str]] = [
    ({"deadline_s": odd}, f"deadline_s={odd!r}: {SECONDS}")
    for odd in ("x", None, True, 0, -1, math.inf, math.nan, 1j, [1])
]
CONNECT: list[tuple[dict[str, Any], str]] = [
    *[({"address": odd}, f"{odd!r} is not an address; give HOST:PORT") for odd in (None, 123, b"127.0.0.1:1", "", "a")],
    ({"token": 123}, "token is of type int; give the token as text, or the path of the file that holds it"),
    ({"token": b"x"}, "token is of type bytes; give the token as text, or the path of the file that holds it"),
    ({"token": ""}, "the token is empty; use the one that `flowml launch` wrote"),
    ({"token": pathlib.Path("a\0b")}, r"cannot read the token file 'a\x00b': embedded null byte"),
    ({"tls": 3}, "tls=3 is of type int; give the paths of three PEM files"),
    ({"tls": {"cert": 3, "key": "k", "ca": "c"}}, "give the paths of three PEM files, tls={'cert': ..., 'key': ..."),
    ({"timeout_s": "x"}, f"timeout_s='x': {SECONDS}"),
    ({"timeout_s": -1}, f"timeout_s=-1: {SECONDS}"),
    ({"allow_python": 1}, f"allow_python=1 is of type int; {FLAG}"),
    ({"checksum": "yes"}, f"checksum='yes' is of type str; {FLAG}"),
    ({"transport": 3}, "transport=3 is unknown; give 'auto' or 'grpc'"),
    ({"links": 3}, "links=3 is not a mode; use 'measure', 'remembered', 'assume'"),
]
LAUNCHED: list[tuple[dict[str, Any], str]] = [
    ({"bind": 3}, "3 is not an address; give HOST:PORT"),
    ({"token": 123}, "token is of type int; give text"),
    ({"token": ""}, "token is empty; give text"),
]


def cases() -> list[Any]:
    makers: list[tuple[Callable[..., Any], list[tuple[dict[str, Any], str]]]] = [
        (fm.Cluster.threads, [*LOCAL, *DEADLINES, ({"workers": 10**9}, "workers=1000000000: give at most 1024")]),
        (fm.Cluster.local, [*LOCAL, *DEADLINES, *STARTED, ({"links": 3}, "links=3 is not a mode; use")]),
        (LaunchedCluster, [*LOCAL, *STARTED, *LAUNCHED]),
        (connect, [*DEADLINES, *CONNECT]),
    ]
    return [pytest.param(make, odd, says, id=f"{make.__name__} {odd}") for make, known in makers for odd, says in known]


@pytest.mark.parametrize(("make", "odd", "says"), cases())
def test_it_is_refused_before_anything_starts(
    make: Callable[..., Any], odd: dict[str, Any], says: str, no_leaks: NoLeaks
) -> None:
    with no_leaks(), pytest.raises(fm.ClusterError, match=re.escape(says)) as caught:
        make(**odd)
    assert "\n" not in str(caught.value)


def test_numpy_scalars_are_numbers_and_flags() -> None:
    counts: dict[str, Any] = {"workers": np.int64(1), "devices_per_worker": np.int32(2)}
    with fm.Cluster.threads(**counts, deadline_s=np.float32(20)) as cluster:
        assert len(cluster.devices) == 2
    with fm.Cluster.local(
        **counts, allow_python=np.bool_(True), checksum=np.True_, start_timeout_s=np.float32(60)
    ) as cluster:  # pyright: ignore[reportArgumentType]
        assert len(cluster.devices) == 2
        assert fm.dataflow(lambda x: x + 1, cluster=cluster)(1) == 2
