"""Filters make what replicas send smaller: `flowml.Policy(filters=(top_k(0.01).with_error_feedback(), compress()))`.

Each function here makes a frozen value that travels in the plan. A new filter is one class that follows `Filter` and
is registered. Filters are applied in order, each to what the one before has left
(`chain`). Arithmetic stands in kernels, which run with NumPy or JAX (`base`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from flowml.errors import PolicyError
from flowml.policy.filters.base import Context as Context
from flowml.policy.filters.base import EncodingError as EncodingError
from flowml.policy.filters.base import Filter as Filter
from flowml.policy.filters.base import Form as Form
from flowml.policy.filters.base import Kernel as Kernel
from flowml.policy.filters.base import Run as Run
from flowml.policy.filters.base import State as State
from flowml.policy.filters.base import on_numpy as on_numpy
from flowml.policy.filters.base import wide as wide
from flowml.policy.filters.chain import RESIDUAL as RESIDUAL
from flowml.policy.filters.chain import Chain as Chain
from flowml.policy.filters.chain import check_array as check_array
from flowml.policy.filters.chain import check_chain as check_chain
from flowml.policy.filters.chain import check_differences as check_differences
from flowml.policy.filters.chain import compares as compares
from flowml.policy.filters.chain import decode as decode
from flowml.policy.filters.chain import encode as encode
from flowml.policy.filters.chain import feeds_back as feeds_back
from flowml.policy.filters.chain import is_lossless as is_lossless
from flowml.policy.filters.chain import most_bytes as most_bytes
from flowml.policy.filters.chain import nbytes as nbytes
from flowml.policy.filters.chain import rebuilt as rebuilt
from flowml.policy.filters.chain import remembers as remembers
from flowml.policy.filters.chain import sent_size as sent_size
from flowml.policy.filters.chain import wire_forms as wire_forms
from flowml.policy.filters.dense import BLOCK, LowRank, Quantise
from flowml.policy.filters.exchange import Exchange as Exchange
from flowml.policy.filters.exchange import Seat as Seat
from flowml.policy.filters.exchange import is_exchanged as is_exchanged
from flowml.policy.filters.exchange import slot_bytes as slot_bytes
from flowml.policy.filters.lossless import Compress, KeyCache
from flowml.policy.filters.sparse import KKT, RandomK, RandomSkip, Significance, TopK
from flowml.policy.filters.sums import Adding as Adding
from flowml.policy.filters.sums import Talk as Talk
from flowml.policy.filters.sums import add_up as add_up
from flowml.policy.filters.sums import is_additive as is_additive
from flowml.policy.filters.sums import sum_sizes as sum_sizes
from flowml.policy.kinds import register
from flowml.signatures import worded

if TYPE_CHECKING:  # all filters follow it, and msgspec asks for what follows a base that is no struct
    AnyFilter = Filter
else:
    from flowml.policy.filters.base import AnyFilter as AnyFilter

for _kind in (Significance, KKT, TopK, RandomK, RandomSkip, LowRank, Quantise, KeyCache, Compress):
    register(_kind)


def significance(threshold: float, decay: Literal["sqrt"] | None = "sqrt") -> Significance:
    """Sends an element when its magnitude is more than `threshold` times that of its parameter; until then it adds up.

    With `decay="sqrt"` the threshold falls with the number t of the step as 1 / √t (Hsieh et al., *Gaia*, NSDI 2017).
    The others are always kept for later pushes, so this filter has error feedback by itself.
    """
    return Significance(threshold=threshold, decay=decay, feedback=1.0)


def kkt(l1: float) -> KKT:
    """Leaves out gradients that an L1 penalty of weight `l1` cancels: at most `l1` where the parameter is zero (Li et
    al., *Parameter Server*, OSDI 2014)."""
    return KKT(l1=l1)


def top_k(share: float) -> TopK:
    """Sends the elements of largest magnitude: a share of each array (a float in (0, 1]) or a number of them (an int).

    Aji & Heafield, *Sparse communication*, 2017; Lin et al., *Deep gradient compression*, 2018.
    """
    return TopK(share=share)


def random_k(share: float) -> RandomK:
    """Sends elements chosen at random: a share of each array (a float in (0, 1]) or a number of them (an int).

    They are divided by the share, so that the expectation of what arrives is what was sent; not so with error feedback.
    """
    return RandomK(share=share)


def random_skip(share: float) -> RandomSkip:
    """Sends each element with probability `share`, divided by it; with error feedback it is not divided."""
    return RandomSkip(share=share)


def low_rank(rank: int) -> LowRank:
    """Sends two factors of `rank` columns instead of each matrix (Vogels et al., *PowerSGD*, 2019).

    Arrays for which that is not smaller pass unchanged.
    """
    return LowRank(rank=rank)


def quantise(bits: int, stochastic: bool = False, block: int = BLOCK) -> Quantise:
    """Sends 8, 4, 2 or 1 bits for each element, and a scale for each `block` elements (0: for the whole array).

    `stochastic` rounds up or down at random so that the expectation of what arrives is what was sent. With error
    feedback the scale is then the one with which the rounded elements are nearest to what they stand for.
    """
    return Quantise(bits=bits, stochastic=stochastic, block=block)


def sign() -> Quantise:
    """Sends the sign of each element, and the mean magnitude of the array: `quantise(1, block=0)` (Bernstein et al.,
    *signSGD*, 2018)."""
    return Quantise(bits=1, block=0)


def key_cache() -> KeyCache:
    """Sends a digest instead of the positions of sent elements, where they are those of the last push."""
    return KeyCache()


def compress(level: int = 1) -> Compress:
    """Compresses the bytes of what is sent with zlib. `level` is from 1, fast, to 9, small."""
    return Compress(level=level)


__all__ = [
    "significance",
    "kkt",
    "top_k",
    "random_k",
    "random_skip",
    "low_rank",
    "quantise",
    "sign",
    "key_cache",
    "compress",
]
"""The names of `flowml.filters`. The rest is for the compiler and the runtime."""

worded(globals(), __all__, PolicyError, "flowml.filters")


def __dir__() -> list[str]:
    return __all__
