"""Checks that the replicas of a layer can share its parameters: they are devices of one worker."""

from __future__ import annotations

from collections.abc import Sequence

from flowml.devices import worker_of
from flowml.errors import PlacementError, named
from flowml.policy import Policy


def check_shared(name: str, policy: Policy, devices: Sequence[str]) -> None:
    """Raise PlacementError if a layer whose replicas run on `devices` cannot be in memory that they share."""
    workers = tuple(dict.fromkeys(map(worker_of, devices)))
    if policy.shared and len(workers) > 1:
        raise PlacementError(
            f"{name!r} ({policy.describe()}): its replicas run on {named(workers)}, and workers share no memory; start "
            f"one worker with devices_per_worker={len(devices)}, or use topology=fm.ParameterServer()"
        )
