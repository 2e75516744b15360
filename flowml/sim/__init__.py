"""Models of simulated machines and networks, for `SimulatedCluster`.

Machines: `Constant`, `ShiftedExponential`, `LogNormal`, `Pareto`, `Empirical` and `Recorded` say how long one step of a
replica computes; `Straggler` slows some of them down. Networks: `Network` has equal links, `Sites` has regions with the
links of a table. All are frozen values that check themselves, and none reads a clock. Nothing here imports JAX.
"""

from __future__ import annotations

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

__all__ = [
    "DRIVER",
    "ComputeModel",
    "ComputeTimes",
    "Constant",
    "Empirical",
    "Link",
    "LogNormal",
    "Network",
    "NetworkModel",
    "Pareto",
    "Recorded",
    "Regions",
    "Shared",
    "ShiftedExponential",
    "Sites",
    "Straggler",
]
