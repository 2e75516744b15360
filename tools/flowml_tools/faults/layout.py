"""Makes a run of given policies: stores, stages, replicas and the workers that they are on, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from flowml.devices import worker_of
from flowml.home import Applies, Buffer, Local
from flowml.instructions import Feed, Instruction, Push, Read, Recv, Run, Send
from flowml.placement.links import Links
from flowml.plan import ArraySpec, Part, StoreSpec, Training
from flowml.policy import Coded, Consensus, Gossip, Outer, Policy, Requeue, check_composition, coded_by, cut_by, cutting
from flowml.policy.apply import base_of
from flowml.training.groups import reduction_of, sites_of
from flowml.training.local import sending, taking
from flowml_runtime.protocol.training import ledger
from flowml_runtime.protocol.training.places import Places
from flowml_runtime.protocol.training.terms import Terms
from flowml_runtime.sim.program import At, Edge, Sizes, StageProgram
from flowml_runtime.sim.world import Layout
from flowml_runtime.worker.training.exchange.positions import which
from flowml_tools.faults.world import World

MICROBATCHES = 2
ITEM_SIZE = 8
COLUMNS = 4
"""Parameters are matrices, which some filters need."""

FOLD, MIX, ACCUMULATE, UPDATE, SEND, TAKE = range(6)
"""The tasks of a store. Their numbers in the plan are those of store 0, plus `len(TASKS)` for each store before."""
TASKS = (FOLD, MIX, ACCUMULATE, UPDATE, SEND, TAKE)


def _program(name: str, at: At, terms: Terms) -> StageProgram:
    """forward, backward, and pushes after the gradient has gone upstream, so that stages drift apart.

    A run whose steps may be cut has the microbatches one by one.
    """
    (who, stage), last = at, terms.stages - 1
    mine = [(i, p) for i, s in enumerate(terms.stores) for p, owner in enumerate(s.stages) if owner == stage]
    up, down, first = 2 * stage - 1, 2 * stage + 1, 2 * stage  # messages: forward 0, 2, …; backward 1, 3, …
    counted = range(terms.microbatches if terms.cut else 1)
    run = [Run(task=0, inputs=(), outputs=(), microbatch=m) for m in counted]
    forward = [
        i
        for m in counted
        for i in (
            *([Recv(first - 2, (), m)] if stage else []),
            run[m],
            *([Send(first, (), m)] if stage < last else []),
        )
    ]
    backward = [
        i
        for m in counted
        for i in (*([Recv(down, (), m)] if stage < last else []), run[m], *([Send(up, (), m)] if stage else []))
    ]
    instructions: list[Instruction] = [
        Feed(slots=(), buffers=()),
        *[Read(store=i, leaves=(), buffers=()) for i in dict.fromkeys(i for i, _ in mine)],
        *forward,
        *backward,
        Run(task=0, inputs=(), outputs=(), role="finish"),
        *[Push(store=i, part=p, buffers=()) for i, p in mine],
    ]
    edges = {first: Edge((who, stage + 1), 0), up: Edge((who, stage - 1), 0)}
    each = 1 / sum(isinstance(i, Run) for i in instructions)
    return StageProgram(name, tuple(instructions), tuple(isinstance(i, Run) * each for i in instructions), edges)


def _store(
    number: int, rule: Policy, devices: Sequence[Sequence[str]], home: int | None, spec: ArraySpec, links: Links
) -> StoreSpec:
    """The store of a policy. Every third one is shared by the first and last stage, as tied weights are."""
    stages, replicas = len(devices[0]), len(devices)
    alone = rule.local or rule.shared or stages == 1
    used = (0, stages - 1) if number % 3 == 2 and not alone else (number % stages,)
    first = number * len(TASKS)
    sums = rule.collective and not rule.sited
    parts = tuple(
        Part(
            stage,
            (0,),
            (spec,),
            accumulate=first + ACCUMULATE,
            reduction=reduction_of(rule.topology, spec.nbytes, [d[stage] for d in devices], links) if sums else None,
        )
        for stage in used
    )
    sites = sites_of(str(number), rule, parts, devices, links)
    leaders = {r: site.replicas[0] for site in sites for r in site.replicas}
    candidates = [devices[leaders.get(r, r)][used[0]] for r in range(replicas)]
    if rule.collective and sites:
        between = list(dict.fromkeys(candidates))
        parts = (replace(parts[0], reduction=reduction_of(rule.remote, spec.nbytes, between, links)),)
    one = {worker_of(d): d for d in reversed(candidates)}
    homes = tuple(one[worker_of(d)] for d in candidates) if rule.collective else ()
    return StoreSpec(
        name=str(number),
        buffers=(Buffer(str(number), spec, "parameter", number),),
        home=homes[0] if homes else candidates[(number % replicas) if home is None else home],
        readers=tuple(d[s] for d in devices for s in used),
        parts=parts,
        policy=rule.travelling,
        applies=Applies(1, 0),
        homes=homes,
        local=_local(rule, first, spec) if rule.local else None,
        sites=sites,
    )


def _local(rule: Policy, first: int, spec: ArraySpec) -> Local:
    gossips, dual = isinstance(rule.remote, Gossip), isinstance(base_of(rule.apply), Consensus)
    return Local(
        update=first + UPDATE,
        send=first + SEND if dual or sending(rule) else None,
        take=first + TAKE if dual or taking(rule) else None,
        state=(),
        state_specs=(),
        fold=first + FOLD if gossips else None,
        mix=first + MIX if gossips else None,
        accumulator=(spec,) * (2 if isinstance(rule.apply, Outer) else 1) if gossips else (),
        dual=dual,
    )


def _training(rules: Sequence[Policy], devices: Sequence[Sequence[str]], home: int | None, spec: ArraySpec) -> Training:
    """The part of a plan about training."""
    code = coded_by(rules, len(devices))
    links = Links(apart=True)
    return Training(
        replicas=tuple(map(tuple, devices)),
        stores=tuple(_store(i, rule, devices, home, spec, links) for i, rule in enumerate(rules)),
        microbatches=MICROBATCHES if code is None else len(code.row(0)),
        item_size=ITEM_SIZE,
        batch_leaves=0,
        batch_specs=(),
        batch_paths=(),
        takes_rng=False,
        schedule="",
        code=code,
    )


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
    sharded: bool = False,
    **options: Any,
) -> World:
    """A run with one store a policy; every third store is shared by the first and last stage, as tied weights are.

    Each stage of each replica has a worker of its own, unless `workers` says how many there are to share. With
    `sharded` each replica has items of its own. `options` are further fields of the World.
    """
    check_composition({str(i): p for i, p in enumerate(rules)}, replicas)
    cut_by(rules, replicas, MICROBATCHES)
    grid = [(r, s) for r in range(replicas) for s in range(stages)]
    names = {at: f"worker:{n if workers is None else n % workers}" for n, at in enumerate(grid)}
    devices = [[f"{names[r, s]}/cpu:{r * stages + s}" for s in range(stages)] for r in range(replicas)]
    members = rules[0].members(replicas)
    items = (items or replicas * 4) // replicas * members if members > replicas else items or replicas * 4
    if sharded or coded_by(rules, replicas):  # shares of a whole batch
        items -= items % replicas
    exact = not any(map(_computes, rules))
    code = coded_by(rules, replicas)
    size = code.partitions * clocks if code else -(-clocks // (items // members)) * items
    spec = ArraySpec((8,), "float32") if exact else ArraySpec((-(-size // COLUMNS), COLUMNS), "float64")
    training = _training(rules, devices, homes_on, spec)
    terms = Terms.of(training, clocks)
    programs = {(r, s): _program(devices[r][s], (r, s), terms) for r, s in grid}
    local = frozenset(i for i, s in enumerate(training.stores) if s.local is not None)
    sites = [s.sites for s in training.stores] if any(s.sites for s in training.stores) else ()
    layout = Layout(
        terms,
        Places.of(training),
        programs,
        [s.parts for s in training.stores],
        Sizes.of(training),
        [s.name for s in training.stores],
        ITEM_SIZE,
        local,
        sites,
        list(map(which, training.stores)),
    )
    speculation = terms.speculation
    work = ledger.Work(
        replicas,
        items,
        item_size=ITEM_SIZE,
        total_clocks=clocks,
        aligned=terms.aligned,
        coded=code is not None,
        microbatches=training.microbatches,
        groups=tuple(str(g.number) for g in terms.groups),
        portions=members // replicas,
        epoch_share=rules[0].epoch_share or 1.0,
        requeues=isinstance(rules[0].quorum.late, Requeue),
        copies=speculation.copies if speculation else None,
        sharded=sharded and not terms.aligned,
    )
    return World(layout, work, speeds, seed, twice, training=None if exact else training, **options)


def _computes(rule: Policy) -> bool:
    """Whether what a run adds up says too little about this policy, so that it computes with matrices."""
    return (
        rule.local
        or rule.sited
        or rule.shared
        or bool(rule.filters or rule.pull_filters)
        or isinstance(rule.quorum, Coded)
        or cutting(rule.quorum) is not None
    )
