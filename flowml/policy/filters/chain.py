"""Applies a chain of filters to one array, and checks that a chain is sound.

The first filter that has a layout for an array encodes it, and the filters after it encode each part. What is left when
no filter applies is sent. So a chain makes a tree of parts, whose leaves are the *wire arrays*, in order. Sender and
receiver find the same tree from the filters and the form of the array, and the receiver checks each wire array by it.

With error feedback the sender adds what it has lost so far to the value, and keeps the difference between the sum and
what the receiver will decode. So decoded values and the residual always add up to the values, unless the feedback
decays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from flowml.arrays import ArraySpec, unheard
from flowml.errors import PolicyError
from flowml.policy.filters.base import (
    AnyFilter,
    Array,
    Context,
    EncodingError,
    Filter,
    Form,
    Run,
    State,
    on_numpy,
    wide,
)
from flowml.policy.kinds import check

Chain = Sequence[Filter]

RESIDUAL = "residual"
"""The name of the buffer of error feedback."""

_MOST = 2**32


class _Head(NamedTuple):
    """The first filter of a chain that applies to an array, the forms of its parts, and the filters after it."""

    number: int
    filter: Filter
    forms: tuple[Form, ...]


def wire_forms(chain: Chain, form: Form) -> tuple[Form, ...]:
    """The forms of the wire arrays."""

    def leaves(start: int, form: Form) -> Iterator[Form]:
        head = _head(chain, start, form)
        if head is None:
            yield form
            return
        for part in head.forms:
            yield from leaves(head.number + 1, part)

    return tuple(leaves(0, form))


def nbytes(chain: Chain, form: Form) -> int | None:
    """The bytes of the wire arrays; None if they depend on the values."""
    forms = wire_forms(chain, form)
    return sum(f.nbytes for f in forms) if all(f.exact for f in forms) else None


def most_bytes(chain: Chain, form: Form) -> int:
    """The most bytes that the wire arrays can have."""
    return sum(f.nbytes for f in wire_forms(chain, form))


def sent_size(chain: Chain, payload: Sequence[ArraySpec], filtered: Collection[int]) -> tuple[int, bool]:
    """The bytes of arrays of which those at positions `filtered` are filtered, or the most possible, and whether it is
    exact."""
    if not chain:  # an all-reduce sends its arrays as one
        return sum(spec.nbytes for spec in payload), True
    forms = [x for i in filtered for x in wire_forms(chain, Form.of(payload[i]))]
    rest = sum(spec.nbytes for i, spec in enumerate(payload) if i not in filtered)
    return sum(x.nbytes for x in forms) + rest, all(x.exact for x in forms)


def encoded_by(chain: Chain, form: Form) -> Filter | None:
    """The first filter that encodes an array of `form`; None if it is sent as it is."""
    head = _head(chain, 0, form)
    return None if head is None else head.filter


def feeds_back(chain: Chain) -> bool:
    """Whether the chain keeps what it loses."""
    return any(f.feedback for f in chain)


def is_lossless(chain: Chain) -> bool:
    """Whether what is decoded has the bits of what was encoded."""
    return all(f.lossless for f in chain)


def compares(chain: Chain) -> bool:
    """Whether the chain needs the parameters that values are gradients of."""
    return any(f.compares for f in chain)


def remembers(chain: Chain) -> bool:
    """Whether a receiver has to decode every push, because later ones refer to it."""
    return any(f.remembers for f in chain)


def encode(chain: Chain, value: Array, state: State, context: Context) -> tuple[list[Array], State]:
    """The wire arrays of a value, and the buffers for the next push.

    Changes no array. Wire arrays may be `value` itself, and buffers.
    """
    form, share = Form(value.shape, value.dtype), next((f.feedback for f in chain if f.feedback), 0.0)
    if not share or _head(chain, 0, form) is None:
        wire, after, _ = _encode(chain, 0, value, form, "", state, context, rebuilds=False)
        return wire, after
    total = wide(value)
    if RESIDUAL in state:
        kept = state[RESIDUAL]
        with unheard():
            total = total + (kept if share == 1 else kept * total.dtype.type(share))
    context = context._replace(feedback=True)
    wire, after, decoded = _encode(chain, 0, total.astype(form.dtype, copy=False), form, "", state, context, True)
    with unheard():
        return wire, {**after, RESIDUAL: total - wide(decoded)}


def rebuilt(chain: Chain, value: Array, state: State, context: Context) -> tuple[list[Array], State, Array]:
    """As `encode`, without error feedback, and what the receiver will decode: a caller that tracks that needs none."""
    return _encode(chain, 0, value, Form(value.shape, value.dtype), "", state, context, rebuilds=True)


def check_differences(chain: Chain, name: str) -> None:
    """Raise PolicyError if the chain is not sound for differences to a copy that what is decoded is added to."""
    for one in chain:
        if one.call == "kkt":
            why = "its condition is on gradients; use significance()"
        elif not one.contracts():
            why = (
                "its error may be larger than the difference itself, and then it grows from one version to the next; "
                "leave stochastic out, or give more bits or smaller blocks"
            )
        elif 0 < one.feedback < 1:
            why = "all that is left out is in the next difference, and none of it is forgotten; leave the decay out"
        else:
            continue
        raise PolicyError(f"{name}=({', '.join(map(str, chain))},) is not sound: {one} filters differences, and {why}")


def decode(
    chain: Chain, arrays: Iterator[Array], form: Form, memory: State, run: Run = on_numpy
) -> tuple[Array, State]:
    """The value whose wire arrays come next in `arrays`, and the receiver's buffers for the next push.

    Raises EncodingError for arrays that are not an encoding of a value of `form`. Memory is bounded by the form.
    """

    def take(expected: Form) -> Array:
        array = next(arrays, None)
        if array is None:
            raise EncodingError(f"an array of {_text(expected)} is missing")
        size = array.size == expected.size if expected.exact else array.size <= expected.size
        shape = array.shape == expected.shape if expected.exact else array.ndim == 1
        if not size or not shape or array.dtype != expected.dtype:
            raise EncodingError(f"{array.shape} {array.dtype} came for an array of {_text(expected)}")
        return array

    after: dict[str, Array] = {}
    return _decode(chain, 0, take, form, "", memory, after, run), after


def _encode(
    chain: Chain, start: int, value: Array, form: Form, path: str, state: State, context: Context, rebuilds: bool
) -> tuple[list[Array], dict[str, Array], Array]:
    """The wire arrays, the buffers for the next push, and with `rebuilds` what the receiver will decode."""
    head = _head(chain, start, form)
    if head is None:
        return [value], {}, value
    name = f"{path}{head.number}"
    here = context._replace(seed=(*context.seed, head.number))
    parts, kept = head.filter.encode(value, state.get(name), here)
    wire: list[Array] = []
    after: dict[str, Array] = {} if kept is None else {name: kept}
    rebuilt: list[Array] = []
    for i, (part, expected) in enumerate(zip(parts, head.forms, strict=True)):
        inner = here._replace(seed=(*here.seed, i), parameter=None)
        found = _sized(expected, part.size)
        arrays, more, again = _encode(chain, head.number + 1, part, found, f"{name}.{i}/", state, inner, rebuilds)
        wire += arrays
        after.update(more)
        rebuilt.append(again)
    decoded = head.filter.decode(rebuilt, form, context.run) if rebuilds and not head.filter.lossless else value
    return wire, after, decoded


def _decode(
    chain: Chain,
    start: int,
    take: Callable[[Form], Array],
    form: Form,
    path: str,
    memory: State,
    after: dict[str, Array],
    run: Run,
) -> Array:
    head = _head(chain, start, form)
    if head is None:
        return take(form)
    name = f"{path}{head.number}"
    parts: list[Array] = []
    for i, expected in enumerate(head.forms):
        unknown = not expected.exact and expected.role == "values"
        found = _sized(expected, head.filter.count(parts, form)) if unknown else expected
        parts.append(_decode(chain, head.number + 1, take, found, f"{name}.{i}/", memory, after, run))
    value, kept = head.filter.recall(parts, form, memory.get(name), run)
    if kept is not None:
        after[name] = kept
    return value


def _sized(form: Form, size: int) -> Form:
    """The form of a part. The sender knows its size, and the receiver that of values, because keys come before them.
    Both have to apply the filters after it to the same form, so that of keys stays as it is."""
    return form._replace(shape=(size,), exact=True) if not form.exact and form.role == "values" else form


def _head(chain: Chain, start: int, form: Form) -> _Head | None:
    for number in range(start, len(chain)):
        layout = chain[number].layout(form) if chain[number].takes in (form.role, None) else None
        if layout is not None:
            return _Head(number, chain[number], layout)
    return None


def _text(form: Form) -> str:
    return f"{form.shape} {form.dtype}" + ("" if form.exact else " or fewer")


def check_chain(filters: Sequence[object]) -> tuple[Filter, ...]:
    """The filters. Raises PolicyError if one is not a filter, or has no effect or a wrong one at its place."""
    chain: list[Filter] = []
    roles: set[Any] = {"values"}
    for value in filters:
        if callable(value) and not isinstance(value, Filter) and (name := getattr(value, "__name__", "")):
            raise PolicyError(f"filters: {name} is not a filter, but a function that makes one; call it, as {name}(…)")
        if not isinstance(value, Filter):
            raise PolicyError(f"filters: {value!r} is not a filter; give those of fm.filters, such as top_k(0.01)")
        check(AnyFilter, value)
        _check_place(value, chain, roles)
        chain.append(value)
        roles = (roles - {value.takes} if value.takes else set()) | value.gives
    return tuple(chain)


def _check_place(filter: Filter, before: Sequence[Filter], roles: set[Any]) -> None:
    if filter.takes == "keys" and "keys" not in roles:
        raise PolicyError(
            f"filters: {filter} has no effect, because no filter before it sends keys that it could remember; put "
            f"top_k, significance or kkt before it, and {filter} once"
        )
    if not before:
        return
    lossy = [f for f in before if not f.lossless]
    if not roles or not (filter.lossless or filter.takes in roles):
        raise PolicyError(
            f"filters: {filter} after {before[-1]} has no effect, because nothing is left that it can make "
            f"smaller; put {filter} before it"
        )
    if filter.first:
        why = "compares an array with its parameter" if filter.compares else "factors an array as a matrix"
        raise PolicyError(f"filters: {filter} {why}, so it is the first filter; put it before {before[0]}")
    if filter.feedback and lossy:
        raise PolicyError(
            f"filters: the error feedback of {filter} is not sound, because {lossy[0]} sends other elements each time; "
            f"give it to {lossy[0]}, where it covers the whole chain"
        )


def check_array(chain: Chain, form: Form, name: str) -> None:
    """Raise PolicyError if the chain cannot filter the array `name`."""
    lossy = [f for f in chain if not f.lossless]
    if not lossy:
        return
    if not _is_real(form.dtype):
        raise PolicyError(
            f"{name!r} has elements of {form.dtype}, and {lossy[0]} works on real floating-point numbers; give this "
            "parameter a policy without lossy filters"
        )
    if form.size >= _MOST:
        raise PolicyError(f"{name!r} has {form.size:,} elements; filters work on fewer than {_MOST:,}")
    count = getattr(lossy[0], "share", None)
    if isinstance(count, int) and count > form.size:
        raise PolicyError(
            f"{lossy[0]} asks for {count:,} elements of {name!r}, which has {form.size:,}; give a share such as "
            f"{lossy[0].call}(0.01), or give this parameter another policy"
        )


def _is_real(dtype: np.dtype[Any]) -> bool:
    """Whether the dtype is a real floating-point type, those of ml_dtypes included."""
    return dtype.kind == "f" or (dtype.kind == "V" and "float" in dtype.name)
