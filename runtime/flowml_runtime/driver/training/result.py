"""`TrainingResult` is what `fit` returns, made from what the driver has gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import msgspec

from flowml.plan import Plan
from flowml.training.untrained import Untrained
from flowml.training.valued import own_of
from flowml_runtime.driver.training.history import Record
from flowml_runtime.driver.training.model import Model
from flowml_runtime.driver.training.outcome import Change, Loss, Outcome
from flowml_runtime.driver.training.snapshots import Trees
from flowml_runtime.driver.training.stragglers import Stragglers
from flowml_runtime.driver.training.tables import layer_table
from flowml_runtime.protocol.training.summary import Summary


@dataclass(frozen=True)
class TrainingResult:
    """The result of a fit: parameters, optimizer state, one record per step, and the ledger of all work items.

    `history` is a list of dicts with the keys "step", "epoch", "loss", "seconds" (since the start), "replicas" (whose
    loss is in the mean), "aux" if the loss returns it, and "validation" where it was measured. What the policies did at
    the step is in "waits", "pushed_bytes", "wire_bytes" and "staleness", by policy or layer.
    `traffic` counts bytes by layer, and `staleness` how many
    contributions were how many versions behind; `table()` formats them, and `stragglers()` says who was late.
    Of a fit that went on from a checkpoint `resumed_at` is the first step of this call (else 0). The ledger is that of
    the whole fit, as its checkpoints keep it. `history`, `seconds`, `traffic`, `staleness` and `stragglers()` are about
    the steps since then.
    On a `SimulatedCluster` all seconds are virtual, `virtual_seconds` is their number, `events` that of the events, and
    `trace_hash` is the same for two runs that did the same at the same times; else these three are None.
    """

    params: Any
    opt_state: Any
    history: list[Record]
    ledger: Summary
    seconds: float
    plan: Plan = field(repr=False)
    traffic: Mapping[str, Mapping[str, int]] = field(default_factory=dict[str, Mapping[str, int]])
    staleness: Mapping[str, Mapping[int, int]] = field(default_factory=dict[str, Mapping[int, int]])
    late: Stragglers = field(default=Stragglers(), repr=False)
    virtual_seconds: float | None = None
    trace_hash: str | None = None
    events: int | None = None
    state: Any = None
    """The last state of the model, if the loss has one."""
    losses: tuple[Loss, ...] = ()
    """The losses of workers after which the fit went on, in order."""
    changes: tuple[Change, ...] = ()
    """When workers have joined the fit, or have left it after notice, in order."""
    replica_states: tuple[Any, ...] = field(default=(), repr=False)
    """The same of each replica, before `state_rules` joined them."""
    resumed_at: int = 0

    @property
    def validation(self) -> list[Record]:
        """The results of `fit(validation=)`, in order: "step", the last one that they include, and the metrics."""
        return [{"step": r["step"], **r["validation"]} for r in self.history if "validation" in r]

    def table(self) -> str:
        """One line per layer: policy, home, fates of work items, and bytes compared with plain gradients every step.

        Of a fit that went on from a checkpoint the bytes are those of the steps since then, and a last line says so.
        """
        table = layer_table(self.plan, self.traffic, self.ledger, steps=len(self.history))
        if not self.resumed_at:
            return table
        since = f"since step {self.resumed_at}" if self.history else f"after step {self.resumed_at}: no step was left"
        return f"{table}\nFates of work items are those of the whole fit; pushes and bytes are those {since}."

    def stragglers(self) -> Stragglers:
        """The replicas that were late, how often, and what it cost. `print` says it in words."""
        return self.late


def result_of(trees: Trees, outcome: Outcome, plan: Plan, model: Model, first: int) -> TrainingResult:
    """The result of a fit that began with these trees and this state of the model."""
    params, state, untrained = trees
    ended = model.last(outcome.model)
    simulated = outcome.simulated
    return TrainingResult(
        params=whole_of(untrained, restored(params, outcome.params)),
        opt_state=restored(state, outcome.state),
        history=outcome.history,
        ledger=outcome.ledger,
        seconds=outcome.seconds,
        plan=plan,
        traffic=outcome.traffic,
        staleness=outcome.staleness,
        late=outcome.stragglers,
        losses=outcome.losses,
        changes=outcome.changes,
        resumed_at=first,
        virtual_seconds=simulated.virtual_seconds if simulated else None,
        trace_hash=simulated.trace_hash if simulated else None,
        events=simulated.events if simulated else None,
        state=model.after(outcome.model).state() if model.tree else None,
        replica_states=tuple(map(ended.state, range(len(outcome.model)))) if model.tree else (),
    )


def whole_of(untrained: Untrained | None, params: Any) -> Any:
    """The parameters as the caller has them."""
    mine = own_of(params)
    return untrained.whole(mine) if untrained else mine


def with_shapes(plan: Plan, shapes: Sequence[str]) -> Plan:
    """The plan, with a note of the shapes of examples that it has had programs for, if they are several."""
    if len(shapes) == 1:
        return plan
    note = f"This plan is for examples {shapes[0]}; the fit compiled others for {' and '.join(shapes[1:])}."
    return msgspec.structs.replace(plan, notes=(*plan.notes, note))


def restored(like: Any, leaves: Sequence[Any]) -> Any:
    """Received arrays in the structure and with the dtypes of `like`."""
    tree = jax.tree_util.tree_structure(like)
    dtypes = [x.dtype for x in jax.tree_util.tree_leaves(like)]
    return jax.tree_util.tree_unflatten(tree, [jnp.asarray(x, d) for x, d in zip(leaves, dtypes, strict=True)])
