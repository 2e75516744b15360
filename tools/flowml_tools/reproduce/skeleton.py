"""A random skeleton: both sides draw the same few elements of a gradient, and what is not sent is kept for later."""

from __future__ import annotations

from flowml_tools.reproduce import payoff
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, near

SHARE = 0.05


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps = 1000 if full else 200
    kept, lost = (
        payoff.measure(chain, steps=steps, seed=seed, rate=0.3)
        for chain in (
            (fm.filters.random_k(SHARE).with_error_feedback(),),
            (fm.filters.random_k(SHARE),),
        )
    )
    return Outcome(
        f"{SHARE:.0%} of the elements, drawn anew at each push. {payoff.SETTING} Drawing positions takes long, so "
        "the link is one of 100 Mbit/s, and not one of 1 Gbit/s as for other filters.",
        (
            near("bytes saved of 1024 x 1024, without positions", 1 / SHARE, kept.large, 0.01, "{:.1f} x"),
            at_most("loss against plain gradients after as many steps", 1.1, kept.loss),
            at_least("loss without memory against that with it", 1.1, lost.loss / kept.loss),
            payoff.pays("pays on links slower than, MB/s for a core", kept, link=payoff.ETHERNET / 10),
        ),
        payoff.plot(f"Loss with {SHARE:.0%} of the elements, drawn at random", with_memory=kept, without_memory=lost),
    )


CLAIM = Claim(
    "Stich, Cordonnier and Jaggi, Sparsified SGD with Memory, NeurIPS 2018",
    "theorem 2.4",
    "SGD that sends a few elements drawn at random converges as fast as that which sends all, if the others are "
    "remembered.",
    run,
)
