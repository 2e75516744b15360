"""`put` brings arrays to the workers ahead of the calls that take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from flowml.devices import Device, find_device
from flowml.errors import PlacementError, named, shadowed
from flowml.ir._jax import path_name
from flowml.ir.label import layer_of, matches
from flowml.ir.objects import array_leaves
from flowml.leaves import check_known, has_no_values, why_no_array
from flowml.plan import ArraySpec
from flowml_runtime.driver.call_io import signature
from flowml_runtime.driver.remote import Kind, Remote

if TYPE_CHECKING:
    from flowml_runtime.cluster import Cluster


def put(tree: Any, cluster: Cluster | None = None, placement: Any = None) -> Any:
    """Bring the arrays of a pytree to devices, where they stay until their handles are deleted or donated.

    Args:
        tree: a pytree of arrays and numbers. Handles in it stay where they are, and so does what is no array in an
            equinox module, and what has no values (float0).
        cluster: by default that of the innermost `with cluster:` block.
        placement: a device ("worker:1", "worker:1/cpu:0") for all, or a mapping from patterns to devices, matched with
            the path of each leaf and its layers; what matches none, and everything without a placement, goes to the
            first device.

    Returns: the pytree with an `fm.Remote` for each array. Raises TypeError for a leaf that is not an array,
    PlacementError for a device that does not exist or a pattern that matches no leaf, WorkerLostError for a device of a
    lost worker, ClusterError if a device has no room.
    """
    from flowml_runtime.cluster import current_cluster

    where = cluster if cluster is not None else current_cluster()
    session = where.session
    session.check_owner()
    session.check_workers("nothing can be put on them")
    leaves, made = array_leaves(tree)
    paths = [path_name(path) for path, _ in leaves]
    devices = placed(paths, where, placement)
    kinds: list[Kind] = []
    arrays: list[Any] = []
    for path, (_, leaf), device in zip(paths, leaves, devices, strict=True):
        if type(leaf) is Remote:
            leaf.check(session.held)
            continue
        if has_no_values(leaf):
            continue
        check_known(f"fm.put: leaf {path!r}" if path else "fm.put: the value", leaf, "fm.put")
        try:
            shape, dtype, weak = signature(leaf)
        except (TypeError, ValueError, OverflowError):
            raise TypeError(f"put: leaf {path!r} {why_no_array(leaf)}") from None
        kinds.append(Kind(ArraySpec(shape, str(dtype), weak), device, path))
        arrays.append(leaf)
    adds: dict[str, int] = {}
    for kind in kinds:
        adds[kind.device] = adds.get(kind.device, 0) + kind.nbytes
    session.held.check_room(adds, where.devices, "put")
    handles = iter(session.held.bring(arrays, kinds, "put").handles() if kinds else ())
    stays = [type(leaf) is Remote or has_no_values(leaf) for _, leaf in leaves]
    return made([leaf if here else next(handles) for (_, leaf), here in zip(leaves, stays, strict=True)])


def placed(paths: Sequence[str], cluster: Cluster, placement: Any, verb: str = "put") -> list[str]:
    """The device of each leaf. Raises WorkerLostError for one of a lost worker."""
    try:
        return _placed(paths, cluster.devices, placement, verb)
    except PlacementError as error:
        if error.worker is None:
            raise
        raise cluster.session.explained(error, "the arrays") from None


def _placed(paths: Sequence[str], devices: Sequence[Device], placement: Any, verb: str) -> list[str]:
    asked = f"{verb}: the placement"
    if placement is None or (isinstance(placement, str) and placement == "auto"):
        return [devices[0].name] * len(paths)
    if isinstance(placement, str | Device):
        return [_name(placement, devices, asked)] * len(paths)
    if not isinstance(placement, Mapping):
        raise PlacementError(
            f"{verb}: placement={placement!r} depends on a program; give a device or a mapping such as "
            "{'conv*': 'worker:0'}, or call the program with the arrays: it keeps its results where it runs"
        )
    found: dict[int, tuple[str, str]] = {}
    for pattern, wanted in placement.items():
        device = _name(wanted, devices, f"{verb}: pattern {pattern!r}")
        hit = [i for i, path in enumerate(paths) if _matches(path, str(pattern))]
        if not hit:
            raise PlacementError(
                f"{verb}: pattern {pattern!r} matches no leaf; leaves are {named(paths)}; give a pattern of one"
            )
        if pattern != "*" and all(i in found for i in hit):
            raise PlacementError(shadowed(f"{verb}: pattern {pattern!r}", {paths[i]: found[i][0] for i in hit}))
        for i in hit:
            found.setdefault(i, (str(pattern), device))
    return [found[i][1] if i in found else devices[0].name for i in range(len(paths))]


def _name(device: Any, devices: Sequence[Device], asked: str) -> str:
    return find_device(device.name if isinstance(device, Device) else device, devices, asked).name


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or matches(path, pattern) or matches(layer_of(path), pattern)
