"""`advise` simulates a fit with each of many policies, and ranks them.

Each policy is one simulated fit without arithmetic, of the same model on the same machines: draws depend only on the
seed, the machine and the step.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np

from flowml.advice import GIVEN, SYNCHRONOUS, Advice, Policies, Trial, ranked, why
from flowml.data import Source
from flowml.errors import ClusterError, FlowmlError, FlowmlWarning, PolicyError, SimulationError
from flowml.numbers import whole_number
from flowml.plan import Plan
from flowml.policy import Gossip, Policy
from flowml.policy.candidates import candidates
from flowml.policy.rhythm import ONCE
from flowml.sim import Sites
from flowml_runtime.current import blocks
from flowml_runtime.driver.progress import shown
from flowml_runtime.driver.training.result import TrainingResult
from flowml_runtime.driver.training.structs import structs
from flowml_runtime.sim.cluster import SimulatedCluster
from flowml_runtime.trainer import Trainer

STEPS = 128


def advise(
    trainer: Trainer,
    params: Any,
    batch: Any,
    *,
    cluster: SimulatedCluster | None = None,
    policies: Mapping[str, Policies] | None = None,
    steps: int = STEPS,
    state: Any = None,
) -> Advice:
    """Simulate a fit with each sound policy, and rank them by the time to as many examples as `steps` synchronous steps
    use. `print` shows the ranking with bytes, staleness and lost work, and says in words why.

    No parameters are computed, so it says what a policy costs on these machines, and not how much the model learns from
    an example. Each trial compiles the model's step.

    Args:
        trainer: the model, the optimizer, and the number of replicas. Its own policies are among those that are tried.
        params: pytree of arrays or `jax.ShapeDtypeStruct`s.
        batch: one global batch, as for `Trainer.plan`.
        cluster: the machines and links; by default those of the trainer, which is then on a `SimulatedCluster`. For a
            recorded run give `fm.sim.Recorded(trace)` as its model of machines.
        policies: name -> a policy, a mapping from patterns of parameter paths, or a rule, to try instead of those of
            `fm.policies` that change training in a known way. Synchronous training is always tried.
        steps: at least 4. A method that exchanges values every 32 steps needs a few times that.
        state: the state of the model, for a loss with `has_state`.

    Raises:
        SimulationError: without a simulated cluster, or with one replica.
        PolicyError: if none of `policies` can train the model. What else is refused is in `Advice.refused`.
    """
    if not isinstance(trainer, Trainer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{trainer!r} is of type {type(trainer).__name__}; give an fm.Trainer")
    found = cluster or trainer.cluster or _current()
    if not isinstance(found, SimulatedCluster):
        has = "there is no cluster" if found is None else f"{found!r} has none"
        raise SimulationError(
            f"advise() needs models of machines and links, and {has}; give cluster=fm.SimulatedCluster("
            "workers=..., compute=fm.sim.LogNormal(0.1, 0.3), network=fm.sim.Network(1e-4, 1e9)), or for a recorded "
            "run compute=fm.sim.Recorded(trace)"
        )
    if trainer.spec.replicas < 2:
        raise SimulationError("advise() compares ways to keep replicas in step, and there is one; give replicas=")
    steps = whole_number("steps", steps, least=4)
    _check(policies)
    shapes = structs(batch, "batch leaf")
    if not jax.tree_util.tree_leaves(shapes):
        raise ValueError(f"batch={batch!r} has no arrays; give one global batch, as for Trainer.plan")
    return _Comparison(trainer, params, shapes, found, steps, state).run(policies)


def _current() -> object:
    """The cluster of the current block, if there is one."""
    try:
        return blocks.current()
    except ClusterError:
        return None


def _check(policies: object) -> None:
    """Raise TypeError unless it is None or maps names to what a trainer takes for its policies."""
    if not isinstance(policies, Mapping | None):
        raise TypeError(
            f"policies={policies!r} is a {type(policies).__name__}; give a mapping from names to the policies to try, "
            'such as {"quorum(0.75)": fm.policies.quorum(0.75)}'
        )
    for name, given in cast("Mapping[Any, Any]", policies or {}).items():
        if not (isinstance(given, Policy | Mapping) or callable(given)):
            raise TypeError(
                f"policies[{name!r}] is {given!r}, of type {type(given).__name__}; give an fm.Policy such as "
                "fm.policies.quorum(0.75), a mapping from patterns of parameter paths to policies, or a rule "
                "(path, shape) -> fm.Policy"
            )


class _Comparison:
    """Trials of one model on one simulated cluster."""

    def __init__(
        self, trainer: Trainer, params: Any, batch: Any, cluster: SimulatedCluster, steps: int, state: Any
    ) -> None:
        self._trainer = trainer
        self._params = jax.tree_util.tree_map(_array, params)
        self._state = jax.tree_util.tree_map(_array, state)
        self._batch = batch
        self._batch_size = int(jax.tree_util.tree_leaves(batch)[0].shape[0])
        self._ruled: dict[Any, list[Policy]] = {}
        """By rule, the policies that it chooses."""
        self._source = _source(batch, self._batch_size)
        self._cluster = cluster
        self._steps = steps
        self._replicas = trainer.spec.replicas

    def run(self, given: Mapping[str, Policies] | None) -> Advice:
        result, notes = self._simulated(Policy())
        trials = {SYNCHRONOUS: self._trial(SYNCHRONOUS, Policy(), result, notes)}
        own_s, slowest_s = self._times(result.plan)
        offered, refused = self._offered(given, own_s)
        for name, policies in offered.items():
            if name != GIVEN and 2 * (often := _rhythm(policies)) > self._steps:
                refused[name] = f"replicas exchange every {often} steps, of which {self._steps} hold less than two " + (
                    f"rounds; give advise(steps={2 * often}) or more"
                )
        left = [name for name in offered if name != SYNCHRONOUS and name not in refused]
        with shown(lambda: f"simulating {left[0] if left else 'no more'}, {len(left)} of {len(offered)} policies left"):
            while left:
                name = left[0]
                try:
                    trials[name] = self._trial(name, offered[name], *self._simulated(offered[name]))
                except (FlowmlError, ValueError) as error:
                    refused[name] = str(error)
                del left[0]
        if given is not None and len(trials) == 1 and refused:
            raise PolicyError(f"none of these policies can train this model: {next(iter(refused.values()))}")
        told = [self._explained(trial, trials[SYNCHRONOUS]) for trial in trials.values()]
        size = self._replicas, self._steps, self._batch_size
        return Advice(*size, own_s, slowest_s, ranked(told), refused)

    def _offered(self, given: Mapping[str, Policies] | None, own_s: float) -> tuple[dict[str, Any], dict[str, str]]:
        """The policies to try, in the order in which they change training, and why others are not possible."""
        spec = self._trainer.spec
        own: dict[str, Any] = {} if spec.policies is None else {GIVEN: spec.policies}
        if given is not None:
            return own | dict(given), {}
        found, refused = candidates(self._replicas, spec.microbatches, own_s, self._sites())
        return {SYNCHRONOUS: found[SYNCHRONOUS]} | own | found, refused

    def _sites(self) -> Sequence[Sequence[int]]:
        """The replicas of each region of the network, if a replica is one worker."""
        network, models = self._cluster.models.network, self._cluster.models
        if not isinstance(network, Sites) or models.devices > 1 or models.workers != self._replicas:
            return ()
        regions = [network.site(worker) for worker in range(models.workers)]
        return [[w for w, region in enumerate(regions) if region == name] for name in dict.fromkeys(regions)]

    def _simulated(self, policies: Any) -> tuple[TrainingResult, list[str]]:
        """The fit, and what it has warned of."""
        trainer = self._trainer.with_policies(policies, self._cluster.without_arithmetic())
        settings: dict[str, Any] = {"batch_size": self._batch_size, "steps": self._steps, "progress": False}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FlowmlWarning)
            result = trainer.fit(self._params, self._source, state=self._state, **settings)
        return result, [str(w.message) for w in caught]

    def _each(self, policies: Any) -> list[Policy]:
        """The policies of layers."""
        if isinstance(policies, Policy):
            return [policies]
        if isinstance(policies, Mapping):
            return list(cast("Mapping[str, Policy]", policies).values())
        if policies not in self._ruled:
            trainer = self._trainer.with_policies(policies, self._cluster)
            training = trainer.plan(self._params, self._batch, self._state).training
            self._ruled[policies] = [store.policy for store in training.stores] if training else []
        return self._ruled[policies]

    def _trial(self, name: str, policies: Any, result: TrainingResult, notes: Sequence[str]) -> Trial:
        """What a fit took for as many examples as all steps have."""
        ledger, wanted = result.ledger, self._steps * self._batch_size
        scale = wanted / max(1, ledger.examples)
        versions: dict[int, int] = {}
        for counts in result.staleness.values():
            for behind, count in counts.items():
                versions[behind] = versions.get(behind, 0) + count
        computed = (ledger.used + ledger.folded + ledger.dropped) * ledger.item_size
        kinds = ("pushed", "published", "shared")
        wire = sum(t[f"{kind}_wire_bytes"] for t in result.traffic.values() for kind in kinds)
        return Trial(
            name,
            policies,
            seconds=(result.virtual_seconds or 0.0) * scale,
            nbytes=wire * scale,
            staleness=sum(b * c for b, c in versions.items()) / max(1, sum(versions.values())),
            most_stale=max(versions, default=0),
            dropped=1 - ledger.examples / computed if computed else 0.0,
            notes=tuple(notes),
        )

    def _explained(self, trial: Trial, plain: Trial) -> Trial:
        speed = plain.seconds / trial.seconds if trial.seconds else 1.0
        return replace(trial, speed=speed, why=why(trial, plain, self._each(trial.policies)))

    def _times(self, plan: Plan) -> tuple[float, float]:
        """The mean seconds of a replica's step, and of the slowest replica's of each step."""
        training, models = plan.training, self._cluster.models
        assert training is not None
        machines = [_machine(devices[0], models.devices) for devices in training.replicas]
        times = models.compute.drawn(models.seed, np.array(machines), np.arange(self._steps)[:, None])
        return float(times.mean()), float(times.max(axis=1).mean())


def _rhythm(policies: Any) -> int:
    """The most steps between two exchanges of a layer. One at the end alone is none."""
    if callable(policies):
        return 1
    each = [policies] if isinstance(policies, Policy) else list(policies.values())
    rounds = [p.remote.every if isinstance(p.remote, Gossip) else p.every.push for p in each]
    return max((often for often in rounds if often < ONCE), default=1)


def _machine(device: str, each: int) -> int:
    """The number of a device such as `worker:3/cpu:0` among the machines of the compute times."""
    worker, _, place = device.partition("/")
    return int(worker.rpartition(":")[2]) * each + int(place.rpartition(":")[2] or 0)


def _source(batch: Any, examples: int) -> Source:
    """A source of so many examples of this shape, whose values no one reads."""
    leaves, tree = jax.tree_util.tree_flatten(batch)

    def take(indices: np.ndarray) -> list[np.ndarray]:
        return [np.zeros((len(indices), *leaf.shape[1:]), leaf.dtype) for leaf in leaves]

    return Source(examples, tree, take, None)


def _array(leaf: Any) -> Any:
    """Zeros in place of a shape."""
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


__all__ = ["Advice", "advise"]
