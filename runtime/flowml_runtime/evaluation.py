"""Runs a function of a model over all examples of a source: metrics of a `Trainer`, and predictions.

The function is a dataflow program on the trainer's cluster, with its placement. A function of a part of the model,
which that placement does not fit, runs where training has the parameters. Parameters and state are brought to the
workers once. All examples are used; the last batch may be shorter, and counts by its examples.

Training has them at the first replica whose workers are all there, because those of others may be lost. The placement
is for the workers of replica 0. In its place each layer runs where another replica has its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.arrays import ArraySpec
from flowml.callers import raising_line
from flowml.data import as_source
from flowml.devices import Device
from flowml.effects import EffectsChoice
from flowml.errors import FlowmlError, PlacementError, UnsupportedError, named, one_line
from flowml.ir._jax import path_name, spec_of
from flowml.numbers import whole_number
from flowml.placement import Placement
from flowml.plan import Plan
from flowml.rows import swapped
from flowml.training.step import name_of
from flowml.training.untrained import trained_leaves
from flowml.training.valued import is_given
from flowml_runtime.cluster import Cluster
from flowml_runtime.dataflow import dataflow
from flowml_runtime.driver.remote import Remote
from flowml_runtime.driver.training.structs import check_values
from flowml_runtime.put import put
from flowml_runtime.sim.cluster import SimulatedCluster

MOST_PROGRAMS = 8
"""How many functions keep their programs. One more discards the one that was used longest ago."""

Function = Callable[..., Any]


class Evaluation:
    """The programs of the functions that a trainer has evaluated."""

    def __init__(self, placement: Placement, effects: EffectsChoice) -> None:
        self._placement = placement
        self._effects: EffectsChoice = effects
        self._programs: dict[Any, Function] = {}

    def means(
        self,
        cluster: Any,
        fn: Function,
        values: Sequence[Any],
        source: Any,
        batch_size: int,
        plan: Plan | None,
        most: int | None = None,
    ) -> dict[str, Any]:
        """The means over all examples, or the first `most`, of what `fn` returns for batches. `plan` says where
        training has `values`."""
        totals: Any = None
        examples = 0
        for rows, batch, found in self._results(cluster, fn, values, source, batch_size, plan, most):
            if not isinstance(found, Mapping):
                raise TypeError(f"{name_of(fn)} returns a {type(found).__name__}; metrics return a dict of means")
            if totals is None:
                _check_means(fn, found, values, batch, rows)
            scaled = jax.tree.map(lambda x, rows=rows: np.asarray(x, np.float64) * rows, dict(found))  # pyright: ignore
            if totals is not None:
                _check_shapes(fn, totals, scaled, rows)
            totals = scaled if totals is None else jax.tree.map(np.add, totals, scaled)
            examples += rows
        return jax.tree.map(lambda x: x / examples if np.ndim(x) else float(x / examples), totals)

    def predictions(
        self, cluster: Any, fn: Function, values: Sequence[Any], source: Any, batch_size: int, plan: Plan | None
    ) -> Any:
        """What `fn` returns for each example, in order."""
        found: list[Any] = []
        for rows, _, result in self._results(cluster, fn, values, source, batch_size, plan):
            for path, leaf in jax.tree_util.tree_leaves_with_path(result):
                if np.shape(leaf)[:1] != (rows,):
                    what = path_name(path) or "an array"
                    wrong = swapped({what: np.shape(leaf)}, rows)
                    raise ValueError(
                        f"{name_of(fn)} returns {what} of shape {list(np.shape(leaf))} for {rows} examples; "
                        f"{wrong or 'a prediction has one row for each, and evaluate() takes means'}"
                    )
            found.append(jax.tree.map(np.asarray, result))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

    def _results(
        self,
        cluster: Any,
        fn: Function,
        values: Sequence[Any],
        source: Any,
        batch_size: int,
        plan: Plan | None,
        most: int | None = None,
    ) -> Iterator[tuple[int, Any, Any]]:
        """For each batch the number of its examples, the batch, and what the function returns."""
        size, data = whole_number("batch_size", batch_size, least=1), as_source(source)
        examples = data.examples if most is None else most
        if not examples:
            fewer = f" that fill a batch of {size}" if data.examples else ""
            raise ValueError(f"the source has no examples{fewer}; there is nothing to evaluate")
        check_values(values[0], "parameter", "evaluate")
        replica = _replica(plan, cluster.devices)
        placement: Placement = "auto" if replica else self._placement
        program = self._program(cluster, fn, placement)
        held = values if isinstance(cluster, SimulatedCluster) else _brought(cluster, values, plan, replica)
        for start in range(0, examples, size):
            rows = np.arange(start, min(start + size, examples))
            batch = jax.tree_util.tree_unflatten(data.tree, data.take(rows))
            try:
                try:
                    result = program(*held, batch)
                except PlacementError:  # before anything ran: it names layers or stages that this function lacks
                    program = self._program(cluster, fn, placement, "auto")
                    result = program(*held, batch)
            except FlowmlError:
                raise
            except Exception as error:
                _explain(error, fn, values[0], plan)
                raise
            yield len(rows), batch, result

    def _program(self, cluster: Any, fn: Function, placement: Placement, other: Placement | None = None) -> Function:
        """The program of a function with a placement, or from now on with another in its place: "auto" runs each layer
        where training has its parameters."""
        key = fn, cluster, placement is self._placement
        program = self._programs.pop(key, None)
        if program is None or other is not None:
            if isinstance(cluster, SimulatedCluster):
                if not cluster.session.arithmetic:
                    raise UnsupportedError(f"{cluster} computes nothing; give it arithmetic=True to evaluate on it")
                program = jax.jit(fn)  # what is evaluated takes no virtual time
            else:
                placed = placement if other is None else other
                program = dataflow(fn, cluster=cluster, placement=placed, effects=self._effects)
        self._programs[key] = program  # as the newest
        if len(self._programs) > MOST_PROGRAMS:
            del self._programs[next(iter(self._programs))]
        return program


def _explain(error: Exception, fn: Function, params: Any, plan: Plan | None) -> None:
    """Raise ValueError for parameters unlike those of the newest fit. Else add to an error of the user's function which
    parameters it got."""
    line, leaves = raising_line(error), jax.tree_util.tree_leaves_with_path(params)
    here = {path_name(leaves[i][0]): _type_of(leaves[i][1]) for i in trained_leaves(params)}
    there: dict[str, str] = {}
    for store in plan.training.stores if plan is not None and plan.training is not None else ():
        there |= {p: _shown(s) for p, s in zip(store.paths, store.specs, strict=True) if not is_given(p)}
    differs = [f"{p!r} is {here.get(p, 'missing')} and was {s}" for p, s in there.items() if here.get(p) != s]
    differs += [f"{p!r} is new" for p in here if there and p not in there]
    if differs:
        raise ValueError(
            f"{name_of(fn)} fails at {line} ({type(error).__name__}: {one_line(str(error))}), and its parameters are "
            f"not those of the fit: {named(differs)}; give them in the form that fit() takes and returns"
        ) from error
    given = [f"{path or 'an array'}: {kind}" for path, kind in here.items()]
    error.add_note(f"raised at {line} by {name_of(fn)}, whose parameters are {named(given) or 'none'}")


def _type_of(leaf: Any) -> str:
    try:
        return _shown(spec_of(jax.api_util.shaped_abstractify(leaf)))
    except TypeError:
        return type(leaf).__name__


def _shown(spec: ArraySpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def _check_means(fn: Function, found: Mapping[str, Any], values: Sequence[Any], batch: Any, rows: int) -> None:
    """Raise TypeError for a metric that is no mean by its dtype, ValueError for one by its shape."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(found)):
        dtype = jax.dtypes.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name_of(fn)} returns {path_name(path)!r} of dtype {dtype}, and evaluate() takes means over the "
                "examples of a batch, which are floats; give jnp.mean(...), and for a count multiply the result by the "
                "number of examples"
            )
    if any(map(np.ndim, jax.tree.leaves(dict(found)))):
        more = _shapes(fn, values, batch, 2 * rows)
        if more is not None:
            _check_shapes(fn, more, found, rows)


def _shapes(fn: Function, values: Sequence[Any], batch: Any, rows: int) -> Any:
    """What `fn` would return for so many examples, as structs; None if it takes no such batch."""

    def struct(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf

    more = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch)
    try:
        return jax.eval_shape(fn, *jax.tree.map(struct, values), more)
    except Exception:  # it is the user's function, and raises what it likes
        return None


def _check_shapes(fn: Function, expected: Any, found: Any, rows: int) -> None:
    """Raise ValueError unless metrics of batches of several sizes have the same shapes."""
    shapes = [dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (dict(expected), dict(found))]
    for path, leaf in shapes[1].items():
        if path in shapes[0] and np.shape(shapes[0][path]) != np.shape(leaf):
            raise ValueError(
                f"{name_of(fn)} returns {path_name(path)!r} of shape {list(np.shape(leaf))} for {rows} examples, which "
                "depends on their number, and evaluate() takes means over the examples of a batch; give jnp.mean(..., "
                "axis=0), or use predict() for a value of each example"
            )


def _replica(plan: Plan | None, devices: Sequence[Device]) -> int | None:
    """The first replica of a plan whose devices are all there, if one is."""
    training, there = plan.training if plan is not None else None, {device.name for device in devices}
    replicas = training.replicas if training is not None else ()
    return next((r for r, mine in enumerate(replicas) if there.issuperset(mine)), None)


def _brought(cluster: Cluster, values: Sequence[Any], plan: Plan | None, replica: int | None) -> Sequence[Any]:
    """The values on the workers, each where a replica has it; without one the program brings them itself."""
    leaves, tree = jax.tree_util.tree_flatten(tuple(values))
    where = _devices(plan, values[0], replica) if plan is not None and replica is not None else {}
    found: dict[int, Remote] = {}
    for device in dict.fromkeys(where.values()):
        mine = [i for i, d in where.items() if d == device and type(leaves[i]) is not Remote]
        found.update(zip(mine, put([leaves[i] for i in mine], cluster, device), strict=True))
    return jax.tree_util.tree_unflatten(tree, [found.get(i, leaf) for i, leaf in enumerate(leaves)])


def _devices(plan: Plan, params: Any, replica: int) -> dict[int, str]:
    """The device of each leaf of parameters, then of state, at a replica. Leaves that are not trained have none."""
    training, places = plan.training, trained_leaves(params)
    assert training is not None
    if sum(not is_given(path) for store in training.stores for path in store.paths) != len(places):
        return {}
    found = {
        places[leaf]: store.read_by(replica, len(training.replicas))[0]
        for store in training.stores
        for leaf, path in zip(store.leaves, store.paths, strict=True)
        if not is_given(path)
    }
    first = len(jax.tree_util.tree_leaves(params))
    return found | {first + i: training.replicas[replica][leaf.stage] for i, leaf in enumerate(training.state)}
