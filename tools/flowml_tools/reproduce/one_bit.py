"""1-bit SGD: each element is sent as its sign, and what that loses is added to the next gradient."""

from __future__ import annotations

from flowml_tools.reproduce import payoff
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most, near


def run(full: bool, seed: int) -> Outcome:
    import flowml as fm

    steps = 1000 if full else 60
    kept = payoff.measure((fm.filters.sign().with_error_feedback(),), steps=steps, seed=seed, rate=0.3)
    lost = payoff.measure((fm.filters.sign(),), steps=steps, seed=seed, rate=0.3)
    return Outcome(
        f"Signs and one magnitude an array. {payoff.SETTING}",
        (
            near("bytes saved of 1024 x 1024", 32, kept.large, 0.01, "{:.1f} x"),
            at_most("loss against plain gradients after as many steps", 1.1, kept.loss),
            at_least("loss without error feedback against that with it", 1.1, lost.loss / kept.loss),
            payoff.pays("pays on links slower than, MB/s for a core", kept),
        ),
        payoff.plot("Loss with one bit an element", with_feedback=kept, without_feedback=lost),
    )


CLAIM = Claim(
    "Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014",
    "section 3",
    "One bit an element is enough if the error of quantisation is carried over to the next gradient.",
    run,
)
