"""Random sound policies on random groups of layers keep every promise on both clocks; unsound ones are refused."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flowml as fm
from flowml import filters
from flowml.policy import (
    UNBOUNDED,
    Coded,
    Deadline,
    Drop,
    Fold,
    Mean,
    Policy,
    Quorum,
    Requeue,
    StalenessScaled,
    Sum,
    check_composition,
)
from flowml.policy.apply import base_of
from flowml_runtime import wire
from flowml_runtime.protocol.training.actions import Received
from flowml_runtime.protocol.training.driver import TrainingDriver
from flowml_runtime.protocol.training.worker import TrainingWorker
from flowml_tools.faults.campaign import check_rest, run
from flowml_tools.faults.cases import Case
from flowml_tools.faults.checker import check
from flowml_tools.faults.draws import KINDS, WHOLES, policies
from flowml_tools.faults.history import DRIVER, History, Turn
from flowml_tools.faults.layout import make

pytestmark = pytest.mark.filterwarnings("ignore:.*, and the fit has :flowml.FlowmlWarning")
"""Periods and steps are drawn apart, so some fits end before the first exchange."""

RANDOMS = st.randoms(use_true_random=False)
SEEDS = st.integers(0, 2**32)


@settings(max_examples=100)
@given(seed=SEEDS)
def test_random_policies_keep_every_promise_under_virtual_time(seed: int) -> None:
    finding = run(Case.of(seed))
    assert finding is None, finding.report() if finding else ""


class Recorded:
    """Records what the machines of all fits in this process are told and want."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.histories: list[tuple[History, TrainingDriver]] = []
        self._lock = threading.Lock()
        begin, drive, work = TrainingDriver.__init__, TrainingDriver.step, TrainingWorker.step

        def begun(machine: Any, start: Any, terms: Any, work: Any, places: Any, *others: Any, **named: Any) -> None:
            begin(machine, start, terms, work, places, *others, **named)
            self.histories.append((History(start.run, terms, places, work), machine))

        def driven(machine: Any, event: Any) -> Any:
            return self._note(DRIVER, machine, event, drive(machine, event), time.monotonic())

        def worked(machine: Any, event: Any, now: float = 0.0) -> Any:
            with self._lock:  # the order of the history is that of the events
                wanted = work(machine, event, now)
                machine.validate()
                return self._note(machine._me, machine, event, wanted, now)

        patch.setattr(TrainingDriver, "__init__", begun)
        patch.setattr(TrainingDriver, "step", driven)
        patch.setattr(TrainingWorker, "step", worked)

    def _note(self, who: str, machine: Any, event: Any, wanted: Any, now: float) -> Any:
        self.histories[-1][0].facts.append(Turn(now, who, machine.number, event, wanted))
        return wanted

    def newest(self) -> History:
        history, machine = self.histories[-1]
        history.summary = machine.ledger.summary()
        return history


def loss(params: Any, batch: Any) -> Any:
    """Its gradient by each parameter is 1 / n for the examples in the batch."""
    return sum(jnp.mean(p[batch["example"]]) for p in params.values())


@pytest.fixture(scope="module")
def one_worker() -> Iterator[fm.Cluster]:
    with fm.Cluster.threads(workers=1, devices_per_worker=3) as cluster:
        yield cluster


def drawn(kind: str) -> tuple[Policy, ...]:
    """Policies of a kind for a model without dense layers, whose gradients have no factors."""
    rng = random.Random(kind)
    while True:
        rules = policies(rng, 3, 3, kind)
        if not any(isinstance(p.payload, fm.Factors) for p in rules):
            return rules


@pytest.mark.parametrize("kind", [*KINDS, *WHOLES])
def test_random_policies_keep_every_promise_on_threads(
    kind: str, threads_cluster: fm.Cluster, one_worker: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = drawn(kind)
    recorded = Recorded(monkeypatch)
    names = [f"layer{i}" for i in range(3)]
    trainer = fm.Trainer(
        loss,
        optax.sgd(1.0),
        cluster=one_worker if kind == "shared" else threads_cluster,
        replicas=3,
        policies=dict(zip(names, rules, strict=True)),
        microbatches=2,
        delays={} if kind == "shared" else {"worker:1": 0.002},
    )
    examples = {"example": np.arange(36)}
    params = {name: jnp.zeros(36) for name in names}
    result = trainer.fit(params, examples, batch_size=36, epochs=4, progress=False)
    history = recorded.newest()
    assert check(history) == [], "; ".join(p.describe() for p in rules)
    for name, rule in zip(names, rules, strict=True):  # what the ledger says is used is in the parameters
        used = np.count_nonzero(np.asarray(result.params[name]))
        assert 0 < used <= 36
        if kind == "plain" and isinstance(base_of(rule.apply), Mean | Sum | StalenessScaled):
            assert used == 36 or result.ledger.dropped or result.ledger.requeued or result.ledger.groups


def test_bytes_on_threads_are_those_of_the_contributions_that_cross(
    threads_cluster: fm.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(monkeypatch)
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=threads_cluster, replicas=3)
    params = {"a": jnp.zeros(36), "b": jnp.zeros((36, 2))}
    trainer.fit(params, {"example": np.arange(36)}, batch_size=12, steps=6, progress=False)
    history, machine = recorded.histories[-1]
    sent = [
        (t.event.message.store, sum(s.nbytes for s in t.event.message.specs))
        for t in history.facts
        if isinstance(t, Turn) and isinstance(t.event, Received) and isinstance(t.event.message, wire.Contribution)
        if t.event.peer != t.who
    ]
    for store in range(len(history.terms.stores)):
        told = sum(row[3] for traffic in machine.traffic.values() for row in traffic.stores if row[0] == store)
        assert told == sum(nbytes for s, nbytes in sent if s == store) > 0


def crossed(rng: random.Random, replicas: int) -> dict[str, Any]:
    """Random knobs, each of a policy of any kind, so that most do not belong together."""
    knobs: dict[str, Any] = {}
    for name in (*Policy.__struct_fields__,):
        drawn = rng.choice(tuple(KINDS.values()))(rng, replicas)
        if name in drawn and rng.random() < 0.5:
            knobs[name] = drawn[name]
    if rng.random() < 0.15:
        knobs["quorum"] = rng.choice(tuple(WHOLES.values()))(rng, replicas)
    return knobs


@pytest.mark.parametrize(
    ("payload", "apply"),
    [(fm.Delta(), "mean"), (fm.Delta(), "sum"), (fm.Delta(), fm.Outer()), (fm.Weights(), "mean")],
    ids=str,
)
@pytest.mark.parametrize("topology", [fm.AllReduce(), fm.Ring(), fm.Tree()], ids=lambda t: type(t).__name__)
def test_sums_of_own_parameters_have_each_replica_once(topology: Any, payload: Any, apply: Any) -> None:
    for replicas in (2, 3):
        rule = Policy(topology=topology, payload=payload, every=3, apply=apply)
        world = make([rule, Policy()], replicas=replicas, stages=2, clocks=8, seed=replicas)
        world.go()
        check_rest(world)
        assert check(world.history) == []


@settings(max_examples=150)
@example(seed=37812)  # a sum of parameters of several replicas was checked as that of the first
@example(seed=44833)  # what filters make of a sum was checked as what replicas push
@given(seed=SEEDS)
def test_random_knobs_keep_every_promise_together_or_are_refused_with_a_reason(seed: int) -> None:
    """Nobody has said which of these are sound: about half of them run, and the others raise a PolicyError."""
    rng = random.Random(seed)
    replicas, stages = rng.randint(2, 4), rng.randint(1, 2)
    try:
        rules = [Policy(**crossed(rng, replicas)) for _ in range(rng.randint(1, 2))]
        shared = 1 if any(p.shared for p in rules) else None
        world = make(rules, replicas=replicas, stages=stages, clocks=4, seed=seed, workers=shared)
    except fm.PolicyError as error:
        assert_sentence(str(error))
        return
    world.go()
    check_rest(world)
    assert check(world.history) == [], "; ".join(p.describe() for p in rules)


# Rules that no policy may break. Each makes the knobs that break it, and all other knobs are random.

SUMS = [fm.AllReduce(), fm.Ring(), fm.Tree(), fm.Hierarchy()]
LOSSY = [filters.top_k(0.1), filters.quantise(8), filters.significance(0.01), filters.random_k(0.5)]
SOME = [Quorum(0.5), Quorum(2), Deadline(0.5), Quorum(0.75, of="samples"), Quorum(0.5, late="requeue")]
UNSOUND: dict[str, dict[str, list[Any]]] = {
    "factors of several steps": {"payload": [fm.Factors()], "every": [2, 3, 7]},
    "clocks without a bound": {"quorum": SOME, "staleness": [UNBOUNDED]},
    "a sum without some": {"topology": SUMS[:3], "quorum": SOME},
    "a sum of factors": {"topology": SUMS[:3], "payload": [fm.Factors()]},
    "a sum without a bound": {"topology": SUMS[:3], "staleness": [UNBOUNDED]},
    "a sum of arrays whose size or bits are not known": {
        "topology": SUMS[:3],
        "filters": [
            (filters.significance(0.01),),
            (filters.random_skip(0.5),),
            (filters.top_k(0.1), filters.compress()),
            (filters.top_k(0.1), filters.key_cache()),
            (filters.low_rank(2), filters.quantise(8)),
        ],
    },
    "a sum that votes": {"topology": SUMS[:3], "apply": [fm.Vote(2)]},
    "a sum that is scaled by its staleness": {"topology": SUMS[:3], "apply": [StalenessScaled()]},
    "a deadline without clocks": {"quorum": [Deadline(0.5, late="fold")], "staleness": [1, 4, UNBOUNDED]},
    "late without clocks": {"quorum": [Quorum(0.5, late=Fold(0.5))], "staleness": [1, 4, UNBOUNDED]},
    "filtered factors": {"payload": [fm.Factors()], "filters": [(filters.significance(0.01),)]},
    "parameters that a filter leaves out": {"payload": [fm.Weights()], "filters": [(f,) for f in LOSSY]},
    "added parameters": {"payload": [fm.Weights()], "apply": ["sum", StalenessScaled()]},
    "a pull without parameters": {"payload": [fm.Gradient()], "apply": [fm.Mix(0.1)]},
    "a stale code": {"quorum": [Coded(1), Coded(1, "cyclic")], "staleness": [1, 2]},
    "a code of several steps": {"quorum": [Coded(1), Coded(1, "cyclic")], "every": [2, 3]},
    "a code that a filter breaks": {"quorum": [Coded(1), Coded(1, "cyclic")], "filters": [(f,) for f in LOSSY]},
    "a coded sum of steps": {"quorum": [Coded(1)], "apply": ["sum", fm.Vote(2)]},
    "a step that waits for nothing": {"payload": [fm.Gradient()], "every": [fm.Every(4, delay=1)]},
    "a read from the future": {"staleness": [-1, -0.5]},
    "half a clock": {"staleness": [0.5, 1.5]},
}
OUT_OF_RANGE = ("a read from the future", "half a clock")
"""What is wrong is one value, and the refusal says which values there are."""
OTHERS: dict[str, list[Any]] = {
    "staleness": [0, 2, UNBOUNDED],
    "quorum": [None, *SOME],
    "every": [1, 3],
    "apply": ["mean", "sum"],
    "filters": [(), (filters.compress(),)],
}


@pytest.mark.parametrize("rule", UNSOUND)
@settings(max_examples=25)
@given(rng=RANDOMS)
def test_random_unsound_policies_are_refused_with_a_sentence_that_leads_to_a_sound_one(
    rule: str, rng: random.Random
) -> None:
    knobs = {name: rng.choice(values) for name, values in UNSOUND[rule].items()}
    for name in rng.sample(sorted(OTHERS.keys() - knobs.keys()), rng.randint(0, 2)):
        knobs[name] = rng.choice(OTHERS[name])
    with pytest.raises(fm.PolicyError) as caught:
        Policy(**knobs)
    assert_sentence(str(caught.value))
    if rule not in OUT_OF_RANGE:
        assert is_sound(knobs, advice=4), f"the advice leads nowhere: {caught.value}"


def is_sound(knobs: dict[str, Any], advice: int) -> bool:
    """Whether these knobs are sound, or become so by following what refusals advise, so many times."""
    try:
        Policy(**knobs)
    except fm.PolicyError as error:
        return advice > 0 and any(is_sound(better, advice - 1) for better in advised(str(error), knobs))
    return True


KNOBS = ("topology", "staleness", "quorum", "every", "payload", "filters", "apply", "late")
NAMES = {name: getattr(fm, name) for name in fm.__all__} | vars(filters) | {"flowml": fm, "fm": fm}


def advised(text: str, knobs: dict[str, Any]) -> list[dict[str, Any]]:
    """The knobs after each change that a refusal advises, of those that are code."""
    found: list[dict[str, Any]] = []
    advice = text[text.rindex("; ") if "; " in text else 0 :]
    for name in KNOBS:
        for start in (m.end() for m in re.finditer(rf"\b{name}=", advice)):
            value = evaluated(advice[start:])
            if value is not None and name == "late" and isinstance(knobs.get("quorum"), Quorum | Deadline):
                late = value if isinstance(value, str | Drop | Fold | Requeue) else "drop"
                found.append({**knobs, "quorum": msgspec.structs.replace(knobs["quorum"], late=late)})
            elif value is not None and name != "late":
                found.append({**knobs, name: value})
    for left in re.findall(r"leave (.*?) out", advice):
        found.append({name: value for name, value in knobs.items() if name not in left})
    for call in re.findall(r"\b(Quorum|Deadline|Coded)(?=\()", advice):
        value = evaluated(advice[advice.index(f"{call}(") :])
        found += [{**knobs, "quorum": value}] if value is not None else []
    if "compress()" in advice:
        found.append({**knobs, "filters": (filters.compress(),)})
    return found


def evaluated(text: str) -> Any:
    """The value of the longest beginning of a text that is code; None if there is none."""
    for end in range(len(text), 0, -1):
        try:
            return eval(text[:end].strip(), {"__builtins__": {}}, NAMES)
        except (SyntaxError, NameError, AttributeError, TypeError, ValueError, fm.FlowmlError):
            continue
    return None


@settings(max_examples=50)
@given(seed=SEEDS)
@example(seed=874593)  # layers of one code, which apply it in two ways
def test_random_unsound_models_are_refused_with_a_sentence(seed: int) -> None:
    rng = random.Random(seed)
    replicas = rng.randint(2, 5)
    model = {f"layer{i}": p for i, p in enumerate(policies(rng, replicas, rng.randint(1, 3)))}
    wrong = rng.choice([Policy(quorum=Quorum(replicas + rng.randint(1, 3))), Policy(quorum=Coded(1))])
    model[rng.choice([*model, "another"])] = wrong
    if isinstance(wrong.quorum, Coded) and all(p.quorum == wrong.quorum for p in model.values()):
        model["plain"] = Policy()
    with pytest.raises(fm.PolicyError) as caught:
        check_composition(model, replicas)
    assert_sentence(str(caught.value))


def assert_sentence(text: str) -> None:
    """One line that says what is wrong, and what to give instead."""
    assert "\n" not in text
    assert any(sign in text for sign in ("=", "(", "'")), f"names no knob: {text}"
    assert ";" in text or ":" in text, f"has no second half: {text}"
    assert len(text) > 40
