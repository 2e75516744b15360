"""The programs of the peers of `training` and `pipeline`; `roles` starts them.

`train` is data parallel training in plain JAX: one process uses `jax.jit`; several form one mesh with one device of
each process, the batch sharded over it, and XLA's collectives over gloo. `stage` runs one stage of a flowml plan alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flowml_tools.bench.orders import orders, say

if TYPE_CHECKING:
    import jax

    from flowml.plan import ArraySpec
    from flowml_runtime.execution.programs import LoadedProgram


def train(rank: str, processes: str, coordinator: str) -> None:
    """Answer an order of n steps with the seconds of one and the last loss. Every order starts from the same parameters
    and takes one untimed step first."""
    import jax

    if int(processes) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, int(processes), int(rank))
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from flowml_tools.bench import transformer

    mesh = Mesh(np.array(jax.devices()), ("replica",))
    everywhere, shared_out = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("replica"))
    share = transformer.BATCH // int(processes)
    mine = slice(int(rank) * share, (int(rank) + 1) * share)
    step = jax.jit(transformer.step, donate_argnums=(0, 1), out_shardings=everywhere)

    def batch(number: int) -> jax.Array:
        return jax.make_array_from_process_local_data(shared_out, transformer.batch(number)[mine])

    def run(count: int) -> tuple[float, float]:
        params = jax.device_put(transformer.init_params(), everywhere)
        state = jax.jit(transformer.optimizer().init, out_shardings=everywhere)(params)
        params, state, value = step(params, state, batch(0))
        jax.block_until_ready((params, state))
        start = time.perf_counter()
        for number in range(1, count + 1):
            params, state, value = step(params, state, batch(number))
        jax.block_until_ready((params, state))
        return (time.perf_counter() - start) / count, float(value)

    run(1)
    say("ready")
    for order in orders():
        say("{} {}".format(*run(int(order))))


def stage(path: str, number: str) -> None:
    """Run the tasks of one stage of the plan saved at `path`; answer with the seconds of a step, and of its applies.

    The program is executed like in a worker, but the inputs from other stages are there already, and nothing is sent.
    """
    import jax

    from flowml.plan import Plan
    from flowml_runtime.execution.programs import ExecutableCache, load_programs

    plan = Plan.load(path)
    assert plan.training is not None
    device = plan.training.replicas[0][int(number)]
    loaded = load_programs(plan, {device: jax.local_devices()[0]}, ExecutableCache(), python=False)[device]
    work, applies = _walk(loaded), _applies(loaded)
    say("ready")
    for _ in orders():
        start = time.perf_counter()
        work()
        middle = time.perf_counter()
        applies()
        say(f"{middle - start} {time.perf_counter() - middle}")


def _walk(loaded: LoadedProgram) -> Callable[[], None]:
    """One step of a program: its tasks in their order, with example arrays in place of received ones."""
    from flowml.instructions import Fetch, Free, Push, Run, Send

    code, given = loaded.program.instructions, _given(loaded)

    def walk() -> None:
        buffers: dict[int, Any] = {**loaded.constants, **given}
        for position, instruction in enumerate(code):
            match instruction:
                case Run(inputs=inputs, outputs=outputs):
                    results = loaded.runs[position](*[buffers[b] for b in inputs])
                    buffers.update(zip(outputs, results, strict=True))
                case Send() | Push() | Fetch():
                    for buffer in instruction.buffers:
                        np.asarray(buffers[buffer])  # a worker waits here too, because it sends computed values
                case Free():
                    for buffer in instruction.buffers:
                        del buffers[buffer]
                case _:
                    pass

    return walk


def _given(loaded: LoadedProgram) -> dict[int, np.ndarray]:
    """Buffer -> an example of the array that a Feed, Read or Recv of the program would bring."""
    from flowml.instructions import Feed, Read, Recv
    from flowml.plan import ArraySpec

    plan = loaded.plan
    assert plan.training is not None
    found: dict[int, np.ndarray] = {}
    for instruction in loaded.program.instructions:
        match instruction:
            case Feed(slots=slots):
                specs = [plan.inputs[s] for s in slots]
            case Read(store=store, leaves=leaves):
                specs = [plan.training.stores[store].specs[leaf] for leaf in leaves]
            case Recv(message=message):
                specs = [ArraySpec(t.shape, t.dtype) for t in plan.messages[message].transfers]
            case _:
                continue
        found.update((b, _example(s)) for b, s in zip(instruction.buffers, specs, strict=True))
    return found


def _applies(loaded: LoadedProgram) -> Callable[[], None]:
    """The updates of all stores that live on the program's device."""
    import jax

    training = loaded.plan.training
    assert training is not None
    homed = [s.applies.apply for s in training.stores if loaded.name in s.copies]
    calls = [(loaded.tasks[t], [_example(s) for s in loaded.plan.tasks[t].inputs]) for t in homed]
    return lambda: jax.block_until_ready([task(*arrays) for task, arrays in calls])


def _example(spec: ArraySpec) -> np.ndarray:
    """Ordinary numbers, like activations and gradients, in aligned memory, like the arrays that a worker receives."""
    from flowml_runtime.execution.programs import aligned_copy, buffer_struct

    struct = buffer_struct(spec)
    numbers = np.random.default_rng(0).uniform(1e-3, 1.0, struct.shape)
    return aligned_copy(numbers.astype(struct.dtype))
