"""Computes random numbers that depend only on the seed, the worker and the step, and on no order of calls.

A draw is a hash of its counters (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011). So a simulation
gets the same compute times in whatever order its events happen, and an array of draws equals the draws one by one. The
hash is the finaliser of SplitMix64 (Steele et al., OOPSLA 2014), applied once per counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Counters: TypeAlias = int | NDArray[np.int64]
"""Numbers of workers or of steps, from 0. Arrays broadcast against each other."""

_WORD = 2**64 - 1
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def uniform(seed: int, workers: Counters, steps: Counters, stream: int) -> Floats:
    """Numbers in the open interval (0, 1), of the broadcast shape. Different streams are independent.

    All seeds that are equal modulo 2**64 are one seed.
    """
    shape = np.broadcast_shapes(np.shape(workers), np.shape(steps))
    state = np.array([seed & _WORD], np.uint64)
    for counter in (stream, workers, steps):
        state = mixed(state ^ np.atleast_1d(np.asarray(counter, np.int64)).view(np.uint64))
    # 52 bits and a half fit into a float64 exactly, so 0 and 1 never occur.
    found = ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return np.broadcast_to(found, shape or (1,)).reshape(shape)


def normal(seed: int, workers: Counters, steps: Counters, stream: int) -> Floats:
    """Standard normal numbers by the method of Box and Muller (1958). Uses the streams `stream` and `stream + 1`."""
    radius = np.sqrt(-2 * np.log(uniform(seed, workers, steps, stream)))
    return radius * np.cos(2 * np.pi * uniform(seed, workers, steps, stream + 1))


def mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each word as one that looks like chance."""
    state = state + _INCREMENT
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def hashed(times: Sequence[float], firsts: Sequence[int], labels: Sequence[int]) -> tuple[int, int]:
    """Two sums over events of a hash of each, modulo 2**64. Each time is that of the labels from its place in `firsts`
    to the next one; the last of `firsts` is the number of labels."""
    when = np.repeat(np.asarray(times, np.float64), np.diff(firsts))
    found = mixed(mixed(when.view(np.uint64)) ^ np.asarray(labels, np.int64).view(np.uint64))
    return int(found.sum()), int(mixed(found).sum())
