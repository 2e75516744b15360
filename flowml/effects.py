"""The option `effects` of functions that compile a program: what becomes of calls of Python, such as a debug print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from flowml.arguments import choice
from flowml.callers import warn
from flowml.devices import Device
from flowml.ir.host import Effects

EffectsChoice = Literal["run", "drop"]


class EffectsOption:
    """`"run"` runs every call of Python on the workers. `"drop"` leaves out those of `jax.debug`, with one warning."""

    def __init__(self, given: str) -> None:
        """Raises ValueError for another option."""
        self._drop = choice("effects", given, get_args(EffectsChoice)) == "drop"
        self._told = False

    def on(self, devices: Iterable[Device]) -> Effects:
        """The effects of a program on these devices, of which only those of some workers may run Python."""
        return Effects(any(device.python for device in devices), self._drop)

    def tell(self, name: str, left_out: Sequence[str]) -> None:
        """Warn, once, of what was left out of the function `name`."""
        if left_out and not self._told:
            self._told = True
            rest = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            warn(f'{name} runs without {left_out[0]}{rest}, because of effects="drop"')
