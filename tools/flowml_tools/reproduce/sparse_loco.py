"""SparseLoCo: local steps, and then the largest elements of the change in 2 bits with error feedback."""

from __future__ import annotations

from typing import Any

from flowml_tools.reproduce.claims import Claim, Outcome, at_most, near
from flowml_tools.reproduce.learning import final_loss, loss, problem, train
from flowml_tools.reproduce.payoff import SIDE, fewer

REPLICAS, KEEP, BITS = 4, 1 / 64, 2


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    steps, every = (6000, 30) if full else (120, 4)
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    ours, whole = (
        final_loss(
            task, train(policy, REPLICAS, steps=steps, seed=seed, problem=task, optimizer=optax.adam(3e-3), batch=64)
        )
        for policy in (fm.policies.sparse_loco(every, KEEP, BITS), fm.policies.local_sgd(every))
    )
    f = fm.filters
    sparse = f.top_k(KEEP).with_error_feedback(0.95), f.quantise(BITS)
    return Outcome(
        f"{REPLICAS} replicas, {steps} steps of 16 examples each with Adam, H = {every}, 1/64 of the elements in "
        f"{BITS} bits; a network of 32 x 64 x 8 on data of 8 classes, real arithmetic. Bytes: an array of "
        f"{SIDE} x {SIDE} whose positions are packed by zlib; unpacked they are {fewer(sparse, seed):.0f} times fewer.",
        (
            near(
                "bytes saved of a large array",
                146,
                fewer((*sparse, f.compress()), seed),
                0.15,
                "{:.0f} x",
            ),
            at_most("loss against whole changes after as many steps", 1.1, ours / whole),
        ),
    )


CLAIM = Claim(
    "Sarfi et al., SparseLoCo, 2025, and arXiv 2603.08163",
    "abstract",
    "A change of which 1/64 of the elements are sent in 2 bits, with error feedback, is as good as the whole one, "
    "with 146 times fewer bytes.",
    run,
)
