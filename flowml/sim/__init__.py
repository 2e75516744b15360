"""Models of simulated machines and networks, for `SimulatedCluster`.

Machines: `Constant`, `ShiftedExponential`, `LogNormal`, `Pareto`, `Empirical` and `Recorded` say how long one step of a
replica computes; `Straggler` slows some of them down. `Homes` says how long an apply takes. Networks: `Network` has
equal links, `Sites` has regions with the links of a table. `Churn` says when machines leave and return. `Recording`
replays the recorded operations of a training job and says what stragglers cost it.

All are frozen values that check themselves, and none reads a clock. Nothing here imports JAX.
"""

from __future__ import annotations

from flowml.errors import SimulationError
from flowml.signatures import worded
from flowml.sim.churn import Change, Churn
from flowml.sim.faults import Crash, Disorder, Fault, Partition
from flowml.sim.homes import AT_ONCE, Homes
from flowml.sim.machines import (
    ComputeModel,
    ComputeTimes,
    Constant,
    Empirical,
    LogNormal,
    Pareto,
    Recorded,
    ShiftedExponential,
    Straggler,
)
from flowml.sim.networks import DRIVER, Link, Network, NetworkModel, Regions, Shared, Sites
from flowml.sim.recording import Operation, Recording

__all__ = [
    "AT_ONCE",
    "DRIVER",
    "Change",
    "Churn",
    "ComputeModel",
    "ComputeTimes",
    "Constant",
    "Crash",
    "Disorder",
    "Fault",
    "Partition",
    "Empirical",
    "Homes",
    "Link",
    "LogNormal",
    "Network",
    "NetworkModel",
    "Operation",
    "Pareto",
    "Recorded",
    "Recording",
    "Regions",
    "Shared",
    "ShiftedExponential",
    "Sites",
    "Straggler",
]

worded(globals(), __all__, SimulationError, "flowml.sim")


def __dir__() -> list[str]:
    return __all__
