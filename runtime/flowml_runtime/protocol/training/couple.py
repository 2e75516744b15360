"""Turns what a home wants for a coupling into actions of its worker, and messages into events of the home."""

from __future__ import annotations

from flowml_runtime import wire
from flowml_runtime.protocol.training import home_events as home
from flowml_runtime.protocol.training.actions import Action, Apply, Couple, Send, Uncouple
from flowml_runtime.protocol.training.store import Handle


def shared(message: wire.Shared, handle: Handle | None) -> home.SharedReceived:
    """The event of a message. What has no arrays has handle 0."""
    about = message.coupling, message.round, message.clock, message.stores
    return home.SharedReceived(*about, None if message.empty else handle or 0)


def couple(
    action: home.Couple | home.Forgo, partners: tuple[str, ...], *, plan_id: str, run: int, cause: int
) -> list[Action]:
    """The actions of a worker whose homes share values with those of the `partners`."""
    coupling, clock, stores = action.coupling, action.clock, action.stores
    if isinstance(action, home.Couple):
        applies = tuple(
            Apply(a.store, a.version, a.contributions, cause, a.staleness, a.full, a.decays) for a in action.applies
        )
        to = () if action.last else partners
        return [Couple(coupling, clock, action.round, stores, applies, action.given, to, cause)]
    told = wire.Shared(
        plan_id=plan_id, run=run, cause=cause, coupling=coupling, round=0, clock=clock, stores=stores, empty=True
    )
    forget = [Uncouple(stores, cause)] if action.begun else []
    return [*forget, *([] if action.told else [Send(partners, told)])]
