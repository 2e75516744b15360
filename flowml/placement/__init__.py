"""Assigns a device to every node, from the user's pins and rules and from the cost model."""

from __future__ import annotations

from flowml.placement.base import AutoPlacement, Choices, Pipeline, Placement, place

__all__ = ["AutoPlacement", "Choices", "Pipeline", "Placement", "place"]
