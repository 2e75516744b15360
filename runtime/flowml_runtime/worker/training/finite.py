"""Checks whether gradients are finite. The option `on_nonfinite` says what happens to one that holds NaN or infinity.

refuse   the contribution is sent empty, and the driver is told which replica it came from (the default)
raise    the step fails
apply    gradients are not checked
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowml.plan import Part
from flowml_runtime.protocol.training.store_terms import StoreTerms


def all_finite(arrays: Sequence[Any]) -> bool:
    """Whether no array holds NaN or infinity. Reads each array once: a sum is finite only if all its terms are."""
    return all(_is_finite(np.asarray(a)) for a in arrays)


def counted(arrays: Sequence[Any], part: Part, microbatches: int) -> Sequence[Any]:
    """The arrays of a contribution that count: factors come as (a, delta, weight) for each microbatch, and those of a
    microbatch of weight 0 (a mean over no tokens is NaN) are multiplied by nothing at the home."""
    width = len(arrays) // microbatches
    if not part.factors or width < 3:
        return arrays
    sets = [arrays[i : i + width] for i in range(0, len(arrays), width)]
    return [array for one in sets if np.asarray(one[-1]) != 0 for array in one]


def is_weight_at_fault(arrays: Sequence[Any], part: Part, microbatches: int, *, weighted: bool) -> bool:
    """Whether the weight of a contribution is not finite: with it a part ends, or a set of factors. A weight below 0 is
    NaN here. A packed part has one if gradients are `weighted`."""
    if part.factors:
        width = len(arrays) // microbatches
        return width > 2 and not all_finite(arrays[width - 1 :: width])
    if part.pack is not None:
        return weighted and not all_finite([np.asarray(arrays[0])[-1:]])
    return not all_finite(arrays[len(part.leaves) :])


def _is_finite(array: np.ndarray[Any, Any]) -> bool:
    if array.dtype.kind in "biu":
        return True
    if array.dtype.kind in "fc" and array.dtype.itemsize >= 4:
        with np.errstate(all="ignore"):
            if np.isfinite(np.add.reduce(array, axis=None)):
                return True
    return bool(np.isfinite(array).all())  # finite values may have a sum that is not


def sender(terms: StoreTerms, replica: int) -> str:
    """Whose gradient this replica sends, in words: its own, or the sum of the site that it leads."""
    summed = not terms.relayed and any(site[0] == replica and len(site) > 1 for site in terms.sites)
    return f"the site of replica {replica}" if summed else f"replica {replica}"


def sentence(layer: str, terms: StoreTerms, replicas: Sequence[int], verb: str, *, weight: bool = False) -> str:
    """The message of the error that ends a step. Without replicas the sum over all of them is not finite. The `weight`
    may be at fault."""
    who = " and ".join(sender(terms, r) for r in replicas)
    if weight:
        return (
            f"the weight of {who or 'all replicas together'} is below 0 or not finite, so the gradient of layer "
            f"{layer!r} that it multiplies holds NaN or infinity; give weights that are finite and at least 0 by "
            "Trainer(weight=), or Trainer(on_nonfinite='refuse') to leave such gradients out"
        )
    whose = (
        f"which {who} {verb if len(replicas) == 1 else verb.removesuffix('s')}" if who else "added up over all replicas"
    )
    return (
        f"the gradient of layer {layer!r}, {whose}, holds NaN or infinity; lower the learning rate or look at the "
        "data of this step, or give Trainer(on_nonfinite='refuse') to leave such gradients out "
        "(an optimizer that adds noise for whole batches allows none to be left out)"
    )
