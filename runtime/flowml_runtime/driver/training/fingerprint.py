"""Names the update of an optimizer, so that a fit that goes on can say that it is another one.

No buffer holds the learning rate or the schedule of an optimizer, but they are constants of the traced update. Versions
of JAX trace differently, so a name begins with the version, and only names of one version are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import xxhash

from flowml.training.evaluated import EvaluatingOptimizer
from flowml.training.valued import own_of
from flowml_runtime.driver.training.outcome import as_buffer


def fingerprint(optimizers: Iterable[tuple[Any, Any]], params: Any) -> str:
    """The name of the updates of these optimizers, each with a state, for these parameters: "VERSION DIGEST". Empty if
    one cannot be traced without arguments that only the user's loop would give."""
    digest = xxhash.xxh3_128()
    for optimizer, state in optimizers:
        try:
            alone = isinstance(optimizer, EvaluatingOptimizer)
            own = own_of(params) if alone else params
            traced = jax.make_jaxpr(optimizer.update_alone if alone else optimizer.update)(own, state, own)
        except Exception:  # it is the user's function, and raises what it likes
            return ""
        digest.update(re.sub(r"0x[0-9a-f]+", "", str(traced.jaxpr)).encode())  # without the addresses of functions
        for constant in traced.consts:
            digest.update(np.asarray(as_buffer(constant)).tobytes())
    return f"{jax.__version__} {digest.hexdigest()}"


def differ(there: str, here: str) -> bool:
    """Whether two names are known to be those of different updates."""
    (version, *_), (mine, *_) = there.split() or [""], here.split() or [""]
    return bool(version) and version == mine and there != here
