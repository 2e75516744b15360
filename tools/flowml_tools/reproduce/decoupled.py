"""Decoupled DiLoCo: learners that fail do not stop the others, because a few of them complete a round.

A learner here is one simulated replica that stands for all of its chips. A failure of any of them stops it for the
recovery time. The recovery time is chosen so that training in which all learners wait for each other has the goodput
that the paper gives for it; the goodput of decoupled learners then follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near
from flowml_tools.reproduce.clocks import simulate
from flowml_tools.reproduce.learning import final_loss, loss, problem, train

if TYPE_CHECKING:
    import flowml as fm
    from flowml.sim import ComputeModel

CHIPS, YEAR_S = 1_200_000, 365 * 24 * 3600
WAITING = 0.27
RECOVERY_S = (1 / WAITING - 1) / (CHIPS / YEAR_S)
"""With failures at this rate and all learners waiting, 27 % of the time is useful. A learner of M then is up for
1 / (1 + (1 / 0.27 - 1) / M) of the time, and decoupled ones can have no more goodput: 75 % with 8, 86 % with 16."""


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    steps, counts = (2000, (2, 4, 8, 16, 32, 64)) if full else (600, (8, 16))

    def goodput(policy: fm.Policy, learners: int) -> float:
        found = simulate(policy, learners, _failing(learners), steps=steps, seed=seed)
        counted = found.ledger.used + found.ledger.folded
        return counted / (learners * found.history[-1]["seconds"])

    decoupled = {m: goodput(fm.policies.decoupled_diloco(20, quorum=1), m) for m in counts}
    up = {m: 1 / (1 + (1 / WAITING - 1) / m) for m in counts}  # of the time in which a learner does not recover
    waiting = {m: goodput(fm.Policy(), m) for m in (counts if full else counts[:1])}
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ends = [
        final_loss(
            task,
            train(
                policy, 8, steps=80, seed=seed, problem=task, optimizer=optax.sgd(0.1), batch=64, compute=_failing(8)
            ),
        )
        for policy in (fm.policies.decoupled_diloco(10, quorum=1), fm.policies.diloco(10))
    ]
    return Outcome(
        f"{CHIPS:,} chips in {', '.join(map(str, counts))} learners, each one simulated replica; {steps} steps of 1 "
        f"s, a failure of a chip once a year, {RECOVERY_S:.0f} s to recover, of which 27 % follows for learners that "
        f"wait; a learner of 8 then is up for {up[8]:.0%} of the time. Rounds of 20 steps, a quorum of 1 and a learnt "
        "grace time. Loss: 8 learners, 8 rounds of 10 steps, a network of 32 x 64 x 8, real arithmetic.",
        (
            near("goodput of 8 decoupled learners", 0.88, decoupled[8], 0.05, "{:.0%}"),
            near("goodput of 16 decoupled learners", 0.88, decoupled[16], 0.05, "{:.0%}"),
            near("goodput of 8 against the time in which a learner is up", 1.0, decoupled[8] / up[8], 0.1),
            near("goodput of 16 against the time in which a learner is up", 1.0, decoupled[16] / up[16], 0.1),
            at_most("loss against DiLoCo that waits, after as many steps", 1.1, ends[0] / ends[1]),
        ),
        Plot(
            "Goodput of 1.2 million chips that fail",
            "learners",
            "goodput, %",
            (
                Line("decoupled", [(m, 100 * share) for m, share in decoupled.items()]),
                Line("all wait", [(m, 100 * share) for m, share in waiting.items()]),
                Line("a learner is up", [(m, 100 * share) for m, share in up.items()], dashed=True),
            ),
            log_x=True,
        ),
    )


def _failing(learners: int) -> ComputeModel:
    """Steps of 1 s, and a pause in those in which one of a learner's chips fails."""
    import math

    import flowml as fm

    fails = 1 - math.exp(-CHIPS / YEAR_S / learners)
    return fm.sim.Straggler(fm.sim.Constant(1.0), 1 + RECOVERY_S, share=1.0, probability=fails)


CLAIM = Claim(
    "Douillard et al., Decoupled DiLoCo for Resilient Distributed Pre-training, 2026",
    "section on goodput, 1.2 million chips",
    "With 1.2 million chips that fail, decoupled learners have a goodput of 88 %, where training that waits has 27 %.",
    run,
)
