"""`flowml.methods`: methods of papers that are more than a rule for each layer.

* `boost`: gradient-boosted trees on histograms, with data split by rows or by features, and voting (PV-tree).
* `TimeModel`: how long a fit on replicas that share memory takes, from a few steps (CHAOS).
"""

from __future__ import annotations

from flowml_runtime.methods.time_model import TimeModel
from flowml_runtime.methods.trees import Boosted, Tree, boost

__all__ = ["Boosted", "TimeModel", "Tree", "boost"]


def __dir__() -> list[str]:
    return __all__
