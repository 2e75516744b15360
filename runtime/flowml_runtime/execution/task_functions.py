"""Makes the function of a task from its executable: compiled StableHLO, or Python where this worker allows it.

A worker in the process of the driver calls the functions of the driver's program, not copies of them. While a plan is
loaded, the driver offers its calls here by the plan's id. No other plan ever has that id, and the worker's part of the
plan keeps what it has found.

A task that calls Python is a pickled recipe (`flowml.lowering.recipe`), or a plain function of NumPy arrays. A recipe
that is one call runs on the thread of the step. Any other is traced and compiled here, and XLA calls the Python
functions on its own threads. XLA reports an exception of theirs as an error of its own, so the exception itself is kept
and raised instead.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import msgspec
import numpy as np

from flowml.captured import OwnCall
from flowml.ir import host
from flowml.ir._compiled import compiled
from flowml.ir._jax import CALLBACK_LOG, exact_types, is_wide, under
from flowml.ir.exports import Imported
from flowml.ir.keys import key_implementation
from flowml.lowering.recipe import Recipe
from flowml.plan import ArraySpec, Plan, Setting, Task
from flowml_runtime.transport.arrays import Array, wire_layout

JaxDevice = Any
"""jax.Device, which type checkers treat as a variable."""

TaskFunction = Callable[..., Sequence[Array]]
"""Takes the task's inputs as positional arguments, returns its outputs."""


class OwnCalls:
    """What the plans that are being loaded call in this process. Safe to use from any thread."""

    def __init__(self) -> None:
        self._offered: dict[str, tuple[OwnCall, ...]] = {}
        """Plan id -> the call of each task."""

    @contextmanager
    def offered(self, plan_id: str, plan: Plan) -> Generator[None]:
        """Inside the block, workers of this process find the calls of a plan."""
        self._offered[plan_id] = tuple([task.own for task in plan.tasks])
        try:
            yield
        finally:
            del self._offered[plan_id]

    def put_into(self, plan_id: str, plan: Plan) -> Plan:
        """A plan as it has arrived, with its calls if a driver of this process has sent it."""
        offered = self._offered.get(plan_id)
        if offered is None:
            return plan
        tasks = [msgspec.structs.replace(t, own=own) for t, own in zip(plan.tasks, offered, strict=True)]
        return msgspec.structs.replace(plan, tasks=tuple(tasks))


own_calls = OwnCalls()


class _Logged(logging.Filter):
    """Leaves out of JAX's log the errors of callbacks that the driver raises: JAX logs each with its traceback, on the
    thread that ran the callback."""

    def __init__(self) -> None:
        super().__init__()
        self._mine = threading.local()

    def leave_out(self, error: BaseException) -> None:
        self._mine.error = id(error)

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or getattr(self._mine, "error", None) != id(error):
            return True
        self._mine.error = None
        return False


_logged = _Logged()
logging.getLogger(CALLBACK_LOG).addFilter(_logged)


def buffer_struct(spec: ArraySpec) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the buffer of an array inside a worker and on the wire."""
    shape, dtype, _ = wire_layout(spec)
    return jax.ShapeDtypeStruct(shape, dtype)


def compile_module_of(task: Task, module: Imported, device: JaxDevice, donate: Sequence[int]) -> TaskFunction:
    """Compile the module of a task, as a function of the buffers of its arrays."""
    inputs, outputs = (tuple(map(buffer_struct, specs)) for specs in (task.inputs, task.outputs))
    call = module.compile(inputs, outputs, device, donate=donate, committed=_is_elsewhere(device))
    return _exactly(call) if any(is_wide(s.dtype) for s in task.inputs) else call


def _is_elsewhere(device: JaxDevice) -> bool:
    """Whether a task must name its device. On the default one results stay uncommitted, like jit's."""
    return device != jax.local_devices()[0]


def compile_task(
    run: Callable[..., Sequence[Any]],
    task: Task,
    device: JaxDevice,
    more: Sequence[jax.ShapeDtypeStruct] = (),
) -> TaskFunction:
    """Compile a function of the task's arrays as one of their buffers. It takes `more` arrays, and may return more."""
    keys = [key_implementation(s.dtype) if s.dtype.startswith("key<") else None for s in task.inputs]
    wrap = [*keys, *(None for _ in more)]
    unwrap = [s.dtype.startswith("key<") for s in task.outputs]

    def flat(*buffers: Any) -> list[Any]:
        arrays = [b if w is None else jax.random.wrap_key_data(b, impl=w) for b, w in zip(buffers, wrap, strict=True)]
        results = run(*arrays)
        known = [jax.random.key_data(r) if u else r for r, u in zip(results, unwrap, strict=False)]
        return [*known, *results[len(known) :]]

    options: dict[str, Any] = {}
    elsewhere = _is_elsewhere(device)
    if elsewhere:
        here = jax.sharding.SingleDeviceSharding(device)
        options = {"in_shardings": here, "out_shardings": here}
    jitted = jax.jit(flat, **options)
    call = compiled(jitted.lower(*[buffer_struct(s) for s in task.inputs], *more), committed=elsewhere)
    return _exactly(call) if any(is_wide(s.dtype) for s in task.inputs) else call


def _exactly(function: TaskFunction) -> TaskFunction:
    """The function, called so that 64-bit arrays keep their dtype."""

    def call(*buffers: Any) -> Sequence[Array]:
        with exact_types():
            return function(*buffers)

    return call


def python_task(function: Any, task: Task, settings: tuple[Setting, ...], device: JaxDevice) -> TaskFunction:
    """What was unpickled for a task, as a function of its buffers, which runs under the plan's JAX settings."""
    with under(settings):
        run = _traced(function, task, settings, device) if _needs_xla(function) else _called(function, task)

    def call(*buffers: Any) -> Sequence[Array]:
        with under(settings):
            return run(*buffers)

    return call


def _needs_xla(function: Any) -> bool:
    return isinstance(function, Recipe) and not function.is_call


def _traced(recipe: Recipe, task: Task, settings: tuple[Setting, ...], device: JaxDevice) -> TaskFunction:
    raised: dict[int, BaseException] = {}
    """Number of a run -> the first exception of its calls. Several threads may run the task at once."""
    numbers = itertools.count()

    def wrap(call: host.Call) -> Callable[..., Any]:
        def guarded(number: Any, *arrays: Any) -> list[np.ndarray]:
            try:
                with under(settings):  # XLA calls on a thread of its own
                    return call(*arrays)
            except BaseException as error:
                raised.setdefault(int(number), error)
                _logged.leave_out(error)
                raise

        return guarded

    def run(*arrays: Any) -> list[Any]:
        outputs, token = recipe.run(arrays[:-1], arrays[-1], wrap)
        return [*outputs, token]

    execute = compile_task(run, task, device, more=[jax.ShapeDtypeStruct((), np.int32)])

    def call(*buffers: Any) -> Sequence[Array]:
        number = next(numbers) % 2**31
        try:
            *outputs, _ = jax.block_until_ready(execute(*buffers, np.int32(number)))
        except Exception:
            if number in raised:
                raise raised[number] from None
            raise
        finally:
            raised.pop(number, None)
        return outputs

    return call


def _called(function: Callable[..., Any], task: Task) -> TaskFunction:
    structs = [buffer_struct(s) for s in task.outputs]

    def call(*buffers: Any) -> list[Any]:
        results = [np.asarray(r) for r in function(*[np.asarray(b) for b in buffers])]
        got = [(r.shape, r.dtype) for r in results]
        declared = [(tuple(s.shape), np.dtype(s.dtype)) for s in structs]
        if got != declared:
            raise TypeError(
                f"callback {task.name!r} returned {_listed(got)}, but was declared to return {_listed(declared)}"
            )
        return results

    return call


def _listed(arrays: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{dtype}[{','.join(map(str, shape))}]" for shape, dtype in arrays) or "nothing"
