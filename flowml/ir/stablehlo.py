"""Lists the operations that an executable may contain: those that compute only on a device's own arrays.

StableHLO has operations that act outside the device. A custom call runs any function that the process has registered
under its name, and one of these calls Python. Infeeds, sends and collectives wait for partners that a plan does not
have. Operations and targets of custom calls are therefore checked against lists of allowed ones. The compiler checks
what it exports, to report errors early. A worker checks what it receives, because it cannot know the author.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_DIALECTS = ("builtin.", "func.", "stablehlo.", "chlo.", "sdy.")

_OUTSIDE = frozenset(
    f"stablehlo.{name}"
    for name in (
        *("infeed", "outfeed", "send", "recv"),
        *("all_gather", "all_reduce", "all_to_all", "collective_broadcast", "collective_permute", "reduce_scatter"),
        *("cross-replica-sum", "partition_id", "replica_id"),
    )
)

_TARGETS = re.compile(
    r"lapack_[sdcz][a-z0-9]+_ffi"  # linear algebra on CPU
    r"|(cu|hip)(_lu_pivots_to_permutation|_threefry2x32|(solver|sparse|blas|fft)_[a-z0-9_]+)(_ffi)?"  # and on GPU
    r"|Eigh|Qr|LuDecomposition|ProductOfElementaryHouseholderReflectors"  # and on TPU
    r"|ApproxTopK|stablehlo\.dynamic_(approx_top_k|reduce_window|rng_bit_generator|top_k)"
    r"|Sharding|SPMDFullToShardShape|SPMDShardToFullShape|annotate_device_placement|AllocateBuffer"
    r"|tpu_custom_call|mosaic_gpu_v2"  # kernels, which run on the accelerator
)


def forbidden(operations: Iterable[tuple[str, str]]) -> str:
    """A description of the first forbidden pair (operation, target of a custom call or ""); "" if there is none."""
    for name, target in operations:
        if not name.startswith(_DIALECTS) or name in _OUTSIDE:
            return f"operation {name}"
        if name.endswith(".custom_call") and not _TARGETS.fullmatch(target):
            return f"a custom call of {target!r}"
    return ""
