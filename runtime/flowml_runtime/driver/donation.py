"""What became of values that were donated to a call: its results took their place, or it failed and they are lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml.callers import calling_line
from flowml_runtime.membership.advice import BEGIN_AGAIN

if TYPE_CHECKING:
    from flowml_runtime.execution.future import Future


class Donation:
    """Why donated values can no longer be used. As text it follows the name of a value in errors."""

    __slots__ = ("call", "error", "future", "where")

    def __init__(self, call: str, future: Future[Any] | None) -> None:
        self.call = call
        """The call that overwrites the values, as in "step 3 of train_step"."""
        self.where = calling_line()
        self.error: BaseException | None = None
        """Of the call."""
        self.future = future
        """Of the call, until it is done."""
        if future is not None:
            future.when_done(self._settle)

    @property
    def failure(self) -> BaseException | None:
        """The error of the call, as far as it is known now."""
        future = self.future
        return future.exception() if future is not None and future.done() else self.error

    def __str__(self) -> str:
        what, failure = f"was donated to {self.call} at {self.where}", self.failure
        if failure is None:
            return f"{what}; use what that call returned"
        reason, _, _ = str(failure).partition("\n")
        return f"{what}, which failed; {BEGIN_AGAIN}. It failed with: {reason}"

    def _settle(self, future: Future[Any]) -> None:
        self.error = future.exception()
        self.future = None  # its result would stay in memory
