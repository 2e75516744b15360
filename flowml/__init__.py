"""flowml: a dataflow-graph execution engine for JAX.

Public names are imported on first use (PEP 562), so `import flowml` is fast and the parts without JAX can be
imported where JAX is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flowml import data as data
    from flowml import sim as sim
    from flowml.advice import Advice as Advice
    from flowml.compiler import compile as compile
    from flowml.devices import Device as Device
    from flowml.errors import CheckpointError as CheckpointError
    from flowml.errors import ClusterError as ClusterError
    from flowml.errors import DeadlineError as DeadlineError
    from flowml.errors import DivergedError as DivergedError
    from flowml.errors import FlowmlError as FlowmlError
    from flowml.errors import FlowmlWarning as FlowmlWarning
    from flowml.errors import InUseError as InUseError
    from flowml.errors import NonFiniteError as NonFiniteError
    from flowml.errors import PlacementError as PlacementError
    from flowml.errors import PlanError as PlanError
    from flowml.errors import PolicyError as PolicyError
    from flowml.errors import SimulationError as SimulationError
    from flowml.errors import TraceError as TraceError
    from flowml.errors import UnsupportedError as UnsupportedError
    from flowml.errors import WorkerError as WorkerError
    from flowml.errors import WorkerLostError as WorkerLostError
    from flowml.ir.scopes import device as device
    from flowml.ir.scopes import layer as layer
    from flowml.placement import AutoPlacement as AutoPlacement
    from flowml.placement import Pipeline as Pipeline
    from flowml.plan import Estimate as Estimate
    from flowml.plan import Plan as Plan
    from flowml.plan import Transfer as Transfer
    from flowml.policy import UNBOUNDED as UNBOUNDED
    from flowml.policy import AllReduce as AllReduce
    from flowml.policy import Coded as Coded
    from flowml.policy import Consensus as Consensus
    from flowml.policy import Deadline as Deadline
    from flowml.policy import Delta as Delta
    from flowml.policy import Distill as Distill
    from flowml.policy import Drop as Drop
    from flowml.policy import Every as Every
    from flowml.policy import Factors as Factors
    from flowml.policy import Fold as Fold
    from flowml.policy import Gossip as Gossip
    from flowml.policy import Gradient as Gradient
    from flowml.policy import Hierarchy as Hierarchy
    from flowml.policy import Mean as Mean
    from flowml.policy import Mix as Mix
    from flowml.policy import Once as Once
    from flowml.policy import Outer as Outer
    from flowml.policy import ParameterServer as ParameterServer
    from flowml.policy import Policy as Policy
    from flowml.policy import Prox as Prox
    from flowml.policy import Quorum as Quorum
    from flowml.policy import Requeue as Requeue
    from flowml.policy import Ring as Ring
    from flowml.policy import SharedMemory as SharedMemory
    from flowml.policy import Speculate as Speculate
    from flowml.policy import StalenessScaled as StalenessScaled
    from flowml.policy import Sum as Sum
    from flowml.policy import Tree as Tree
    from flowml.policy import Vote as Vote
    from flowml.policy import Weights as Weights
    from flowml.policy import filters as filters
    from flowml.policy import named as policies  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from flowml.splits import Shards as Shards
    from flowml.splits import WithReplacement as WithReplacement
    from flowml_runtime import methods as methods
    from flowml_runtime.advise import advise as advise
    from flowml_runtime.cluster import Cluster as Cluster
    from flowml_runtime.dataflow import dataflow as dataflow
    from flowml_runtime.driver.checkpoint import Checkpoint as Checkpoint
    from flowml_runtime.driver.checkpoint import Restored as Restored
    from flowml_runtime.driver.checkpoint import restore as restore
    from flowml_runtime.driver.remote import Remote as Remote
    from flowml_runtime.driver.training.result import TrainingResult as TrainingResult
    from flowml_runtime.orbax_files import from_orbax as from_orbax
    from flowml_runtime.orbax_files import to_orbax as to_orbax
    from flowml_runtime.put import put as put
    from flowml_runtime.saved import load as load
    from flowml_runtime.saved import save as save
    from flowml_runtime.sim.cluster import SimulatedCluster as SimulatedCluster
    from flowml_runtime.trainer import Trainer as Trainer

_HOMES = {
    "policies": "flowml.policy.named",
    "filters": "flowml.policy.filters",
    "data": "flowml.data",
    "sim": "flowml.sim",
    "compile": "flowml.compiler",
    "Device": "flowml.devices",
    "CheckpointError": "flowml.errors",
    "ClusterError": "flowml.errors",
    "DeadlineError": "flowml.errors",
    "DivergedError": "flowml.errors",
    "FlowmlError": "flowml.errors",
    "FlowmlWarning": "flowml.errors",
    "InUseError": "flowml.errors",
    "NonFiniteError": "flowml.errors",
    "PlacementError": "flowml.errors",
    "PlanError": "flowml.errors",
    "PolicyError": "flowml.errors",
    "SimulationError": "flowml.errors",
    "TraceError": "flowml.errors",
    "UnsupportedError": "flowml.errors",
    "WorkerError": "flowml.errors",
    "WorkerLostError": "flowml.errors",
    "AutoPlacement": "flowml.placement",
    "Pipeline": "flowml.placement",
    "Estimate": "flowml.plan",
    "Plan": "flowml.plan",
    "Transfer": "flowml.plan",
    "UNBOUNDED": "flowml.policy",
    "AllReduce": "flowml.policy",
    "Coded": "flowml.policy",
    "Consensus": "flowml.policy",
    "Speculate": "flowml.policy",
    "Delta": "flowml.policy",
    "Requeue": "flowml.policy",
    "Fold": "flowml.policy",
    "Distill": "flowml.policy",
    "Drop": "flowml.policy",
    "Deadline": "flowml.policy",
    "Every": "flowml.policy",
    "Factors": "flowml.policy",
    "Gossip": "flowml.policy",
    "Gradient": "flowml.policy",
    "Hierarchy": "flowml.policy",
    "Mean": "flowml.policy",
    "Mix": "flowml.policy",
    "Once": "flowml.policy",
    "Outer": "flowml.policy",
    "ParameterServer": "flowml.policy",
    "Policy": "flowml.policy",
    "Prox": "flowml.policy",
    "Quorum": "flowml.policy",
    "Ring": "flowml.policy",
    "SharedMemory": "flowml.policy",
    "StalenessScaled": "flowml.policy",
    "Sum": "flowml.policy",
    "Tree": "flowml.policy",
    "Vote": "flowml.policy",
    "Weights": "flowml.policy",
    "Shards": "flowml.splits",
    "WithReplacement": "flowml.splits",
    "device": "flowml.ir.scopes",
    "layer": "flowml.ir.scopes",
    "methods": "flowml_runtime.methods",
    "Advice": "flowml.advice",
    "advise": "flowml_runtime.advise",
    "Cluster": "flowml_runtime.cluster",
    "dataflow": "flowml_runtime.dataflow",
    "put": "flowml_runtime.put",
    "from_orbax": "flowml_runtime.orbax_files",
    "to_orbax": "flowml_runtime.orbax_files",
    "load": "flowml_runtime.saved",
    "save": "flowml_runtime.saved",
    "Remote": "flowml_runtime.driver.remote",
    "SimulatedCluster": "flowml_runtime.sim.cluster",
    "Checkpoint": "flowml_runtime.driver.checkpoint",
    "Restored": "flowml_runtime.driver.checkpoint",
    "restore": "flowml_runtime.driver.checkpoint",
    "Trainer": "flowml_runtime.trainer",
    "TrainingResult": "flowml_runtime.driver.training.result",
}

_MODULES = {"policies", "filters", "data", "sim", "methods"}
"""Names that stand for a whole module."""

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        from flowml.signatures import missing

        raise missing("flowml", __all__, name)
    module = importlib.import_module(home)
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
