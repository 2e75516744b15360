"""Deep gradient compression: only the largest elements are sent, the rest is kept and added to the next gradient."""

from __future__ import annotations

from flowml_tools.reproduce import payoff
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, between

SHARE = 0.001


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    def chain(share: float) -> tuple[object, ...]:
        return (fm.filters.top_k(share).with_error_feedback(),)

    steps = 2000 if full else 200
    small, large = (payoff.measure(chain(share), steps=steps, seed=seed, rate=0.3) for share in (0.02, SHARE))
    return Outcome(
        f"Top 2 % and {SHARE:.1%} in the fit, whose layers are small ({SHARE:.1%} of 512 elements is one), and "
        f"{SHARE:.1%} of the large array. The paper's models have millions of elements, and it begins with larger "
        f"shares. {payoff.SETTING}",
        (
            between("bytes saved of 1024 x 1024 at 99.9 %", 270, 600, large.large, "{:.0f} x"),
            at_least("bytes saved in the fit at 98 %", 15, small.fewer, "{:.0f} x"),
            at_most("loss at 98 % against plain gradients after as many steps", 1.1, small.loss),
            at_most("loss at 99.9 % against plain gradients after as many steps", 1.1, large.loss),
            payoff.pays("pays on links slower than, MB/s for a core", large),
        ),
        payoff.plot("Loss with the largest elements", top_2_percent=small, top_tenth_of_a_percent=large),
    )


CLAIM = Claim(
    "Lin et al., Deep Gradient Compression, ICLR 2018",
    "abstract and table 3",
    "99.9 % of the elements of a gradient need not be sent at once: 270 to 600 times fewer bytes at an equal loss.",
    run,
)
