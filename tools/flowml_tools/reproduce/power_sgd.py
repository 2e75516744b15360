"""PowerSGD: a gradient is sent as two factors of low rank, with error feedback."""

from __future__ import annotations

from flowml_tools.reproduce import payoff
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near

RANK = 2


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    found = payoff.measure(
        (fm.filters.low_rank(RANK).with_error_feedback(),), steps=1000 if full else 60, seed=seed, rate=0.3
    )
    return Outcome(
        f"Rank {RANK}. {payoff.SETTING}",
        (
            near("bytes saved of 1024 x 1024", payoff.SIDE / (2 * RANK), found.large, 0.01, "{:.0f} x"),
            at_most("loss against plain gradients after as many steps", 1.1, found.loss),
            payoff.pays("pays on links slower than, MB/s for a core", found),
        ),
        payoff.plot(f"Loss with factors of rank {RANK}", PowerSGD=found),
    )


CLAIM = Claim(
    "Vogels et al., PowerSGD, NeurIPS 2019",
    "tables 3 and 4",
    "Two factors of rank r send n m / (r (n + m)) times fewer bytes, with error feedback at an equal loss.",
    run,
)
