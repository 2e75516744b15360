"""Microbatches of all replicas are counted, and those that still compute are told to stop, once."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flowml.policy import Policy, Quorum
from flowml_runtime import wire
from flowml_runtime.protocol.errors import ProtocolError
from flowml_runtime.protocol.training.actions import Computed as Event
from flowml_runtime.protocol.training.actions import Received, Send
from flowml_runtime.protocol.training.cut import Cut
from flowml_runtime.protocol.training.pace import Computed, Halt, Pace
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.store_terms import StoreTerms
from flowml_runtime.protocol.training.terms import ReplicaLost, Terms
from flowml_runtime.protocol.training.worker import TrainingWorker


def terms_of(quorum: Quorum, replicas: int, microbatches: int) -> Terms:
    return Terms(replicas, 1, microbatches, (StoreTerms((0,), Policy(quorum=quorum)),), 3)


def pace_of(quorum: Quorum, replicas: int = 3, microbatches: int = 4) -> Pace:
    return Pace(terms_of(quorum, replicas, microbatches), quorum)


def test_those_that_still_compute_are_told_once() -> None:
    pace = pace_of(Quorum(6, of="microbatches"))
    assert pace.step(Computed(0, 0, 4)) == []
    assert pace.step(Computed(1, 0, 1)) == []
    pace.validate()
    assert pace.step(Computed(1, 0, 2)) == [Halt(0, (1, 2))]
    assert pace.step(Computed(2, 0, 1)) == [], "it hears of it too late"
    assert pace.step(Computed(1, 1, 4)) == [], "the next clock counts anew"
    pace.validate()


def test_repeated_and_overtaken_messages_count_once() -> None:
    pace = pace_of(Quorum(0.5, of="microbatches"))
    for count in (3, 2, 3, 1, 3):
        assert pace.step(Computed(0, 0, count)) == []
    assert pace.step(Computed(2, 0, 3)) == [Halt(0, (0, 1, 2))]


def test_a_share_is_one_of_what_those_that_are_left_can_compute() -> None:
    pace = pace_of(Quorum(0.5, of="microbatches"))
    assert pace.step(Computed(0, 0, 2)) == []
    assert pace.step(Computed(2, 0, 2)) == []
    pace.validate()
    assert pace.step(ReplicaLost(2)) == [], "5 of the 10 that there will be are not there"
    assert pace.step(Computed(0, 0, 3)) == [Halt(0, (0, 1))]
    pace.validate()


@pytest.mark.parametrize("wrong", [Computed(3, 0, 1), Computed(0, 0, 5), Computed(0, 0, 0)])
def test_impossible_counts_break_the_protocol(wrong: Computed) -> None:
    with pytest.raises(ProtocolError, match="of which 3 replicas have 4 each"):
        pace_of(Quorum(6, of="microbatches")).step(wrong)


def test_nothing_is_told_without_such_a_quorum_nor_before_the_others_could_have_the_rest() -> None:
    silent = Cut(terms_of(Quorum(), 2, 4), 0)
    silent.begin(0)
    assert not any(silent.finish() for _ in range(4))
    cut = Cut(terms_of(Quorum(7, of="microbatches"), 2, 4), 0)
    cut.begin(0)
    assert [cut.finish(), cut.finish(), cut.finish()] == [False, False, True], "the other has 4 of 7 at most"
    assert not cut.finish(), "the machine is about to tell, and tells of both"
    assert cut.told() == 4
    cut.begin(1)
    cut.halt(1)
    assert not cut.leaves_out(0, 0.0)
    assert cut.leaves_out(1, 0.0)
    cut.begin(2)
    assert not cut.leaves_out(1, 0.0), "that is another clock"


def test_random_arrivals_stop_everyone_as_a_sorted_list_says() -> None:
    """Microbatches end at random times and messages take none: what is used equals what NumPy says."""
    rng = random.Random(7)
    for _ in range(300):
        replicas, count = rng.randint(1, 6), rng.randint(2, 6)
        amount: int | float = rng.choice([rng.randint(1, replicas * count), round(rng.uniform(0.05, 1), 2)])
        quorum = Quorum(amount, of="microbatches")
        terms = terms_of(quorum, replicas, count)
        ends = np.cumsum([[rng.random() for _ in range(count)] for _ in range(replicas)], axis=1)
        pace, cuts = Pace(terms, quorum), [Cut(terms, 0) for _ in range(replicas)]
        for cut in cuts:
            cut.begin(0)
        for replica, microbatch in sorted(np.ndindex(replicas, count), key=lambda at: ends[at]):
            cut = cuts[replica]
            if cut.leaves_out(microbatch, 0.0):
                continue
            told = [Computed(replica, 0, cut.told())] if cut.finish() else []
            cut.leaves_out(min(microbatch + 1, count - 1), 0.0)  # the next one begins before any message arrives
            for halt in (h for event in told for h in pace.step(event)):
                for late in halt.replicas:
                    cuts[late].halt(halt.clock)
            pace.validate()
        reached = np.sort(ends, axis=None)[quorum.need(replicas * count) - 1]
        begins = np.concatenate([np.zeros((replicas, 1)), ends[:, :-1]], axis=1)
        assert [cut.used for cut in cuts] == list(np.sum(begins <= reached, axis=1))


def test_the_first_home_counts_and_tells_the_stages_that_decide() -> None:
    quorum = Quorum(3, of="microbatches")
    terms = terms_of(quorum, 2, 4)
    here = {"w0": ("w0", "w1")}
    places = Places((("w0",), ("w1",)), (("w0",),), (here,))
    ids = {"plan_id": "plan", "run": 0}
    machines = {w: TrainingWorker(w, "driver", terms, places) for w in ("w0", "w1")}
    start = wire.StartTraining(**ids, total_clocks=3, seed=0, shuffle=False, examples=8, source="shipped")
    item = wire.Item(sequence=1, epoch=0, start=0, size=4)
    for name, machine in machines.items():
        machine.step(Received("driver", start))
        machine.step(Received("driver", wire.Grant(**ids, replica=int(name[1]), items=((0, item),))))
    for _ in range(2):
        machines["w1"].stage((1, 0)).cut.finish()
    (told,) = machines["w1"].step(Event(0, 1, 0))
    assert isinstance(told, Send) and told.to == ("w0",)
    assert isinstance(told.message, wire.Computed) and told.message.microbatches == 2
    assert machines["w0"].step(Received("w1", told.message)) == []
    machines["w0"].stage((0, 0)).cut.finish()
    (halt,) = machines["w0"].step(Event(0, 0, 0))
    assert isinstance(halt, Send) and halt.to == ("w0", "w1") and isinstance(halt.message, wire.Halt)
    machines["w1"].step(Received("w0", halt.message))
    assert machines["w1"].stage((1, 0)).cut.leaves_out(3, 0.0)
    for machine in machines.values():
        machine.validate()
