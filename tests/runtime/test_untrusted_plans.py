"""What a worker does with plans that no compiler of ours made: it refuses them in one sentence and stays well."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import flowml as fm
from flowml.ir import _mlir
from flowml.plan import Plan, fingerprint

X = jnp.linspace(0.0, 1.0, 4)


@pytest.fixture(scope="module", params=["threads", "processes"])
def cluster(request: pytest.FixtureRequest) -> Iterator[fm.Cluster]:
    make = fm.Cluster.threads if request.param == "threads" else fm.Cluster.local
    with make(workers=1) as cluster:
        yield cluster


def honest() -> Plan:
    return fm.compile(lambda x: jnp.sin(x) + 1, X, devices=["worker:0"])


def with_executable(plan: Plan, data: bytes) -> Plan:
    """The plan, which an attacker gave another executable under a fingerprint that fits."""
    key = fingerprint(data)
    (task,) = plan.tasks
    return msgspec.structs.replace(
        plan, tasks=(msgspec.structs.replace(task, executable=key),), executables={key: data}
    )


def exported(fn: Callable[..., Any], **options: Any) -> bytes:
    """What the compiler would make of a function if it looked away."""
    return msgspec.msgpack.encode({"cpu": _mlir.write(jax.jit(fn, **options).lower(X).compiler_ir())})


def calls(target: str) -> bytes:
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    return exported(lambda x: (jax.ffi.ffi_call(target, shape)(x, index=np.uint64(0)),))


def stays_well(cluster: fm.Cluster) -> None:
    np.testing.assert_allclose(fm.dataflow(lambda x: x * 3, cluster=cluster)(X), X * 3)


@pytest.mark.parametrize(
    "target",
    [
        "xla_ffi_python_cpu_callback",
        "xla_ffi_partitioned_python_cpu_callback",
        "xla_buffer_python_cpu_callback",
        "xla_python_cpu_callback",
        "xla_ffi_python_gpu_callback",
        "tf.call_tf_function",
        "dce_sink",
        "anybodys",
    ],
)
def test_a_custom_call_that_is_not_on_the_list_is_refused(target: str, cluster: fm.Cluster) -> None:
    plan = with_executable(honest(), calls(target))
    with pytest.raises(fm.WorkerError, match=f"cannot load plan.*holds a custom call of '{target}', which no worker"):
        cluster.session.load(plan)
    stays_well(cluster)


def test_a_custom_call_inside_a_loop_is_found(cluster: fm.Cluster) -> None:
    def fn(x: jax.Array) -> Any:
        call = jax.ffi.ffi_call("anybodys", jax.ShapeDtypeStruct(x.shape, x.dtype))
        return (jax.lax.fori_loop(0, 3, lambda _, v: jax.lax.cond(v[0] > 0, call, jnp.sin, v), x),)

    with pytest.raises(fm.WorkerError, match="holds a custom call of 'anybodys'"):
        cluster.session.load(with_executable(honest(), exported(fn)))


@pytest.mark.parametrize("collective", ["psum", "all_gather"])
def test_operations_that_wait_for_partners_are_refused(collective: str, cluster: fm.Cluster) -> None:
    def fn(x: jax.Array) -> Any:
        one = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
        inside = {
            "psum": lambda v: jax.lax.psum(v, "i"),
            "all_gather": lambda v: jax.lax.all_gather(v, "i", tiled=True),
        }
        spec = jax.sharding.PartitionSpec("i")
        each = jax.shard_map(inside[collective], mesh=one, in_specs=spec, out_specs=spec, check_vma=False)
        return (each(x),)

    with pytest.raises(fm.WorkerError, match=r"cannot load plan.*holds"):
        cluster.session.load(with_executable(honest(), exported(fn)))


def test_a_plan_runs_its_own_executable_whatever_it_calls_it(cluster: fm.Cluster) -> None:
    """An executable under the fingerprint of another does not become everybody's."""
    plan = honest()
    (key,) = plan.executables
    other = msgspec.structs.replace(plan, executables={key: exported(lambda x: (x * 0,))})
    for given, expected in ((plan, jnp.sin(X) + 1), (other, X * 0), (plan, jnp.sin(X) + 1)):
        handle = cluster.session.load(given)
        np.testing.assert_allclose(cluster.session.call(handle, [X])[0], expected, rtol=1e-6)
    with pytest.raises(fm.WorkerError, match="lacks executable"):
        cluster.session.load(msgspec.structs.replace(plan, executables={}))


@pytest.mark.parametrize(
    "fn",
    [lambda x: (x[:2],), lambda x: (x, x), lambda x: (x.astype(int),), lambda x: ()],
    ids=["shape", "two", "dtype", "none"],
)
def test_an_executable_of_other_arrays_is_refused(fn: Any, cluster: fm.Cluster) -> None:
    with pytest.raises(fm.WorkerError, match="has other arrays than the task"):
        cluster.session.load(with_executable(honest(), exported(fn)))
    stays_well(cluster)


def test_an_executable_overwrites_no_arguments_of_its_own_accord(cluster: fm.Cluster) -> None:
    data = exported(lambda x: (x + 2,), donate_argnums=0)
    handle, given = cluster.session.load(with_executable(honest(), data)), X + 1
    for _ in range(2):
        np.testing.assert_allclose(cluster.session.call(handle, [given])[0], X + 3)
    np.testing.assert_allclose(given, X + 1)


def test_an_executable_for_other_devices_is_refused(cluster: fm.Cluster) -> None:
    (data,) = honest().executables.values()
    modules = msgspec.msgpack.decode(data, type=dict[str, bytes])
    with pytest.raises(fm.WorkerError, match="was compiled for tpu, but its device is a cpu"):
        cluster.session.load(with_executable(honest(), msgspec.msgpack.encode({"tpu": modules["cpu"]})))


def test_damaged_executables_are_refused_or_run(seed: int) -> None:
    """Bytes changed, cut off and added, under fingerprints that fit: each is refused, or is a program that runs.

    A few bytes corrupt the memory of the reader of MLIR bytecode itself, in plain JAX too. The worker ends, or hangs
    until it is killed, and the caller gets the error of a lost worker.
    """
    plan, draw = honest(), random.Random(seed)
    (good,) = plan.executables.values()
    refused, left = 0, 60
    while left:
        with fm.Cluster.local(workers=1) as cluster, suppress(fm.WorkerLostError):
            while left:
                left -= 1
                data = bytearray(good)
                for _ in range(draw.randrange(1, 4)):
                    data[draw.randrange(len(data))] = draw.randrange(256)
                data = data[: draw.choice([len(data), len(data), draw.randrange(len(data))])]
                hung = threading.Timer(10.0, os.kill, (cluster.pids["worker:0"], signal.SIGKILL))
                hung.start()
                try:
                    handle = cluster.session.load(with_executable(plan, bytes(data)))
                except fm.WorkerLostError as error:
                    assert "worker:0 was lost while it compiled" in str(error)
                    raise
                except fm.WorkerError as error:
                    assert "cannot load plan" in str(error) and "\n" not in str(error)
                    refused += 1
                else:
                    cluster.session.unload(handle)
                finally:
                    hung.cancel()
            stays_well(cluster)
    assert refused > 20
