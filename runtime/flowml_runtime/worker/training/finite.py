"""Checks whether gradients are finite. The option `on_nonfinite` says what happens to one that holds NaN or infinity.

refuse   the contribution is sent empty, and the driver is told which replica it came from (the default)
raise    the step fails
apply    gradients are not checked
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def all_finite(arrays: Sequence[Any]) -> bool:
    """Whether no array holds NaN or infinity. Reads each array once: a sum is finite only if all its terms are."""
    return all(_is_finite(np.asarray(a)) for a in arrays)


def _is_finite(array: np.ndarray[Any, Any]) -> bool:
    if array.dtype.kind in "biu":
        return True
    if array.dtype.kind in "fc" and array.dtype.itemsize >= 4:
        with np.errstate(all="ignore"):
            if np.isfinite(np.add.reduce(array, axis=None)):
                return True
    return bool(np.isfinite(array).all())  # finite values may have a sum that is not


def sentence(layer: str, whose: str) -> str:
    """The message of the error that ends a step."""
    return (
        f"the gradient of layer {layer!r}, {whose}, holds NaN or infinity; lower the learning rate or look at the "
        "data of this step, or give Trainer(on_nonfinite='refuse') to leave such gradients out"
    )
