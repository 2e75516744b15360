"""Makes a run of given policies: stores, stages, replicas and the workers that they are on, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowml.instructions import Feed, Instruction, Push, Read, Recv, Run, Send
from flowml.plan import ArraySpec, Part, Reduction
from flowml.policy import Policy, check_composition
from flowml_runtime.protocol.training import ledger
from flowml_runtime.protocol.training.terms import Places, StoreTerms, Terms
from flowml_runtime.sim.program import At, Edge, Sizes, StageProgram
from flowml_runtime.sim.world import Layout
from flowml_tools.faults.world import World

MICROBATCHES = 2


def _program(name: str, at: At, terms: Terms) -> StageProgram:
    """forward, backward, and pushes after the gradient has gone upstream, so that stages drift apart."""
    (who, stage), last = at, terms.stages - 1
    mine = [(i, p) for i, s in enumerate(terms.stores) for p, owner in enumerate(s.stages) if owner == stage]
    up, down, first = 2 * stage - 1, 2 * stage + 1, 2 * stage  # messages: forward 0, 2, …; backward 1, 3, …
    run = Run(task=0, inputs=(), outputs=())
    instructions: list[Instruction] = [
        Feed(slots=(), buffers=()),
        *([Recv(message=first - 2, buffers=())] if stage else []),
        *[Read(store=i, leaves=(), buffers=()) for i in dict.fromkeys(i for i, _ in mine)],
        run,
        *([Send(message=first, buffers=()), Recv(message=down, buffers=())] if stage < last else []),
        run,
        *([Send(message=up, buffers=())] if stage else []),
        run,
        *[Push(store=i, part=p, buffers=()) for i, p in mine],
    ]
    edges = {first: Edge((who, stage + 1), 0), up: Edge((who, stage - 1), 0)}
    return StageProgram(name, tuple(instructions), tuple(isinstance(i, Run) / 3 for i in instructions), edges)


def make(
    rules: Sequence[Policy],
    *,
    replicas: int,
    stages: int = 2,
    clocks: int = 12,
    items: int | None = None,
    speeds: Sequence[float] = (1, 1, 1, 1),
    seed: int = 0,
    twice: float = 0.0,
    homes_on: int | None = None,
    workers: int | None = None,
    **options: Any,
) -> World:
    """A run with one store a policy; every third store is shared by the first and last stage, as tied weights are.

    Each stage of each replica has a worker of its own, unless `workers` says how many there are to share. `options` are
    further fields of the World.
    """
    check_composition({str(i): p for i, p in enumerate(rules)}, replicas)
    grid = [(r, s) for r in range(replicas) for s in range(stages)]
    names = {at: f"worker:{n if workers is None else n % workers}" for n, at in enumerate(grid)}
    stores: list[StoreTerms] = []
    homes: list[tuple[str, ...]] = []
    readers: list[dict[str, tuple[str, ...]]] = []
    parts: list[tuple[Part, ...]] = []
    for i, p in enumerate(rules):
        shared = (0, stages - 1) if i % 3 == 2 and stages > 1 else (i % stages,)
        home = shared[0]
        stores.append(StoreTerms(shared, p, p.collective))
        owners = range(replicas) if p.collective else [i % replicas if homes_on is None else homes_on]
        homes.append(tuple(dict.fromkeys(names[r, home] for r in owners)))
        readers.append({})
        for name in homes[-1]:
            served = [r for r in range(replicas) if not p.collective or names[r, home] == name]
            readers[-1][name] = tuple(dict.fromkeys(names[r, s] for r in served for s in shared))
        ranks = {s: tuple(dict.fromkeys(names[r, s] for r in range(replicas))) for s in shared}
        sums = {s: Reduction(("ring", "doubling", "tree")[i % 3], w, tuple(range(len(w))), 2) for s, w in ranks.items()}
        payload = (ArraySpec((8,), "float32"),)
        parts.append(tuple(Part(s, (), payload, reduction=sums[s] if p.collective else None) for s in shared))
    items = items or replicas * 4
    terms = Terms(replicas, stages, MICROBATCHES, tuple(stores), clocks)
    by_stage = tuple(tuple(names[r, s] for s in range(stages)) for r in range(replicas))
    places = Places(by_stage, tuple(homes), tuple(readers))
    programs = {at: _program(names[at], at, terms) for at in grid}
    sizes = Sizes((64,) * len(rules), (64,) * len(rules), tuple((32,) * len(p) for p in parts))
    layout = Layout(terms, places, programs, parts, sizes, [str(i) for i in range(len(rules))])
    speculation = terms.speculation
    work = ledger.Work(
        replicas,
        items if speculation is None else items // replicas * terms.members,
        item_size=8,
        total_clocks=clocks,
        aligned=terms.aligned,
        portions=terms.members // replicas,
        copies=speculation.copies if speculation else None,
    )
    return World(layout, work, speeds, seed, twice, **options)
