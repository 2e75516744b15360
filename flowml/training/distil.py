"""Builds what a home does to distil the models of several replicas into one: `fm.Distill`.

    outputs   the parameters of one model -> its outputs on the examples
    update    (mean of the parameters, means of the outputs, parameters) -> parameters of the student

Outputs are added up like parameters, contribution by contribution, so no function depends on the number of replicas.
All functions take and return flat arrays.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowml.errors import PolicyError, one_line
from flowml.policy import Distill, Policy
from flowml.policy.apply import base_of
from flowml.training.step import wide


@dataclass(frozen=True)
class Distilling:
    """A `Distill` for the parameters of one model, whose structure is `tree`. `width` is the number of output arrays,
    whose structure is `form`."""

    kind: Distill
    tree: Any
    form: Any
    width: int
    inputs: Any
    rows: int

    def outputs(self, leaves: Sequence[Any]) -> list[Any]:
        """The outputs of the model with these parameters, in float32 or wider."""
        params = jax.tree_util.tree_unflatten(self.tree, leaves)
        return [wide(o) for o in jax.tree_util.tree_leaves(self.kind.predict(params, self.inputs))]

    def update(self, *arrays: Any) -> tuple[Any, ...]:
        """Train the student. It starts from the mean of the models, and not from the parameters that the home has."""
        count = self.tree.num_leaves
        student = jax.tree_util.tree_unflatten(self.tree, arrays[:count])
        targets = jax.tree_util.tree_unflatten(self.form, arrays[count : count + self.width])
        size = self.rows if self.kind.batch_size is None else self.kind.batch_size

        def step(number: Any, held: tuple[Any, Any]) -> tuple[Any, Any]:
            params, state = held
            start = number % (self.rows // size) * size
            inputs, wanted = (
                jax.tree_util.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), whole)
                for whole in (self.inputs, targets)
            )
            gradient = jax.grad(lambda p: self.loss(self.kind.predict(p, inputs), wanted))(params)
            updates, state = self.kind.optimizer.update(gradient, state, params)
            moved = jax.tree_util.tree_map(lambda p, u: (p + u).astype(p.dtype), params, updates)
            return moved, state

        start = student, self.kind.optimizer.init(student)
        student, _ = jax.lax.fori_loop(0, self.kind.steps, step, start)
        return tuple(jax.tree_util.tree_leaves(student))

    def loss(self, outputs: Any, targets: Any) -> Any:
        if self.kind.loss is not None:
            return self.kind.loss(outputs, targets)
        pairs = zip(jax.tree_util.tree_leaves(outputs), jax.tree_util.tree_leaves(targets), strict=True)
        return sum(jnp.mean(jnp.square(wide(o) - t)) for o, t in pairs)


def distilling(policies: Sequence[Policy], params: Any) -> Distilling | None:
    """What the home of all parameters does, if their policy distils. `policies` are those of the leaves of `params`.

    Raises:
        PolicyError: if the functions of the policy do not fit the parameters and the examples.
    """
    kind = next((k for k in (base_of(p.apply) for p in policies) if isinstance(k, Distill)), None)
    if kind is None:
        return None
    if kind.travels:
        raise PolicyError(f"{kind!r} has no functions: it is the form in which a policy travels; make a new one")
    inputs = jax.tree_util.tree_map(_array, kind.inputs.inputs)
    rows = _rows(inputs)
    if kind.batch_size is not None and kind.batch_size > rows:
        raise PolicyError(
            f"Distill(batch_size={kind.batch_size}) with {rows} examples as inputs; give batch_size={rows} or less"
        )
    structs = jax.tree_util.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    outputs = _traced("predict(params, inputs)", kind.predict, structs, inputs)
    leaves, form = jax.tree_util.tree_flatten(outputs)
    for leaf in leaves:
        if not leaf.shape or leaf.shape[0] != rows or not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise PolicyError(
                f"Distill: predict returns an array of {leaf.dtype}{list(leaf.shape)} for {rows} examples, and outputs "
                "are averaged example by example; return floating arrays with a row an example, such as logits"
            )
    if not leaves:
        raise PolicyError("Distill: predict returns no array; return the outputs of the model for these inputs")
    found = Distilling(kind, jax.tree_util.tree_structure(params), form, len(leaves), inputs, rows)
    loss = _traced("loss(outputs, targets)", found.loss, outputs, outputs)
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise PolicyError(f"Distill: loss returns {one_line(str(loss))}; return one floating number")
    return found


def apart(policy: Policy, devices: Iterable[str]) -> PolicyError:
    """The error for a model whose layers are on several devices."""
    return PolicyError(
        f"{policy.describe()}: a home needs the outputs of whole models, and the stages of a pipeline send it their "
        f"parts apart ({', '.join(sorted(devices))}); place the model on one device, such as placement=fm.Pipeline(1)"
    )


def _array(leaf: Any) -> Any:
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.dtype == object or not array.ndim:
        raise PolicyError(
            f"Distill(inputs=) has {one_line(repr(leaf))}, which has no rows; give arrays with a row an example"
        )
    wrong = np.count_nonzero(~np.isfinite(array)) if jnp.issubdtype(array.dtype, jnp.inexact) else 0
    if wrong:
        raise PolicyError(
            f"Distill(inputs=) has {wrong} values that are NaN or infinite, which would make all parameters so; leave "
            "these examples out"
        )
    return array


def _rows(inputs: Any) -> int:
    lengths = sorted({len(x) for x in jax.tree_util.tree_leaves(inputs)})
    if len(lengths) != 1 or not lengths[0]:
        raise PolicyError(
            f"Distill(inputs=) has arrays of {', '.join(map(str, lengths)) or 'no'} rows; give arrays with one row for "
            "each example, and one example at least"
        )
    return lengths[0]


def _traced(form: str, function: Any, *args: Any) -> Any:
    try:
        return jax.eval_shape(function, *args)
    except Exception as error:
        raise PolicyError(
            f"Distill: {form} cannot be traced for these parameters and inputs: {type(error).__name__}: "
            f"{one_line(str(error))}; give a function that JAX can trace, of the form {form}"
        ) from error
