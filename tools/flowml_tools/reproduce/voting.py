"""PV-tree: workers vote for features, and send the histograms of the winners only."""

from __future__ import annotations

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, holds


def run(full: bool, seed: int) -> Outcome:
    import numpy as np

    import flowml as fm

    rows, features = (20_000, 200) if full else (1200, 60)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * rows, features))
    chosen = rng.choice(features, 8, replace=False)
    y = (x[:, chosen] @ np.linspace(2, 0.5, 8) + x[:, chosen[0]] * x[:, chosen[1]] > 0).astype(float)
    votes, depth = ((1, 2, 3, 5, 10, 20), 4) if full else ((1, 3, 10), 2)
    with fm.Cluster.threads(workers=2) as cluster:
        whole = fm.methods.boost(x[:rows], y[:rows], cluster, trees=5, depth=depth)
        voted = {a: fm.methods.boost(x[:rows], y[:rows], cluster, trees=5, depth=depth, vote=a) for a in votes}
    ours = voted[3]

    def accuracy(model: fm.methods.Boosted) -> float:
        return float(np.mean((model.margin(x[rows:]) > 0) == y[rows:]))

    roots = [a.features[0][0] == b.features[0][0] for a, b in zip(whole.trees, ours.trees, strict=True)]
    share = {a: model.tree_bytes / whole.tree_bytes for a, model in voted.items()}
    return Outcome(
        f"{rows:,} examples of {features} features in halves on 2 workers of threads, 5 trees of {depth} levels, 32 "
        "bins, 3 votes of each worker and node; accuracy on as many other examples.",
        (
            at_most("bytes between workers against whole histograms", 0.2, share[3], "{:.0%}"),
            holds("first splits of the trees that are the same", "all", f"{sum(roots)} of {len(roots)}", all(roots)),
            at_least("accuracy minus that with whole histograms", -0.01, accuracy(ours) - accuracy(whole), "{:+.3f}"),
        ),
        Plot(
            "Bytes between workers for one tree",
            "votes of a worker",
            "share of those with whole histograms",
            (Line("PV-tree", list(share.items())),),
        ),
    )


CLAIM = Claim(
    "Meng et al., A Communication-Efficient Parallel Algorithm for Decision Tree (PV-tree), NeurIPS 2016",
    "theorem 4.1, figure 2",
    "With votes the splits of a serial run are found with a fraction of the bytes, at the same accuracy.",
    run,
)
