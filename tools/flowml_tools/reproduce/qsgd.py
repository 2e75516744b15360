"""QSGD: each element of a gradient is rounded at random to one of a few levels, so that its expectation is kept."""

from __future__ import annotations

from flowml_tools.reproduce import payoff
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most

BITS = (8, 4)


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    found = {
        bits: payoff.measure(
            (fm.filters.quantise(bits, stochastic=True),), steps=1000 if full else 60, seed=seed, rate=0.3
        )
        for bits in BITS
    }
    return Outcome(
        f"8 and 4 bits, 256 elements to a scale. {payoff.SETTING}",
        (
            at_least("bytes saved of 1024 x 1024 in 8 bits", 3.8, found[8].large, "{:.2f} x"),
            at_least("bytes saved of 1024 x 1024 in 4 bits", 7.5, found[4].large, "{:.2f} x"),
            at_most("loss in 8 bits against plain gradients after as many steps", 1.02, found[8].loss),
            at_most("loss in 4 bits against plain gradients after as many steps", 1.1, found[4].loss),
            payoff.pays("8 bits pay on links slower than, MB/s for a core", found[8]),
        ),
        payoff.plot("Loss with random rounding", **{f"{bits}_bits": payoff_of for bits, payoff_of in found.items()}),
    )


CLAIM = Claim(
    "Alistarh et al., QSGD, NeurIPS 2017",
    "theorem 3.2 and table 1",
    "Gradients that are rounded at random to 8 or 4 bits, without bias, train as well as those of 32, with 4 and 8 "
    "times fewer bytes but for the scales.",
    run,
)
