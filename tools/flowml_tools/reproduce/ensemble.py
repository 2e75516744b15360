"""Ensemble-compression: average outputs instead of parameters, and distil them into one model of the original size."""

from __future__ import annotations

from typing import Any

from flowml_tools.bench.stragglers import logits_of
from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_most, holds
from flowml_tools.reproduce.learning import final_loss, loss, problem, train


def run(full: bool, seed: int) -> Outcome:
    import jax
    import numpy as np
    import optax

    import flowml as fm

    replicas, steps, students = (8, 400, 600) if full else (3, 100, 150)
    params, examples, test = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    held: tuple[Any, Any, Any] = loss, params, test
    optimizer = optax.adam(0.01)
    own = [_slice(examples, r, replicas) for r in range(replicas)]
    starts = [problem(seed + 1 + r)[0] for r in range(replicas)]
    models = [
        train(fm.Policy(), 1, steps=steps, seed=seed, problem=(loss, start, part), optimizer=optimizer, batch=16).params
        for start, part in zip(starts, own, strict=True)
    ]
    losses = [float(loss(model, test)) for model in models]
    outputs = [logits_of(model, test["x"]) for model in models]
    together = [_loss_of_outputs(outputs[: k + 1], test["label"]) for k in range(replicas)]
    averages = [jax.tree_util.tree_map(lambda *x: np.mean(x, axis=0), *models[: k + 1]) for k in range(replicas)]
    mean = float(np.mean(losses))
    averaged = [float(loss(average, test)) for average in averages]
    distil = fm.Distill(logits_of, examples["x"], steps=students, optimizer=optax.adam(3e-3))
    policy = fm.Policy(payload=fm.Weights(), every=steps, apply=distil)
    result = train(policy, replicas, steps=steps, seed=seed, problem=task, optimizer=optimizer, batch=16 * replicas)
    same = {k: v.shape for k, v in result.params.items()} == {k: v.shape for k, v in params.items()}
    return Outcome(
        f"{replicas} networks of 32 x 64 x 8 with first parameters of their own, each trained on its part of the data "
        f"for {steps} steps of 16 examples with Adam; losses on 1,024 held-out examples. Student: {students} steps on "
        "the mean outputs of replicas.",
        (
            at_most("loss of the mean output against the mean of the losses", 1.0, together[-1] / mean),
            at_most("loss of the mean output against that of the mean parameters", 1.0, together[-1] / averaged[-1]),
            at_most("loss of the student against the mean of the losses", 1.0, final_loss(held, result) / mean),
            holds("size of the student", "that of a model", "the same" if same else "another", same),
        ),
        Plot(
            "Losses of k models together",
            "models k",
            "loss on held-out examples",
            (
                Line("mean output", list(enumerate(together, 1))),
                Line("mean parameters", list(enumerate(averaged, 1))),
                Line("mean loss", [(k, float(np.mean(losses[:k]))) for k in range(1, replicas + 1)], dashed=True),
                Line("student", [(replicas, final_loss(held, result))]),
            ),
        ),
    )


def _loss_of_outputs(outputs: Any, labels: Any) -> float:
    import numpy as np
    import optax

    return float(optax.softmax_cross_entropy_with_integer_labels(np.mean(outputs, axis=0), labels).mean())


def _slice(examples: Any, part: int, parts: int) -> Any:
    return {name: leaf[part::parts] for name, leaf in examples.items()}


CLAIM = Claim(
    "Sun et al., Ensemble-Compression, ECML 2017",
    "section 3 and theorem 1",
    "The loss of the mean output is at most the mean of the losses, which does not hold for mean parameters, and a "
    "student of the original size keeps it.",
    run,
)
