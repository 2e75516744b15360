"""Deserialises and compiles a plan's executables for the devices of a worker.

All slow and fallible work happens here, before the first step: StableHLO is deserialised and compiled once for each
(fingerprint, donation, device), constants are put on their device, and Python callbacks are unpickled where allowed,
unless this process has compiled them. A step only calls functions.

Inside a worker every array is a plain one: a typed PRNG key is held as its uint32 key data, and the compiled task wraps
and unwraps it. Tasks accept NumPy and JAX arrays, since an aligned NumPy view enters XLA on CPU without a copy.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import msgspec
import numpy as np

from flowml.errors import FlowmlError, UnsupportedError
from flowml.instructions import Feed, Fetch, Keep, Push, Read, Recv, Run, Send
from flowml.ir import _mlir
from flowml.ir._jax import compile_settings, exact_types, under
from flowml.ir.exports import Imported
from flowml.plan import Constant, Plan, Program, Task, fingerprint
from flowml_runtime.execution.debugging import checked, checks, leaving
from flowml_runtime.execution.task_functions import (
    JaxDevice,
    TaskFunction,
    buffer_struct,
    compile_module_of,
    python_task,
)
from flowml_runtime.execution.turns import Turns
from flowml_runtime.transport.arrays import Array, aligned_empty


def aligned_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A C-ordered copy that XLA can use without another copy."""
    copy = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


Parts = Mapping[str, np.ndarray]
"""Bytes of the executables that are sent separately from their plan, by name."""

_NO_PARTS: Parts = {}

Held = Mapping[tuple[str, int], Array]
"""(device, constant of the plan) -> the array there."""

_NONE_HELD: Held = {}


def executable_key(fingerprint: str) -> str:
    """The name of an executable among the parts of a plan."""
    return f"executable {fingerprint}"


def constant_array(constant: Constant, device: JaxDevice | None = None) -> jax.Array:
    """The buffer of a plan's constant on `device`. Raises FlowmlError if it has no bytes."""
    struct, captured = buffer_struct(constant.spec), constant.captured
    data = constant.data if captured is None else captured.data
    if data is None:
        raise FlowmlError("a plan came without an array that its function closes over; compile it again")
    values = np.frombuffer(data, struct.dtype).reshape(struct.shape)
    with exact_types():
        return jax.device_put(values, device)


def feed_slots(program: Program) -> tuple[int, ...]:
    """The inputs that the driver sends to this program's device each step, in the order of sending."""
    slots = (s for i in program.instructions if isinstance(i, Feed) for s in i.slots)
    return tuple(dict.fromkeys(slots))


def kept_slots(program: Program) -> tuple[int, ...]:
    """The outputs that a step of this program leaves on its device."""
    return tuple(s for i in program.instructions if isinstance(i, Keep) for s in i.slots)


def overwritten_slots(loaded: LoadedProgram) -> frozenset[int]:
    """The inputs of a dataflow program whose memory one of its tasks overwrites."""
    slots: dict[int, int] = {}
    found: set[int] = set()
    donations = safe_donations(loaded.plan, loaded.program)
    for position, instruction in enumerate(loaded.program.instructions):
        if isinstance(instruction, Feed):
            slots.update(zip(instruction.buffers, instruction.slots, strict=True))
        elif isinstance(instruction, Run):
            found |= {slots[b] for i in donations[position] if (b := instruction.inputs[i]) in slots}
            for buffer in instruction.outputs:
                slots.pop(buffer, None)
    return frozenset(found)


def store_tasks(plan: Plan, device: str) -> tuple[int, ...]:
    """The tasks that no instruction names: those with which stores on `device` apply, and its stages accumulate
    gradients and update local parameters."""
    if plan.training is None:
        return ()
    stores, replicas = plan.training.stores, plan.training.replicas
    applied = [t for s in stores if device in s.copies for t in s.applies.tasks]
    coupled = [s.coupled for s in stores if device in s.copies and s.coupled is not None]
    applied += [t for c in coupled for t in c.tasks]
    applied += [r.task for c in coupled for r in plan.training.couplings[c.coupling].rounds]
    gathered = [
        p.accumulate
        for s in stores
        for p in s.parts
        if p.accumulate is not None and s.every > 1 and any(r[p.stage] == device for r in replicas)
    ]
    local = [
        task
        for s in stores
        if s.local is not None and any(r[s.parts[0].stage] == device for r in replicas)
        for task in (s.local.update, s.local.send, s.local.take, s.local.fold, s.local.mix)
        if task is not None
    ]
    return tuple(dict.fromkeys((*applied, *gathered, *local)))


class _Compiled:
    """A callable that supports weak references, so that an executable lives while a loaded program uses it."""

    __slots__ = ("__weakref__", "call")

    def __init__(self, call: TaskFunction) -> None:
        self.call = call


class ExecutableCache:
    """Caches the executables of all workers of a process, so that equal tasks of their plans are compiled once.

    `turns` share the compilations with other processes.
    """

    def __init__(self, turns: Turns | None = None) -> None:
        self.turns = turns or Turns()
        self._lock = threading.Lock()
        self._turns: dict[Any, threading.Lock] = {}
        """For each key the lock of the thread that compiles it, so that it is compiled only once."""
        self._entries: weakref.WeakValueDictionary[Any, _Compiled] = weakref.WeakValueDictionary()

    def get(self, key: Any, make: Callable[[], TaskFunction]) -> _Compiled:
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                return found
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            with self._lock:
                found = self._entries.get(key)
            if found is None:
                found = _Compiled(make())
            with self._lock:
                self._entries[key] = found
                self._turns.pop(key, None)
        return found


@dataclass(frozen=True)
class LoadedProgram:
    """The compiled program of one device. `runs` maps the position of a Run in the program to its function."""

    plan: Plan
    program: Program
    device: JaxDevice
    runs: Mapping[int, TaskFunction]
    tasks: Mapping[int, TaskFunction]
    """Tasks that no Run names; see `store_tasks`."""
    constants: Mapping[int, Array]
    """Buffer -> resident array."""
    keep: tuple[object, ...] = field(default=(), repr=False)
    """Objects that must stay alive to keep the functions in the worker's cache."""

    @property
    def name(self) -> str:
        return self.program.device


@dataclass(frozen=True)
class _Need:
    """One function to compile: task `task` of the plan on `device`, which may overwrite the arguments `donate`."""

    task: int
    donate: tuple[int, ...]
    device: JaxDevice


def load_programs(
    plan: Plan,
    devices: Mapping[str, JaxDevice],
    cache: ExecutableCache,
    *,
    python: bool,
    parts: Parts = _NO_PARTS,
    held: Held = _NONE_HELD,
    rehearse: bool = False,
) -> dict[str, LoadedProgram]:
    """Compile what `plan` runs on `devices` (name -> JAX device). Raises FlowmlError naming task and device.

    `held` are the constants that are on the devices already. The loaded programs do not keep the serialised
    executables and constants. `rehearse`: run each task once, because the first run of an executable takes longer.
    """
    mine = [p for p in plan.programs if p.device in devices]
    donations = {p.device: safe_donations(plan, p) for p in mine}
    homed = {p.device: store_tasks(plan, p.device) for p in mine}
    needs: set[_Need] = set()
    for program in mine:
        device = devices[program.device]
        needs |= {_Need(_run(program, i).task, d, device) for i, d in donations[program.device].items()}
        needs |= {_own(plan, t, device) for t in homed[program.device]}
    ready = _make_all(plan, needs, cache, python, parts, rehearse=rehearse)
    resident = {
        (p.device, i): held[p.device, i]
        if (p.device, i) in held
        else constant_array(plan.constants[i], devices[p.device])
        for p in mine
        for _, i in p.constants
    }
    plan = msgspec.structs.replace(plan, executables={}, constants=())
    return {
        p.device: _assemble(plan, p, devices[p.device], donations[p.device], homed[p.device], ready, resident)
        for p in mine
    }


def _assemble(
    plan: Plan,
    program: Program,
    device: JaxDevice,
    donations: Mapping[int, tuple[int, ...]],
    homed: Iterable[int],
    ready: Mapping[_Need, _Compiled],
    resident: Mapping[tuple[str, int], jax.Array],
) -> LoadedProgram:
    runs = {i: ready[_Need(_run(program, i).task, donate, device)] for i, donate in donations.items()}
    tasks = {t: ready[_own(plan, t, device)] for t in homed}
    functions = {i: c.call for i, c in runs.items()}
    if names := tuple(checks(plan)):
        for i, results in leaving(program).items():
            functions[i] = checked(functions[i], plan.tasks[_run(program, i).task], results, names)
    return LoadedProgram(
        plan=plan,
        program=program,
        device=device,
        runs=functions,
        tasks={t: c.call for t, c in tasks.items()},
        constants={buffer: resident[program.device, index] for buffer, index in program.constants},
        keep=(*runs.values(), *tasks.values()),
    )


def _own(plan: Plan, task: int, device: JaxDevice) -> _Need:
    """A task that no instruction names. Only a fold may overwrite arguments: nothing else reads its accumulator."""
    folds = plan.training is not None and any(s.applies.fold == task for s in plan.training.stores)
    return _Need(task, _usable(plan.tasks[task], plan.tasks[task].donate) if folds else (), device)


def _run(program: Program, position: int) -> Run:
    instruction = program.instructions[position]
    assert isinstance(instruction, Run)
    return instruction


def safe_donations(plan: Plan, program: Program) -> dict[int, tuple[int, ...]]:
    """For the position of each Run, the arguments whose buffers it may overwrite.

    A task lists what the compiler allows. This function removes buffers that may still be read: a buffer that was sent,
    fetched or pushed may be read by another thread of this process, and a constant or a stored parameter is read again
    by the next step. An argument that is given twice cannot be donated either.
    """
    lent = {buffer for buffer, _ in program.constants}
    found: dict[int, tuple[int, ...]] = {}
    for position, instruction in enumerate(program.instructions):
        match instruction:
            case Run():
                task = plan.tasks[instruction.task]
                times = Counter(instruction.inputs)
                free = [i for i in task.donate if (b := instruction.inputs[i]) not in lent and times[b] == 1]
                found[position] = _usable(task, free)
                lent.difference_update(instruction.outputs)
            case Send() | Fetch() | Keep() | Push() | Read():
                lent.update(instruction.buffers)
            case Feed() | Recv():
                lent.difference_update(instruction.buffers)
            case _:
                pass
    return found


def _usable(task: Task, donate: Iterable[int]) -> tuple[int, ...]:
    """The donations that an output of the same shape and dtype can use: XLA warns of others."""
    if task.kind != "xla":
        return ()
    room = Counter((s.shape, s.dtype) for s in task.outputs)
    kept: list[int] = []
    for position in donate:
        kind = (task.inputs[position].shape, task.inputs[position].dtype)
        if room[kind] > 0:
            room[kind] -= 1
            kept.append(position)
    return tuple(kept)


def _make_all(
    plan: Plan, needs: Iterable[_Need], cache: ExecutableCache, python: bool, parts: Parts, *, rehearse: bool
) -> dict[_Need, _Compiled]:
    _check_settings(plan)
    ordered = sorted(needs, key=lambda n: (n.task, n.donate, n.device.id))
    executables = _read_executables(plan, ordered, parts)

    def make(need: _Need) -> _Compiled:
        task = plan.tasks[need.task]
        if task.kind == "python":
            return _Compiled(_load_python(plan, task, need.device, python, parts))
        if task.kind != "xla":
            raise FlowmlError(f"task {task.name!r} is of kind {task.kind!r}; this worker knows 'xla' and 'python'")
        found = executables[task.executable]
        try:
            with under(plan.settings):
                return cache.get(
                    (found.digest, need.donate, need.device, compile_settings()),
                    lambda: compile_module_of(task, found.module, need.device, need.donate),
                )
        except FlowmlError:
            raise
        except Exception as error:  # any error of XLA
            reason = str(error).strip().partition("\n")[0]
            raise FlowmlError(f"task {task.name!r} cannot be compiled: {type(error).__name__}: {reason}") from error

    def key(need: _Need) -> tuple[Any, ...]:
        """Tasks of one key are made once. One Python function may be declared to return several shapes, and functions
        of this process may have one pickled form."""
        task = plan.tasks[need.task]
        call = (task.outputs, id(task.own.call)) if task.kind == "python" else ()
        return task.executable, need.donate, need.device, call

    def turn(key: tuple[Any, ...]) -> str:
        if key[0] not in executables:
            return ""
        return fingerprint(repr((executables[key[0]].digest, key[1], key[2].id)).encode())

    made = cache.turns.make_all({key(n): partial(make, n) for n in ordered}, turn)
    for need in {key(n): n for n in ordered}.values() if rehearse else ():
        task = plan.tasks[need.task]
        if task.kind == "xla":
            with suppress(Exception), under(plan.settings):  # what is wrong is said when a step runs it
                if not executables[task.executable].module.may_not_end():
                    _rehearse(task, made[key(need)].call, need.device)
    return {n: made[key(n)] for n in ordered}


def _rehearse(task: Task, call: TaskFunction, device: JaxDevice) -> None:
    """Run a task on zeros. It is pure: other code is in tasks of another kind."""
    with exact_types():
        zeros = [jax.device_put(np.zeros(s.shape, s.dtype), device) for s in map(buffer_struct, task.inputs)]
    jax.block_until_ready(call(*zeros))


def _check_settings(plan: Plan) -> None:
    for setting in plan.settings:
        try:
            with under((setting,)):
                pass
        except (TypeError, ValueError) as error:
            raise FlowmlError(
                f"plan {plan.name!r} brings JAX setting {setting[0]!r} with value {setting[1]!r}, which this worker "
                f"does not accept ({error}); compile the plan with the worker's versions of flowml and jax"
            ) from None


def _executable(plan: Plan, key: str, parts: Parts) -> bytes:
    data = plan.executables.get(key)
    part = parts.get(executable_key(key))
    if data is None and part is not None:
        data = part.tobytes()
    if data is None:
        raise FlowmlError(f"plan {plan.name!r} lacks executable {key!r}; compile it again")
    return data


@dataclass(frozen=True)
class _Executable:
    """A checked executable. Plans share compiled executables by digest and not by the plan's name for them, because
    that name may be wrong."""

    digest: str
    module: Imported


def _read_executables(plan: Plan, needs: Iterable[_Need], parts: Parts) -> dict[str, _Executable]:
    """Read and check what the tasks of `needs` run. Raises FlowmlError for what no worker runs, or other arrays."""
    context = _mlir.context()
    found: dict[str, _Executable] = {}
    for number, platform in dict.fromkeys((n.task, n.device.platform) for n in needs):
        task = plan.tasks[number]
        if task.kind != "xla":
            continue
        if task.executable not in found:
            data = _executable(plan, task.executable, parts)
            try:
                found[task.executable] = _Executable(fingerprint(data), Imported(data, platform, context))
            except UnsupportedError as error:
                raise FlowmlError(
                    f"the executable of task {task.name!r} {error}; compile the plan with flowml"
                ) from None
        _check(task, found[task.executable].module, platform)
    return found


def _check(task: Task, module: Imported, platform: str) -> None:
    if not module.fits:
        raise FlowmlError(
            f"task {task.name!r} was compiled for {', '.join(module.platforms)}, but its device is a {platform}; "
            "compile the plan for the devices that it will run on"
        )
    inputs, outputs = (tuple(map(buffer_struct, specs)) for specs in (task.inputs, task.outputs))
    if not module.takes(inputs, outputs):
        raise FlowmlError(
            f"the executable of task {task.name!r} has other arrays than the task; compile the plan again"
        )


def _load_python(plan: Plan, task: Task, device: JaxDevice, allowed: bool, parts: Parts) -> TaskFunction:
    if not allowed:
        raise FlowmlError(
            f"task {task.name!r} is a Python callback, and this worker does not run Python from plans; "
            "start it with allow_python=True if you trust whoever sends it plans"
        )
    function = task.own.call
    if function is None:
        import cloudpickle

        function = cloudpickle.loads(_executable(plan, task.executable, parts))
    return python_task(function, task, plan.settings, device)
