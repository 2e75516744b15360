"""Filters of what homes publish: readers have the same bits, nothing is lost for good, bytes are those on the wire."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import flowml as fm
from flowml.arrays import ArraySpec
from flowml_runtime import wire
from flowml_runtime.worker.training.published import MOST_PENDING, WHOLE, PublicCopy, Reader, StoreView
from flowml_runtime.worker.training.publisher import News, Publisher, merged, most_ahead
from tests.training.reference import BATCH, assert_same, data, mlp, mlp_loss
from tests.training.test_filtered import SHAPE, stores

f = fm.filters
SOURCE = data()
STEPS = 6
CHAINS: list[tuple[Any, ...]] = [
    (f.quantise(8),),
    (f.top_k(0.2), f.key_cache(), f.quantise(4)),
    (f.significance(0.05), f.key_cache(), f.compress()),
    (f.low_rank(2),),
    (f.random_k(0.3),),
    (f.sign(), f.compress()),
]
LOSSLESS: list[tuple[Any, ...]] = [(f.compress(),), (f.compress(9),)]


def text(chain: Any) -> str:
    return ", ".join(map(str, chain))


def fit(cluster: Any, pull_filters: Any = (), steps: int = STEPS, **knobs: Any) -> fm.TrainingResult:
    policy = fm.Policy(pull_filters=pull_filters, **knobs)
    trainer = fm.Trainer(mlp_loss, optax.adam(1e-2), cluster=cluster, replicas=2, policies=policy)
    return trainer.fit(mlp(), SOURCE, batch_size=BATCH, steps=steps)


STORES = {chain: stores((), pull_filters=chain) for chain in (*CHAINS, *LOSSLESS)}


def walk(steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return list(np.cumsum(rng.normal(size=(steps, *SHAPE)), axis=0, dtype=np.float32))


@given(st.sampled_from([*CHAINS, *LOSSLESS]), st.lists(st.booleans(), min_size=20, max_size=20))
def test_readers_have_the_copy_of_the_home(chain: Any, misses: list[bool]) -> None:
    """One reader gets each difference, another gets some versions whole, and a third reads rarely."""
    (spec,) = STORES[chain]
    home, readers = PublicCopy(spec, (0,)), [Reader(spec) for _ in range(3)]
    views: list[StoreView | None] = [None] * 3
    for version, (value, misses_it) in enumerate(zip(walk(20), misses, strict=True)):
        base, sent = home.advance(version, [value])
        assert base == (version if chain in LOSSLESS else version - 1 if version else WHOLE)
        views[0] = readers[0].view(version, base, sent, views[0])
        views[2] = readers[2].view(version, base, sent, views[2])
        assert views[2].pending <= MOST_PENDING
        if misses_it and 0 <= base < version:
            home.forget()
            views[1] = readers[1].view(version, WHOLE, home.values, views[1])
        else:
            views[1] = readers[1].view(version, base, sent, views[1])
        if version % 7 == 6:
            assert views[2].values[0].tobytes() == views[0].values[0].tobytes()
        for view in views[:2]:
            assert view is not None
            expected = home.values[0] if chain in CHAINS else value
            assert view.values[0].tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("chain", CHAINS, ids=text)
def test_what_is_left_out_comes_later(chain: Any) -> None:
    """Once the parameters stay as they are, the copy comes to them."""
    (spec,) = STORES[chain]
    home, (first, *_, last) = PublicCopy(spec, (0,)), walk(9)
    home.advance(0, [first])
    for version in range(1, 300):
        home.advance(version, [last])
    assert np.abs(home.values[0] - last).max() <= 0.06 * np.abs(last).max()


def test_a_difference_to_another_version_is_an_error() -> None:
    (spec,) = STORES[CHAINS[0]]
    with pytest.raises(fm.FlowmlError, match="version 3 of layer 'w' refers to version 2, not here"):
        Reader(spec).view(3, 2, [np.zeros(3)], StoreView(1, ()))
    with pytest.raises(fm.FlowmlError, match="the home of layer 'w' published what its filters cannot have made"):
        _ = Reader(spec).view(3, 2, [np.zeros(3)], StoreView(2, [np.zeros(SHAPE)])).values


def published(version: int, base: int, *arrays: Any) -> News:
    specs = tuple(ArraySpec(a.shape, a.dtype.name) for a in arrays)
    message = wire.Published(plan_id="p", run=0, store=0, version=version, floor=version, specs=specs, base=base)
    return News(message, arrays, (np.full(9, version),) if base >= 0 else ())


def test_a_version_that_replaces_another_travels_whole() -> None:
    difference, whole, floor = published(3, 2, np.ones(2)), published(4, WHOLE, np.ones(9)), published(5, WHOLE)
    assert merged(None, difference) is difference
    assert merged(difference, whole) is whole
    kept = merged(difference, floor)
    assert (kept.message.base, kept.message.floor, kept.message.specs) == (2, 5, difference.message.specs)
    for before in (difference, kept, whole):
        found = merged(before, published(6, 5, np.ones(2)))
        assert (found.message.base, found.message.version) == (WHOLE, 6)
        assert (found.arrays[0] == 6).all()
        assert found.message.specs[0].shape == (9,)
    assert merged(floor, difference) is difference


def test_a_publisher_says_that_a_reader_gets_a_version_whole() -> None:
    taking, sent = threading.Event(), list[tuple[int, int]]()

    def send(_reader: str, message: wire.Published, _: Any, timeout_s: float | None) -> None:
        if not taking.is_set():
            if timeout_s is not None:
                raise TimeoutError
            taking.wait(60)
        sent.append((message.version, message.base))

    failed: list[BaseException] = []
    publisher, over = Publisher("home", send, failed.append), threading.Event()
    news = [published(v, v - 1, np.ones(2)) for v in range(9)]
    told = [publisher.publish("slow", *n) for n in news]
    publisher.after_all(over.set)
    taking.set()
    assert over.wait(60)
    publisher.close()
    assert not failed
    newest = WHOLE
    for version, base in sent:
        assert base in (WHOLE, newest), "a difference to what the reader has"
        assert base == WHOLE or not told[version]
        newest = version
    assert newest == 8
    assert told[-1]


def test_a_reader_that_was_stopped_gets_the_newest_version_and_few_others() -> None:
    """Its way takes everything, as a long queue of messages does."""
    on_the_way, sent = [0], list[int]()

    def send(_reader: str, message: wire.Published, arrays: Any, _timeout_s: float | None) -> None:
        sent.append(message.version)
        on_the_way[0] += sum(array.nbytes for array in arrays)

    failed: list[BaseException] = []
    publisher, over = Publisher("home", send, failed.append, lambda _: on_the_way[0]), threading.Event()
    values, versions = np.ones(2**15), 500  # 256 KiB
    for version in range(versions):
        publisher.publish("stopped", *published(version, WHOLE, values))
    few = most_ahead(published(0, WHOLE, values)) // values.nbytes + 1
    assert sent == list(range(few))
    publisher.after_all(over.set)
    on_the_way[0] = 0
    assert over.wait(60)
    publisher.close()
    assert not failed
    assert sent == [*range(few), versions - 1]


def test_a_publisher_that_is_closed_waits_for_no_reader() -> None:
    publisher = Publisher("home", lambda *_: None, lambda _: None, lambda _: 2**40)
    publisher.publish("stopped", *published(0, WHOLE, np.ones(2)))
    thread = next(t for t in threading.enumerate() if t.name == "home publish to stopped")
    publisher.close()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["threads_cluster", "process_cluster"])
def test_a_real_fit_and_a_simulated_one_agree(kind: str, request: pytest.FixtureRequest) -> None:
    plain = fit(request.getfixturevalue(kind))
    for chain in (CHAINS[1], LOSSLESS[0]):
        real = fit(request.getfixturevalue(kind), chain)
        virtual = fit(fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9)), chain)
        assert_same(virtual.params, real.params)
        assert virtual.traffic == real.traffic
        assert mlp_loss(real.params, SOURCE) < mlp_loss(mlp(), SOURCE)
        if chain in LOSSLESS:
            assert_same(real.params, plain.params)
        else:
            assert real.traffic["fc1"]["published_wire_bytes"] < plain.traffic["fc1"]["published_wire_bytes"] / 2


def test_bytes_are_those_on_the_wire(threads_cluster: fm.Cluster) -> None:
    chain = (f.quantise(4),)
    sizes = [f.Form(shape, np.dtype(np.float32)) for shape in ((16, 16), (16,))]
    each, whole = sum(f.nbytes(chain, x) or 0 for x in sizes), sum(x.nbytes for x in sizes)
    for cluster in (
        threads_cluster,
        fm.SimulatedCluster(2, fm.sim.Constant(0.1), fm.sim.Network(1e-3, 1e9), arithmetic=False),
    ):
        result = fit(cluster, chain)
        assert result.traffic["fc1"]["published_wire_bytes"] == whole + each * STEPS, "one replica is at the home"


@pytest.mark.parametrize(
    "knobs",
    [
        {"filters": (f.top_k(0.2).with_error_feedback(),)},
        {"staleness": fm.UNBOUNDED},
        {"every": 2, "payload": fm.Delta(), "apply": fm.Outer(optax.sgd(0.7, momentum=0.9))},
        {"every": 2, "payload": fm.Weights()},
        {"quorum": fm.Quorum(1)},
    ],
    ids=lambda knobs: "-".join(f"{k}={type(v).__name__}" for k, v in knobs.items()),
)
def test_it_trains_under_several_rules(threads_cluster: fm.Cluster, knobs: Any) -> None:
    result = fit(threads_cluster, (f.quantise(8),), **knobs)
    assert mlp_loss(result.params, SOURCE) < mlp_loss(mlp(), SOURCE)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: fm.Policy(topology=fm.Ring(), pull_filters=(f.top_k(0.1),)), "no home publishes"),
        (lambda: fm.Policy(topology=fm.SharedMemory(), pull_filters=(f.compress(),)), "no home publishes"),
        (lambda: fm.Policy(topology=fm.Gossip("ring"), pull_filters=(f.compress(),)), "no home publishes"),
        (lambda: fm.Policy(pull_filters=(f.kkt(0.1),)), "its condition is on gradients"),
        (lambda: fm.Policy(pull_filters=(f.quantise(4, stochastic=True),)), "may be larger than the difference"),
        (lambda: fm.Policy(pull_filters=(f.top_k(0.1).with_error_feedback(0.9),)), "none of it is forgotten"),
        (lambda: fm.Policy(pull_filters=f.top_k(0.1)), "pull_filters=.*give a tuple of filters"),
    ],
)
def test_unsound_policies_are_refused(make: Any, why: str) -> None:
    with pytest.raises(fm.PolicyError, match=why):
        make()


def test_a_policy_says_what_it_publishes() -> None:
    assert (
        fm.Policy(pull_filters=(f.quantise(8, stochastic=True),)).describe()
        == "sync, pull quantise(8, stochastic=True)"
    )
