"""Checks the results of a program for NaN and infinity under `jax_debug_nans` and `jax_debug_infs`, as jit does.

Only values that leave the program are checked: what the driver fetches, what stays on the device, and gradients. A
value on its way to another task may hold a NaN that a later operation masks, and jit does not raise for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax.numpy as jnp
import numpy as np

from flowml.errors import NonFiniteError
from flowml.instructions import Feed, Fetch, Instruction, Keep, Push, Read, Recv, Run
from flowml.ir._jax import under
from flowml.plan import Plan, Program, Setting, Task
from flowml_runtime.transport.arrays import Array, wire_layout

_SETTINGS = {"jax_debug_nans": ("NaN", np.isnan), "jax_debug_infs": ("infinity", np.isinf)}
_OFF: tuple[Setting, ...] = tuple((name, False) for name in _SETTINGS)


def unchecked() -> AbstractContextManager[None]:
    """A context in which JAX does not check what its programs return."""
    return under(_OFF)


def checks(plan: Plan) -> dict[str, str]:
    """The settings under which results of a plan are checked: name -> what they must not hold."""
    return {name: _SETTINGS[name][0] for name, on in plan.settings if on and name in _SETTINGS}


def leaving(program: Program) -> dict[int, tuple[int, ...]]:
    """For the position of each Run, those of its results that leave the program."""
    found: dict[int, tuple[int, ...]] = {}
    wanted: set[int] = set()
    instructions: Sequence[Instruction] = program.instructions
    for position in reversed(range(len(instructions))):
        match instruction := instructions[position]:
            case Fetch() | Keep() | Push():
                wanted.update(instruction.buffers)
            case Feed() | Recv() | Read():
                wanted.difference_update(instruction.buffers)
            case Run():
                found[position] = tuple(i for i, b in enumerate(instruction.outputs) if b in wanted)
                wanted.difference_update(instruction.outputs)
            case _:
                pass
    return found


def checked(
    function: Callable[..., Sequence[Array]], task: Task, results: Sequence[int], names: Sequence[str]
) -> Callable[..., Sequence[Array]]:
    """The function of a task, which raises NonFiniteError for a value that `names` of settings forbid."""
    inexact = [i for i in results if jnp.issubdtype(wire_layout(task.outputs[i])[1], jnp.inexact)]

    def call(*buffers: Array) -> Sequence[Array]:
        with unchecked():  # JAX's own check would also look at values that do not leave the program
            made = function(*buffers)
        for i in inexact:
            values = np.asarray(made[i])
            for name in names:
                what, test = _SETTINGS[name]
                count = int(np.sum(test(values)))
                if count:
                    raise NonFiniteError(
                        f"a result {values.dtype}{list(values.shape)} of {task.name!r} has {what} in {count:,} of "
                        f"{values.size:,} places, and {name} is on; call the function itself to see the operation"
                    )
        return made

    return call
