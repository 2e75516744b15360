"""Defines `Remote`, the handle of an array that stays on a worker.

A handle is a `jax.Array`: libraries tell arrays from other leaves by that type. What only the value can answer, such as
`x.at` or `x.mean()`, fetches it.

The values that one call keeps, or that one `put` brings, form a `Batch`. Their numbers on the workers are consecutive.
A worker forgets a value when its handle is deleted or donated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from flowml.callers import calling_line
from flowml.devices import worker_of
from flowml.errors import ClusterError, DeadlineError, FlowmlError, WorkerError, WorkerLostError
from flowml.ir._jax import ArrayImpl, array_type, default_sharding, register_array_like, struct_of
from flowml.ir.keys import key_dtype
from flowml.plan import ArraySpec
from flowml_runtime.driver.donation import Donation
from flowml_runtime.driver.lineage import Lineage
from flowml_runtime.membership.advice import BEGIN_AGAIN

if TYPE_CHECKING:
    from pathlib import Path

    from flowml_runtime.environment.checkpoints import Entry
    from flowml_runtime.execution.future import Future


class Owner(Protocol):
    """The part of a session that handles use."""

    saved: list[Any]
    """What `fm.save` and `fm.load` have written and read of its values, the newest first."""

    def recall(self, remotes: Sequence[Remote]) -> list[jax.Array]: ...
    def write(self, remotes: Sequence[Remote], folder: Path, token: str) -> Iterator[tuple[Remote, Entry]]: ...
    def freed(self, batch: Batch, indices: Sequence[int]) -> None: ...
    def used_up(self, batch: Batch, indices: Sequence[int]) -> None: ...
    def batches(self) -> list[Batch]: ...
    def next_number(self) -> int: ...


class Kind:
    """What the handles of one output of a program have in common: the value's type and place, and its name in errors.

    Handles that are the same output of calls of one program share one `Kind`.
    """

    __slots__ = ("device", "name", "nbytes", "signature", "spec", "worker")

    def __init__(self, spec: ArraySpec, device: str, name: str) -> None:
        self.spec = spec
        self.nbytes = spec.nbytes
        self.device = device
        self.worker = worker_of(device)
        self.name = name or "result"
        dtype: Any = key_dtype(spec.dtype) if spec.dtype.startswith("key<") else jax.numpy.dtype(spec.dtype)
        self.signature = spec.shape, dtype, spec.weak_type


class Batch:
    """The values of one call or `put`. Value i has the number `first` + i on its worker."""

    __slots__ = (
        "__weakref__",
        "alive",
        "call",
        "donation",
        "error",
        "first",
        "future",
        "gone",
        "here",
        "kinds",
        "lineage",
        "lost",
        "owner",
        "sizes",
        "told",
    )

    def __init__(self, owner: Owner, first: int, kinds: Sequence[Kind], call: str, sizes: Mapping[str, int]) -> None:
        self.owner: Owner | None = owner
        """None once the cluster is closed."""
        self.first = first
        self.kinds = kinds
        self.lineage = Lineage(kinds)
        self.sizes = sizes
        """Device -> the bytes of all values there."""
        self.call = call
        """What made the values, as in "step 3 of train_step"."""
        self.future: Future[Any] | None = None
        """Of the call, until it is done."""
        self.here: Callable[[int], Any] | None = None
        """The arrays by number, if the call ran on its caller's thread. They are computed later, as those of jit."""
        self.error: BaseException | None = None
        """Of the call."""
        self.alive = set(range(len(kinds)))
        """The values whose memory has not been freed."""
        self.donation: Donation | None = None
        """What the call overwrites, if it ran on its caller's thread."""
        self.gone: dict[int, str | Donation] = {}
        """Why values can no longer be used."""
        self.lost: Mapping[str, str] = {}
        """Lost worker -> reason."""
        self.told = False
        """Whether the caller has had an error of the loss of values."""

    def handles(self) -> list[Remote]:
        return list(map(Remote, repeat(self), range(len(self.kinds)), self.kinds))

    def made_by(self, future: Future[Any]) -> None:
        """The call of this future makes the values."""
        self.future = future
        future.when_done(self._settle)

    def fail(self, error: BaseException) -> None:
        """The call that should have made the values failed. Its first error counts."""
        self.error = self.error or error
        if self.donation is not None:
            self.donation.error = self.error

    def give_up(self, indices: Sequence[int], why: str | Donation) -> None:
        """These values can no longer be used. `why` follows the name of a value in errors."""
        self.gone.update(dict.fromkeys(indices, why))
        if self.owner is not None:
            self.owner.freed(self, indices)

    def used_up(self, indices: Sequence[int], why: str | Donation) -> None:
        """A call overwrites these values. Their worker forgets them by itself."""
        self.gone.update(dict.fromkeys(indices, why))
        if self.owner is not None:
            self.owner.used_up(self, indices)

    def is_sound(self, owner: Owner) -> bool:
        """Whether calls of the session `owner` can use all of the values."""
        return self.owner is owner and not self.gone and not self.lost and self.error is None

    def is_lost(self, index: int) -> bool:
        """Whether a value cannot be used because a worker was lost."""
        gone = self.gone.get(index)
        error = gone.failure if isinstance(gone, Donation) else self.error
        perished = isinstance(gone, Perished) or isinstance(error, WorkerLostError)
        return self.owner is not None and (perished or self.kinds[index].worker in self.lost)

    def _settle(self, future: Future[Any]) -> None:
        self.error = future.exception()
        self.future = None  # its result has the handles of this batch


class Perished(str):
    """Why a value is gone with a worker, although it was elsewhere."""

    __slots__ = ()


class Remote(jax.Array):
    """An array that stays on a worker. Programs of the same cluster take it as an argument.

    It is a `jax.Array`: shape, dtype and sharding are known here, and `fetch()`, `np.asarray`, `float`, the methods of
    an array and functions of `jax.numpy` bring its value. The worker frees it when the handle is deleted, or donated
    to a call.
    """

    __slots__ = ("__weakref__", "_batch", "_index", "kind", "number")
    __array_priority__ = 100
    """As of every JAX array: operators of NumPy arrays leave the computation to it."""

    def __init__(self, batch: Batch, index: int, kind: Kind) -> None:
        """For the runtime: programs with `keep` and `fm.put` make handles."""
        self._batch = batch
        self._index = index
        self.kind = kind
        """For the runtime: the type and place of the value."""
        self.number = batch.first + index
        """For the runtime: what the worker calls the value."""

    def __del__(self) -> None:
        try:
            batch = self._batch
        except AttributeError:  # it was not made: its arguments were wrong
            return
        if batch.owner is not None and self._index not in batch.gone:
            batch.owner.freed(batch, (self._index,))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kind.spec.shape

    @property
    def dtype(self) -> Any:
        return self.kind.signature[1]

    @property
    def weak_type(self) -> bool:
        return self.kind.spec.weak_type

    @property
    def ndim(self) -> int:
        return len(self.kind.spec.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.kind.spec.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.kind.spec.nbytes

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def aval(self) -> Any:
        return array_type(struct_of(self.kind.spec), weak=self.kind.spec.weak_type)

    @property
    def device(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The name of the device that has the value, as in "worker:0/cpu:0"."""
        return self.kind.device

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """That of the fetched value: the whole array on the default device of this process."""
        return default_sharding()

    def devices(self) -> set[Any]:
        """The device of this process on which the fetched value is."""
        return set(self.sharding.device_set)

    @property
    def committed(self) -> bool:
        return False

    @property
    def is_fully_addressable(self) -> bool:
        return True

    @property
    def is_fully_replicated(self) -> bool:
        return True

    def copy_to_host_async(self) -> None:
        """Nothing: `fetch` and `np.asarray` bring the value when it is needed."""

    def fetch(self) -> jax.Array:
        """The value, as an array in this process. Waits until it is made.

        Raises the error of the call that should have made it, WorkerLostError if its worker is lost or was lost during
        that call, ClusterError if the handle was donated or its cluster is closed.
        """
        (array,) = self.check(None).recall([self])
        return array

    def made(self) -> None:
        """For the runtime: wait until the call that makes the value is done. Raises an error if it failed."""
        batch = self._batch
        if batch.future is not None:
            batch.future.exception()
        elif batch.here is not None:
            try:
                jax.block_until_ready(batch.here(self.number))
            except Exception as error:
                batch.fail(error)
        self.check(None)

    def check(self, owner: Owner | None) -> Owner:
        """The session of the value. Raises an error if it cannot be used (for calls of the session `owner`)."""
        batch = self._batch
        if batch.owner is not None and (owner is None or owner is batch.owner) and self.is_usable():
            return batch.owner
        what = f"the kept value {self.kind.name!r} of {batch.call}"
        if batch.owner is None:
            raise ClusterError(f"{what} is gone: its cluster is closed; fetch values before you close the cluster")
        if owner is not None and owner is not batch.owner:
            raise ClusterError(f"{what} is on another cluster; pass its value: fetch() brings it here")
        if self._index in batch.gone:
            gone = batch.gone[self._index]
            raise ClusterError(f"{what} {gone}") from (gone.failure if isinstance(gone, Donation) else None)
        if self.kind.worker in batch.lost:
            reason = batch.lost[self.kind.worker]
            raise WorkerLostError(
                f"{what} is lost, because {self.kind.worker} was lost ({reason}); {BEGIN_AGAIN}",
                worker=self.kind.worker,
            )
        raise _not_made(what, batch.error) from batch.error

    def is_usable(self) -> bool:
        """For the runtime: whether `check` raises nothing."""
        batch = self._batch
        gone = self._index in batch.gone or self.kind.worker in batch.lost
        return batch.owner is not None and batch.error is None and not gone

    def made_here(self, here: Callable[[int], Any], donation: Donation | None) -> None:
        """For the runtime: its call ran on its caller's thread, and `here` gives the arrays of its batch by number.
        `donation` is what the call overwrites."""
        self._batch.here, self._batch.donation = here, donation

    def fail(self, error: BaseException) -> None:
        """For the runtime: the call that should have made the values of its batch failed."""
        self._batch.fail(error)

    def made_by(self, future: Future[Any]) -> None:
        """For the runtime: the call of this future makes the value, and all values of its batch."""
        self._batch.made_by(future)

    @staticmethod
    def check_all(remotes: Sequence[Remote], owner: Owner) -> None:
        """`check` of all arguments of a call of the session `owner`. Most of them are of one batch or a few."""
        if not all(batch.is_sound(owner) for batch in set(map(_batch_of, remotes))):
            for remote in remotes:
                remote.check(owner)

    @staticmethod
    def give_up_all(remotes: Sequence[Remote], why: Donation, *, told: bool) -> None:
        """For the runtime: the values can no longer be used, because a call overwrites them.

        If their workers are `told` by a call that overwrites the values, they get no message.
        """
        batches = set(map(_batch_of, remotes))
        for batch in batches:
            mine = remotes if len(batches) == 1 else [r for r in remotes if r._batch is batch]
            (batch.used_up if told else batch.give_up)(list(map(_index_of, mine)), why)

    @property
    def told(self) -> bool:
        """For the runtime: whether the caller has had an error of the loss of this value or of one beside it. The call
        to which a value was donated has raised one."""
        return self._batch.told or isinstance(self._batch.gone.get(self._index), Donation | Perished)

    def tell(self) -> None:
        """For the runtime: the caller gets an error of its loss now."""
        self._batch.told = True

    def perish(self) -> None:
        """For the runtime: the value was donated to a call during which a worker was lost."""
        self._batch.gone[self._index] = Perished("was donated to a call during which a worker was lost")

    def is_lost(self) -> bool:
        """For the runtime: whether the value cannot be used because a worker was lost."""
        return self._batch.is_lost(self._index)

    def why_lost(self) -> str:
        """For the runtime: why a lost value is lost, in words."""
        batch = self._batch
        if isinstance(batch.error, WorkerLostError):
            return str(batch.error).partition("; ")[0]
        workers = [self.kind.worker] if self.kind.worker in batch.lost else list(batch.lost)
        return " and ".join(f"{w} was lost ({batch.lost[w]})" for w in workers) or "a worker was lost"

    @property
    def owner(self) -> Owner | None:
        """For the runtime: the session of the value; None if its cluster is closed."""
        return self._batch.owner

    @property
    def lineage(self) -> Lineage:
        """For the runtime: which saved values its batch comes from."""
        return self._batch.lineage

    def block_until_ready(self) -> Remote:
        """Wait until the value is made. Raises the error of the call that should have made it."""
        self.made()
        return self

    def is_ready(self) -> bool:
        """Whether the value is made, or its call failed."""
        batch = self._batch
        array = batch.here(self.number) if batch.here is not None else None
        return batch.future is None and (array is None or array.is_deleted() or array.is_ready())

    def is_deleted(self) -> bool:
        """Whether the value was donated or deleted."""
        return self._index in self._batch.gone

    def delete(self) -> None:
        """Free the value now, and not when the handle is collected."""
        if not self.is_deleted():
            self._batch.give_up((self._index,), f"was deleted by delete() at {calling_line()}")

    def __copy__(self) -> jax.Array:
        """The value, in this process: a copy of an array outlives a call that the array is donated to."""
        return self.fetch()

    def __deepcopy__(self, memo: Any) -> jax.Array:
        return self.fetch()

    def __reduce__(self) -> Any:
        """The value is pickled."""
        return self.fetch().__reduce__()

    def __getattr__(self, name: str) -> Any:
        """What else an array has, such as `tolist`: of the value."""
        if name.startswith("__") or not hasattr(ArrayImpl, name):
            raise AttributeError(f"'Remote' object has no attribute {name!r}")
        return getattr(self.fetch(), name)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.fetch()[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.fetch())

    def __format__(self, spec: str) -> str:
        return format(self.fetch(), spec) if spec else repr(self)

    def __array__(self, dtype: Any = None, context: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.fetch().__array__(dtype, context, copy)

    def __jax_array__(self) -> jax.Array:
        return self.fetch()

    def __float__(self) -> float:
        return float(self.fetch())

    def __int__(self) -> int:
        return int(self.fetch())

    def __bool__(self) -> bool:
        return bool(self.fetch())

    def __index__(self) -> int:
        return self.fetch().__index__()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions")
        return self.shape[0]

    def __repr__(self) -> str:
        spec = self.kind.spec
        return f"Remote({spec.dtype}[{','.join(map(str, spec.shape))}] {self.kind.name!r} {self._state()})"

    def _state(self) -> str:
        """Where the value is, or why it cannot be used, in a few words."""
        batch = self._batch
        if self._index in batch.gone:
            return str(batch.gone[self._index]).partition("; ")[0]
        if batch.owner is None:
            return "is gone: its cluster is closed"
        if self.kind.worker in batch.lost:
            return f"is lost with {self.kind.worker}"
        return "was not made" if batch.error is not None else f"on {self.kind.device}"


def _not_made(what: str, cause: BaseException | None) -> FlowmlError:
    """The error of a value whose call failed: of the kind of its cause, so that a caller catches both alike.

    It has no step, because no step of the call that needs the value has begun.
    """
    reason, _, _ = str(cause).partition("\n")
    text = f"{what} was not made: {reason}"
    if isinstance(cause, WorkerLostError | DeadlineError | WorkerError):
        return type(cause)(text, worker=cause.worker, node=cause.node)
    return FlowmlError(text)


_batch_of = attrgetter("_batch")
_index_of = attrgetter("_index")
kind_of = attrgetter("kind")
number_of = attrgetter("number")


def lineages(remotes: Sequence[Remote]) -> list[Lineage]:
    return list({batch.lineage for batch in set(map(_batch_of, remotes))})


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Remote, *others: Any, **options: Any) -> Any:
        given = (o.fetch() if isinstance(o, Remote) else o for o in others)
        return getattr(self.fetch(), name)(*given, **options)

    operator.__name__ = name
    return operator


def _of_the_value(name: str) -> Any:
    return property(lambda self: getattr(self.fetch(), name), doc="")


def _complete() -> None:
    """Give handles what an array has and `Remote` does not define: the base class has no value to answer with."""
    own = {*dir(object), *vars(Remote), "__numpy_dtype__"}
    for name in {*dir(jax.Array), "__dlpack__", "__dlpack_device__", "__complex__"} - own:
        setattr(Remote, name, _operator(name) if name.startswith("__") else _of_the_value(name))
    for name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
        setattr(Remote, name, _operator(name))


_complete()
register_array_like(Remote)
