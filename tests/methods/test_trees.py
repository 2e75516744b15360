"""Trees from histograms: the splits of a serial run, whatever is divided among workers, and fewer bytes with a vote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import flowml as fm
from flowml_runtime.methods import Boosted, boost


@pytest.fixture(scope="module")
def cluster() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=2) as found:
        yield found


def examples(features: int = 24, rows: int = 301, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features))
    return x, (x[:, 3] + 0.6 * x[:, 1] * x[:, 0] - 0.8 * x[:, features - 1] > 0).astype(float)


def serial(x: np.ndarray, y: np.ndarray, *, depth: int, bins: int, rate: float) -> list[tuple[int, int]]:
    """Feature and cut of each node of the first tree by a plain search over all cuts, level by level."""
    edges = np.quantile(x, np.linspace(0, 1, bins + 1)[1:-1], axis=0)
    binned = np.stack([np.searchsorted(edges[:, f], x[:, f]) for f in range(x.shape[1])], axis=1)
    g, h = 0.5 - y, np.full(len(y), 0.25)
    node, found = np.zeros(len(y), int), []
    for level in range(depth):
        chosen = []
        for n in range(2**level):
            mine = node == n

            def gain(feature: int, cut: int, mine: np.ndarray = mine) -> float:
                left = mine & (binned[:, feature] <= cut)
                parts = (left, mine & ~left)
                return sum(g[p].sum() ** 2 / (h[p].sum() + 1) for p in parts)

            chosen.append(max(np.ndindex(x.shape[1], bins), key=lambda fc: gain(*fc)))
        features, cuts = np.array(chosen).T
        node = 2 * node + (binned[np.arange(len(y)), features[node]] > cuts[node])
        found += chosen
    return found


def splits(model: Boosted, tree: int = 0) -> list[tuple[int, int]]:
    grown = model.trees[tree]
    return [
        (int(f), int(c)) for fs, cs in zip(grown.features, grown.cuts, strict=True) for f, c in zip(fs, cs, strict=True)
    ]


@pytest.mark.parametrize("split", ["rows", "features"])
def test_the_splits_are_those_of_a_plain_search(cluster: fm.Cluster, split: Any) -> None:
    x, y = examples(features=7)
    model = boost(x, y, cluster, trees=1, depth=2, bins=6, split=split)
    assert splits(model) == serial(x, y, depth=2, bins=6, rate=0.3)


def test_a_vote_finds_good_splits_with_a_fraction_of_the_bytes(cluster: fm.Cluster) -> None:
    x, y = examples()
    whole, voted = (boost(x, y, cluster, trees=4, depth=2, vote=vote) for vote in (None, 2))
    assert voted.tree_bytes < whole.tree_bytes / 4
    assert splits(voted)[0] == splits(whole)[0]
    accuracies = [np.mean((model.margin(x) > 0) == y) for model in (whole, voted)]
    assert accuracies[1] >= accuracies[0] - 0.02
    assert accuracies[1] > 0.8


def test_squared_loss_predicts_numbers(cluster: fm.Cluster) -> None:
    x, _ = examples(features=5)
    y = 3 * x[:, 1] - x[:, 4]
    model = boost(x, y, cluster, trees=25, depth=2, loss="squared", split="features")
    assert np.mean((model.margin(x) - y) ** 2) < 0.25 * np.var(y)


@pytest.mark.parametrize("split", ["rows", "features"])
def test_squared_loss_begins_from_the_mean_of_the_labels(cluster: fm.Cluster, split: Any) -> None:
    x, _ = examples(features=5)
    y = 1000 + x[:, 1]
    model = boost(x, y, cluster, trees=1, depth=2, loss="squared", split=split)
    assert model.base == pytest.approx(y.mean(), rel=1e-6)
    assert np.mean((model.margin(x) - y) ** 2) < np.var(y)


def test_bad_numbers_say_what_to_give(cluster: fm.Cluster) -> None:
    x, y = examples(features=5)
    with pytest.raises(ValueError, match="vote"):
        boost(x, y, cluster, vote=6)
    with pytest.raises(ValueError, match="leave vote out"):
        boost(x, y, cluster, split="features", vote=2)
    with pytest.raises(ValueError, match="1 features cannot be divided among 2 workers"):
        boost(x[:, :1], y, cluster, split="features")
    with pytest.raises(ValueError, match="depth"):
        boost(x, y, cluster, depth=0)


@pytest.mark.parametrize(
    ("x", "y", "settings", "text"),
    [
        (np.ones(6), np.ones(6), {}, r"x has the shape \(6,\); give a row for each example"),
        (np.ones((6, 3)), np.ones(5), {}, r"y has the shape \(5,\); give one label for each of the 6 rows"),
        (np.ones((6, 3)), np.ones((6, 1)), {}, r"y has the shape \(6, 1\)"),
        (np.ones((6, 3)), np.full(6, 0.5), {}, "label 0.5, and loss='logistic' has 0 and 1; give those, or loss='sq"),
        (np.full((6, 3), np.nan), np.ones(6), {"loss": "squared"}, "x holds NaN or infinity"),
        ([["a"] * 3] * 6, np.ones(6), {}, "x holds what is no number"),
    ],
)
def test_examples_that_do_not_fit_together_say_so(
    cluster: fm.Cluster, x: Any, y: Any, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        boost(x, y, cluster, **settings)
