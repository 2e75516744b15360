"""Defines what a filter is: a frozen value that makes an array smaller before it is sent, and rebuilds it afterwards.

A filter is two pure functions and explicit state (as a transformation in optax):

    encode(value, state, context) -> (parts, state)          on the sender
    decode(parts, form, run) -> value                        on the receiver

`value` is one array, and `parts` are one or more arrays. Each part has a *role*, which says what a later filter of the
chain may do with it. `layout(form)` states the parts' forms before any value is known, so that a receiver can check
every length. `chain` applies several filters in turn.

Arithmetic on whole arrays stands in *kernels*: pure functions of arrays that take their array namespace as `xp`. A
filter gives a kernel to `run`, which calls it with NumPy (`on_numpy`), or as a JAX task on the device that holds the
arrays. An exact kernel gives the same bits both ways, so that who runs it does not change a fit. It avoids what
compilers may contract or reorder: a product that is added to something, a division by a constant, and the sum of an
array. It takes subnormal numbers as zero, because XLA may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import msgspec
import numpy as np

from flowml import numbers
from flowml.arrays import ArraySpec, dtype_of
from flowml.errors import FlowmlError, PolicyError
from flowml.policy.kinds import Knob
from flowml.policy.wording import Value

Array = np.ndarray[Any, Any]
State = Mapping[str, Array]
"""The buffers of one filtered array, by name. They live between pushes."""

Kernel = Callable[..., Any]
"""kernel(*arrays, **numbers, xp): `numbers` decide shapes, and `xp` is NumPy, or jax.numpy with `jax.lax.top_k`."""


class Run(Protocol):
    """Runs a kernel. One that is not `exact` gives results that may differ in the last bits."""

    def __call__(self, kernel: Kernel, *arrays: Any, exact: bool = True, **numbers: Any) -> Any: ...


def on_numpy(kernel: Kernel, *arrays: Any, exact: bool = True, **numbers: Any) -> Any:
    """Run a kernel with NumPy, on whichever arrays: those of JAX would multiply matrices by themselves."""
    return kernel(*(a if a is None else np.asarray(a) for a in arrays), **numbers, xp=np)


Role = Literal["values", "keys", "codes"]
"""`values` are real numbers, `keys` say which elements of an array are sent, `codes` are anything else."""


class EncodingError(FlowmlError, ValueError):
    """Received arrays are not what a filter can have made."""


class Form(NamedTuple):
    """Shape, dtype and role of an array that a filter takes or makes.

    A form that is not `exact` is one-dimensional, and its shape is the largest possible.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    role: Role = "values"
    exact: bool = True

    @staticmethod
    def of(spec: ArraySpec) -> Form:
        return Form(spec.shape, dtype_of(spec.dtype))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class Added(NamedTuple):
    """What a replica knows after a sum of filtered arrays.

    Attributes:
        own: decodes what this replica has added.
        total: decodes the total. The bits are the same on every machine.
        state: the state for the next push, which is the same on all replicas.
    """

    own: Callable[[], Array]
    total: Callable[[], Array]
    state: Array | None = None


class Context(NamedTuple):
    """What an encoder knows of a push besides its value.

    Attributes:
        seed: seeds everything random. Equal seeds give equal results.
        clock: the number of the step, from 0.
        weight: the number of gradients that the value is the sum of, or their total weight.
        parameter: the parameter that the value is a gradient of, of the same shape.
        feedback: whether what the chain loses now is sent later. Random filters then do not scale what they keep.
        run: runs the kernels.
    """

    seed: tuple[int, ...] = (0,)
    clock: int = 0
    weight: float = 1.0
    parameter: Array | None = None
    feedback: bool = False
    run: Run = on_numpy

    def rng(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self.seed)))

    def uniform(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Numbers in [-1, 1), the same for equal seeds in all versions of NumPy, which may change distributions."""
        raw = np.random.Philox(np.random.SeedSequence(self.seed)).random_raw(math.prod(shape))
        return ((raw >> np.uint64(11)) * 2.0**-52 - 1).astype(dtype).reshape(shape)


class AnyFilter(Knob):
    """The base of what plans hold as filters."""

    __slots__ = ()


class Filter(AnyFilter, Value, frozen=True, tag=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the filters. `feedback` is the share of what the chain loses that is added to the next value; 0: none.

    Class attributes:
        call: the name of the function in `flowml.filters` that makes it.
        takes: the role of the arrays that it works on; None means any.
        gives: the roles of its parts.
        lossless: whether `decode` returns the value itself.
        first: whether it needs an array as it is, and so must be the first filter.
        compares: whether it compares values with parameters.
        remembers: whether its parts have a meaning only together with those of earlier pushes.
        exact: whether `decode` gives the same bits on every machine.
        additive: whether replicas with one seed can add up what they encode; see `sums`.
        of_factors: whether the product of two filtered factors stands for that of the factors.
        of_gradients: whether it is about gradients alone, and not about changes of parameters.
    """

    feedback: float = 0.0

    call: ClassVar[str]
    takes: ClassVar[Role | None] = "values"
    gives: ClassVar[frozenset[Role]]
    lossless: ClassVar[bool] = False
    first: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    of_factors: ClassVar[bool] = False
    of_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.feedback and self.lossless:
            raise PolicyError(f"{self.call}() loses nothing, so error feedback has no effect; leave it out")

    def with_error_feedback(self, decay: float = 1.0) -> Self:
        """The filter with error feedback: what the chain loses of a value is kept and added to the next one.

        With a `decay` below 1 it is multiplied by `decay` before, so that old losses are forgotten (Sarfi et al.,
        *SparseLoCo*, 2025). Raises PolicyError for a decay outside (0, 1].

        Seide et al., *1-bit stochastic gradient descent*, 2014; Karimireddy et al., *Error feedback fixes SignSGD and
        other compression schemes*, 2019.
        """
        share = real(f"{self.call}(…).with_error_feedback", decay, "the share of a loss that is kept, in (0, 1]")
        if not 0 < share <= 1:
            raise PolicyError(
                f"{self.call}(…).with_error_feedback({share}): what is kept is a share in (0, 1] of a loss"
            )
        return msgspec.structs.replace(self, feedback=share)

    def contracts(self) -> bool:
        """Whether what it loses of a value is smaller than the value, if it may be sent later."""
        return True

    def layout(self, form: Form) -> tuple[Form, ...] | None:
        """The forms of the parts that it makes of an array of `form`. None: it leaves such an array as it is."""
        raise NotImplementedError

    def encode(self, value: Array, state: Array | None, context: Context) -> tuple[list[Array], Array | None]:
        """The parts, and the state for the next push. `state` is None at the first."""
        raise NotImplementedError

    def decode(self, parts: Sequence[Array], form: Form, run: Run = on_numpy) -> Array:
        """The value, of exactly `form`. Raises EncodingError for parts that `encode` cannot have made."""
        raise NotImplementedError

    def recall(
        self, parts: Sequence[Array], form: Form, memory: Array | None, run: Run = on_numpy
    ) -> tuple[Array, Array | None]:
        """Like `decode`, with a buffer of the receiver that lives between pushes. Most filters need none."""
        return self.decode(parts, form, run), memory

    def add_up(self, value: Array, state: Array | None, context: Context) -> Generator[Array, Array, Added]:
        """An additive filter's part in the sum of an array: yields what this replica adds, and is sent the total."""
        raise NotImplementedError

    def summed(self, form: Form) -> tuple[Form, ...]:
        """What an additive filter adds in each sum."""
        return tuple(part for part in self.layout(form) or () if part.role == "values")

    def count(self, parts: Sequence[Array], form: Form) -> int:
        """The length of the part after `parts`, for a part whose length only its values decide."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"fm.filters.{self}" if type(self).__module__.startswith("flowml.") else str(self)

    def __str__(self) -> str:
        """The call that makes it, as in `top_k(0.01).with_error_feedback()`."""
        values = [(f.name, getattr(self, f.name), f.required, f.default) for f in msgspec.structs.fields(self)]
        given = [
            repr(v) if needed else f"{n}={v!r}"
            for n, v, needed, usual in values
            if v != usual and n not in ("feedback", "counted")
        ]
        decay = f"{self.feedback:g}" if self.feedback < 1 else ""
        return f"{self.call}({', '.join(given)})" + (f".with_error_feedback({decay})" if self.feedback else "")


def wide(value: Array) -> Array:
    """The array in float32 or wider, so that sums and comparisons are not made in low precision."""
    return value if value.dtype.kind == "f" and value.dtype.itemsize >= 4 else value.astype(np.float32)


def magnitudes(value: Any) -> Any:
    """The bits of the magnitudes, as whole numbers of the same order, with NaN above infinity.

    Comparisons of floating-point numbers are left to the compiler where NaN is among them.
    """
    whole = np.dtype(f"i{value.dtype.itemsize}").type
    return value.view(whole) & np.iinfo(whole).max


def share(call: str, value: object) -> int | float:
    """A share in (0, 1], or a count of at least 1. Raises PolicyError for anything else."""
    count = numbers.whole(value)
    if count is not None:
        if count < 1:
            raise PolicyError(f"{call}({count}): a count of elements is at least 1; for a share give a float in (0, 1]")
        return count
    number = real(call, value, "a share in (0, 1] such as 0.01, or a count of elements")
    if not 0 < number <= 1:
        raise PolicyError(f"{call}({number}): a share lies in (0, 1]; for a count of elements give an int")
    return number


def real(call: str, value: object, what: str) -> float:
    """A finite number as a float. Raises PolicyError for anything else."""
    number = numbers.real(value)
    if number is None or not math.isfinite(number):
        raise PolicyError(f"{call}({value!r}): give {what}")
    return number
