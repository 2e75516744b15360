"""Compiles modules of StableHLO as jit compiles its own, without lowering them again.

`jax.jit` makes from a module a `jax.stages.Lowered`, which compiles itself with JAX's persistent cache and is called on
JAX's fast path. There is no public way to make one from a module. The one of a trivial function serves as template:
everything that does not follow from the arrays is the template's, whatever the version of JAX has there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from flowml.ir._jax import array_type

_DEVICES = 64
"""The templates that are kept."""


def compile_module(
    module: Any,
    inputs: Sequence[jax.ShapeDtypeStruct],
    outputs: Sequence[jax.ShapeDtypeStruct],
    device: Any,
    *,
    committed: bool,
) -> jax.stages.Compiled:
    """Compile a module from `inputs` to the list of `outputs` for a device.

    Unless `committed`, it runs on the default device, and its results are not bound to a device, as with jit.
    """
    template = _template(device, committed)
    given, made = ([array_type(s, weak=False) for s in structs] for structs in (inputs, outputs))
    arguments = {
        **template.compile_args,
        "global_in_avals": given,
        "global_out_avals": made,
        "in_shardings": template.compile_args["in_shardings"] * len(given),
        "out_shardings": template.compile_args["out_shardings"] * len(made),
        "in_layouts": (None,) * len(given),
        "out_layouts": (None,) * len(made),
        "kept_var_idx": set(range(len(given))),
        "all_args_info": None,
    }
    lowering = type(template)(
        "task",
        module,
        [],
        (False,) * len(given),
        template._platforms,
        template._compiler_options_kvs,
        template._device_list,
        **arguments,
    )
    information = (tuple(jax.stages.ArgInfo(a, False) for a in given), {})
    lowered = jax.stages.Lowered(lowering, cast(Any, information), jax.tree_util.tree_structure([0] * len(made)))
    return compiled(lowered, committed=committed)


@lru_cache(_DEVICES)
def _template(device: Any, committed: bool) -> Any:
    options: dict[str, Any] = {}
    if committed:
        here = jax.sharding.SingleDeviceSharding(device)
        options = {"in_shardings": here, "out_shardings": here}
    return cast(Any, jax.jit(lambda x: x, **options).lower(jax.ShapeDtypeStruct((), np.float32)))._lowering


def compiled(lowered: jax.stages.Lowered, *, committed: bool) -> jax.stages.Compiled:
    """Compile a lowered program. Unless `committed`, its results are not bound to a device, as with jit.

    JAX by default binds the results of a program that calls an exported one. It also refuses arrays of 2 or 4 bits
    that are bound to a device, because they name their layout in another way than the program. jit takes them.
    """
    options = cast(Any, lowered)._lowering.compile_args
    if not committed and "committed" in options:
        options["committed"] = False
    made = lowered.compile()
    executable: Any = getattr(made, "_executable", None)
    layouts: Any = getattr(executable, "_xla_in_layouts", None)
    if layouts is not None:
        narrow = [_is_narrow(aval.dtype) for aval in executable.in_avals]
        executable._xla_in_layouts = [None if n else x for x, n in zip(layouts, narrow, strict=True)]
    return made


def _is_narrow(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended) and str(dtype).lstrip("u").startswith(
        ("int2", "int4", "float4")
    )
