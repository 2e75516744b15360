"""`flowml.methods`: methods of papers that are more than a rule for each layer.

* `lbfgs`: L-BFGS whose parameters and history stay on the homes, with portions and copies (Sandblaster). `Vectors` and
  `Portions` are what any other optimizer of whole batches can be written with.
* `boost`: gradient-boosted trees on histograms, with data split by rows or by features, and voting (PV-tree).
* `TimeModel`: how long a fit on replicas that share memory takes, from a few steps (CHAOS).
"""

from __future__ import annotations

from flowml_runtime.methods.lbfgs import Minimum, lbfgs
from flowml_runtime.methods.portions import Portions
from flowml_runtime.methods.time_model import TimeModel
from flowml_runtime.methods.trees import Boosted, Tree, boost
from flowml_runtime.methods.vectors import Vectors

__all__ = ["Boosted", "Minimum", "Portions", "TimeModel", "Tree", "Vectors", "boost", "lbfgs"]


def __dir__() -> list[str]:
    return __all__
