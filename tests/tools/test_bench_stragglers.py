"""`flowml bench stragglers`: its fits, and what counts as seed noise."""

from __future__ import annotations

import flowml as fm
from flowml_tools.bench import stragglers
from flowml_tools.bench.table import render


def test_each_fit_has_a_rate_and_an_accuracy(threads_cluster: fm.Cluster) -> None:
    accuracies: list[float] = []
    slow = {"worker:3": 0.05}
    fits = stragglers.Fits(threads_cluster, fm.policies.quorum(0.75), slow, steps=30, found=accuracies)
    assert 0 < fits.rate() < float("inf")
    fits.rate()
    assert len(accuracies) == 2
    assert all(0.25 < a <= 1 for a in accuracies), "one of eight classes is 0.125"
    assert accuracies[0] != accuracies[1], "each fit has a seed of its own"


def test_an_accuracy_may_be_lower_by_seed_noise_only() -> None:
    peer = [0.80, 0.82, 0.78, 0.80]
    noise = 0.016329931618554537
    assert stragglers.compared("steps", [0.80 - 0.9 * noise] * 4, peer, goal=True).met
    missed = stragglers.compared("steps", [0.80 - 1.1 * noise] * 4, peer, goal=True)
    assert missed.met is False
    assert "MISSED" in render("stragglers", [missed])
    assert stragglers.compared("steps", [0.9] * 4, peer, goal=True).met


def test_pairs_of_one_seed_are_compared_so_that_the_seeds_own_noise_cancels() -> None:
    peer = [0.80, 0.82, 0.78, 0.80]
    row = stragglers.compared("steps", [p - 0.01 for p in peer], peer)
    assert row.met is None, "there is no goal"
    assert row.name.endswith("4 seeds, ± 0.00"), "the difference is the same for each seed"
    assert "± 1.63" in stragglers.compared("steps", [0.8] * 4, peer).name
