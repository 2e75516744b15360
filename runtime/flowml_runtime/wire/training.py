"""Defines the messages of training."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from flowml.numbers import MOST
from flowml.policy.waits import Waits
from flowml.splits import Shuffle
from flowml_runtime.wire.base import MAX_ARRAYS, Count, Name, PlanMessage

# Training. A clock is a step of one replica; a store homes the parameters of one layer group.


class Item(msgspec.Struct, frozen=True, gc=False):
    """A work item: `size` examples from `start` in the order of epoch `epoch`. `sequence` is never reused.

    Several replicas may compute an item. `copy` is 0 for the first, and counts the others.
    """

    sequence: Count
    epoch: Count
    start: Count
    size: Count
    copy: Count = 0


Before = Annotated[int, msgspec.Meta(ge=-1, le=MOST)]
"""A clock that is over, or -1 before the first."""


class Unsettled(msgspec.Struct, frozen=True):
    """A work item that a replica has begun, and whose fate is unknown in the groups `open`: see `protocol.accounts`."""

    clock: Count
    item: Item
    open: tuple[Count, ...]
    lost: tuple[Count, ...] = ()
    counted: tuple[Before, ...] = ()
    folded: tuple[Count, ...] = ()
    left_out: Count | None = None
    joined: tuple[tuple[Count, Count], ...] = ()


class StageState(msgspec.Struct, frozen=True):
    """Where the machine of a stage stood at a snapshot. `begun` is its newest clock, `committed` that of each group.

    `pushed` are pairs (store, clock) of the newest pushes that may wait at a home, `applied` say which version
    holds one to a store that applies on arrival as (store, clock, version), and `taken` are pairs (store, clock) of the
    newest takes.
    """

    replica: Count
    stage: Count
    begun: Before
    committed: tuple[Before, ...]
    pushed: tuple[tuple[Count, Count], ...] = ()
    applied: tuple[tuple[Count, Count, Count], ...] = ()
    taken: tuple[tuple[Count, Count], ...] = ()
    unsettled: tuple[Unsettled, ...] = ()


class StoreState(msgspec.Struct, frozen=True):
    """Where the machine of a store stood at a snapshot. `clocks` are those of replicas, if it applies on arrival."""

    store: Count
    version: Count
    floor: Count
    committed: Before = -1
    clocks: tuple[Count, ...] = ()


class Waiting(msgspec.Struct, frozen=True):
    """A part of a contribution that waits at a snapshot: for a later clock, or for others. The fields are those of
    `Contribution`. It waits at the home, or at the leader of a site if the store has such, and it is not `of_site`."""

    store: Count
    part: Count
    replica: Count
    clock: Count
    base_version: Count
    weight: Count
    empty: bool = False
    of_site: bool = False


class SiteState(msgspec.Struct, frozen=True):
    """Where the machine of a site stood at a snapshot. `committed` is the newest clock that is decided about the sites.
    `sums` are those that wait for a later clock: (clock, the replicas in it, (replica, clock) of those folded in)."""

    group: Count
    site: Count
    committed: Before
    sums: tuple[tuple[Count, tuple[Count, ...], tuple[tuple[Count, Count], ...]], ...] = ()


class Stopped(msgspec.Struct, frozen=True):
    """Where all machines of a run stood at a snapshot. `clocks` are the next clocks of the replicas."""

    clocks: tuple[Count, ...]
    stages: tuple[StageState, ...]
    stores: tuple[StoreState, ...]
    sites: tuple[SiteState, ...] = ()
    waiting: tuple[Waiting, ...] = ()


class TrainingMessage(PlanMessage, frozen=True, kw_only=True):
    """Base of the messages of a run. `cause` is the sender's number of the event that caused this message.

    With the sender's name it identifies the event that a trace links to this one (`protocol.training.story`).
    """

    run: Count
    cause: Count = 0


class Copies(msgspec.Struct, frozen=True):
    """Each worker has so many copies of what it keeps on others, which keep them under the name of a `fit`. `memory` is
    that of each worker, in bytes; 1 if it is unknown."""

    count: Count
    fit: Annotated[str, msgspec.Meta(max_length=256)]
    memory: Annotated[tuple[tuple[Name, Count], ...], msgspec.Meta(max_length=MAX_ARRAYS)]


class StartTraining(TrainingMessage, frozen=True):
    """Begin a fit with a loaded training plan. Store values and the source follow in separate messages.

    `run` is the number of the fit's first step among all steps of the plan, so it is unique for each fit.
    `source` is "shipped" (arrays follow in `Source`) or "fed" (the driver sends each Batch). `delays` are artificial:
    (worker, seconds added to its steps: to that of clock n element n, modulo their number). Replicas compare their
    copies every `check_replicas` steps and at the end; 0: never. `on_nonfinite` says how
    gradients with NaN or infinity are treated. Replicas stop before the clock `hold`, as with `Hold`. `stopped`: the
    run goes on where a snapshot was taken, whose buffers follow. `fit`: workers keep what they tell of snapshots, for
    a driver that goes on with the fit of this name; "": they do not. `copies`: how they copy it to each other.
    """

    total_clocks: Count
    seed: Count
    shuffle: Shuffle
    examples: Count
    source: Literal["shipped", "fed"]
    delays: tuple[tuple[Name, tuple[float, ...]], ...] = ()
    check_replicas: Count = 0
    on_nonfinite: Literal["refuse", "raise", "apply"] = "refuse"
    hold: Count = MOST
    stopped: Stopped | None = None
    fit: Annotated[str, msgspec.Meta(max_length=256)] = ""
    copies: Copies | None = None


class Source(TrainingMessage, frozen=True):
    """Whole leaves of an array source for the stages on this worker; `slots` are the batch leaves."""

    slots: tuple[Count, ...]


class Batch(TrainingMessage, frozen=True):
    """The leaves of one fed work item for one device, which may read none of them.

    `variant` is the loaded plan whose programs run on a batch of this shape; "" is the plan of the fit.
    """

    device: Name
    sequence: Count
    slots: tuple[Count, ...]
    variant: Annotated[str, msgspec.Meta(max_length=256)] = ""


class StoreValue(TrainingMessage, frozen=True):
    """A store's parameters and optimizer state. The driver sends it to the homes. At the end every home sends one back,
    and that of the first home holds the values."""

    store: Count
    version: Count


class OwnState(TrainingMessage, frozen=True):
    """The optimizer state for a store whose parameters replicas update themselves: the first one of all replicas here,
    or, to the driver, the last one of `replica`."""

    store: Count
    replica: Count = 0


class ModelState(TrainingMessage, frozen=True):
    """The leaves of the model's state that stay on a stage of a replica: the first ones, or, to the driver, the last
    ones."""

    replica: Count
    stage: Count


class Gossip(TrainingMessage, frozen=True):
    """The parameters of a store that replica `source` had before the step of `clock`, for its neighbour `replica`.

    With a `part` it is the sum of the gradients of a site for its leader, which both are: of `weight` microbatches.
    Between mirrors it has the changes of that step, or `ahead` of them only the positions of the changed elements.
    """

    store: Count
    replica: Count
    source: Count
    clock: Count
    part: Count | None = None
    weight: Count = 0
    ahead: bool = False


class Ask(TrainingMessage, frozen=True):
    """A replica asks for work ahead of time: an item for each of `clocks`. It did not begin the `returned` items.

    `copy`: it asks for an item of this clock that another replica computes already.
    """

    replica: Count
    clocks: tuple[Count, ...]
    returned: tuple[Item, ...] = ()
    copy: Count | None = None


class Grant(TrainingMessage, frozen=True):
    """The answer to Ask: (clock, item). A clock without an item gets no work."""

    replica: Count
    items: tuple[tuple[Count, Item], ...]
    exhausted: bool = False


class Begin(TrainingMessage, frozen=True):
    """The replica's first stage tells the others to begin `clock` with `item` and to abandon any earlier clock."""

    replica: Count
    clock: Count
    item: Item
    last: bool = False


class Contribution(TrainingMessage, frozen=True):
    """Part of what one replica sends for one store at one clock. `weight` is the number of summed microbatch gradients;
    in a sum of several replicas, it is that of whole steps.

    `empty` says that the replica contributes nothing at this clock, so that the home does not wait for it. If batches
    are cut into portions, `replica` is the number of the portion, and `copy` that of its work item. `of_site`: it is
    the sum of the site that `replica` leads, or in a tree that of `replica` and its children. Then `terms` are the
    replicas below that were in time, with their coefficients in the sum.
    """

    store: Count
    part: Count
    replica: Count
    incarnation: Count
    clock: Count
    base_version: Count
    weight: Count
    empty: bool = False
    copy: Count = 0
    of_site: bool = False
    terms: tuple[tuple[Count, float], ...] = ()


class Arrived(TrainingMessage, frozen=True):
    """Home to the leader of the store's group: `replica`'s contribution to `store` at `clock` is complete.

    `weight` is the number of microbatch gradients in it, and `copy` is that of the part that came last. `terms` are as
    in `Contribution`.
    """

    store: Count
    replica: Count
    clock: Count
    weight: Count = 1
    copy: Count = 0
    terms: tuple[tuple[Count, float], ...] = ()


class Commit(TrainingMessage, frozen=True):
    """The decision of a group for `clock`: it is complete with the work of all replicas except `excluded`.

    `coefficients` maps replicas to the coefficients of their contributions, if weights do not determine them. `folded`
    are late contributions to earlier clocks that are included now, as (replica, clock). `copies` maps portions to the
    copies of them that came first; the others came first as they were granted first. `waits` is for the history.
    `site`: it is what the decision means for the replicas of this site.
    """

    clock: Count
    excluded: tuple[Count, ...] = ()
    group: Count = 0
    coefficients: tuple[tuple[Count, float], ...] = ()
    folded: tuple[tuple[Count, Count], ...] = ()
    copies: tuple[tuple[Count, Count], ...] = ()
    waits: Waits = Waits()
    site: Count | None = None


class Computed(TrainingMessage, frozen=True):
    """A replica has computed so many microbatches at `clock`: for the worker that counts those of all replicas."""

    replica: Count
    clock: Count
    microbatches: Count


class Halt(TrainingMessage, frozen=True):
    """The replicas have computed enough microbatches of `clock`: those on this worker begin no more of it."""

    clock: Count


class Published(TrainingMessage, frozen=True):
    """A store's new version, pushed to its readers. It includes what every active replica sent before `floor`.

    Without `specs` only the floor changed. With a `base` the arrays are encoded: as a difference to that earlier
    version, or by themselves if it is this version.
    """

    store: Count
    version: Count
    floor: Count
    base: Annotated[int, msgspec.Meta(ge=-1, lt=2**53)] = -1


class Applied(TrainingMessage, frozen=True):
    """Home to the stages of `replica`, which read their own writes: `version` includes its contribution of `clock`."""

    store: Count
    replica: Count
    clock: Count
    version: Count


class Collective(TrainingMessage, frozen=True):
    """A chunk of a bucket that the replicas of a group reduce together; `specs` describes one array.

    `clock` is the clock of the gradients, `piece` the part of the bucket, and `take` the step of the receiver's
    schedule that uses the chunk.
    """

    group: Count
    bucket: Count
    clock: Count
    piece: Count
    take: Count


class Shared(TrainingMessage, frozen=True):
    """From the homes of a coupling on one worker to those on another: what these `stores` share in a round at `clock`,
    in their order. `empty`: one of them has nothing to apply, so none of the coupling is updated at this clock."""

    coupling: Count
    round: Count
    clock: Count
    stores: tuple[Count, ...]
    empty: bool = False


class Settled(TrainingMessage, frozen=True):
    """The fate of work items, for the ledger: (item, fate). Each grant of an item is settled exactly once.

    `missing` are the groups of stores for which these items do not count, although they count for others, and `late`
    those that count them in a later clock, although others count them in time. `left_out` is the number of microbatches
    of each item that were not computed.
    """

    replica: Count
    fates: tuple[tuple[Item, Literal["used", "dropped", "folded", "requeued", "duplicate"]], ...]
    missing: tuple[Count, ...] = ()
    left_out: Count = 0
    late: tuple[Count, ...] = ()


class Report(TrainingMessage, frozen=True):
    """Loss (slot 0) and aux leaves of one replica's step, summed over its microbatches, sent by the stage that computes
    them. `seconds`: how long the step took, less the time that its stage waited for other replicas and for homes.
    `pushed`: (store, bytes of contributions) that this worker has sent since its last Report. `crossed`: (store, bytes
    of all kinds) that it has sent to other workers since then. A stage without such values reports only those."""

    replica: Count
    clock: Count
    item: Item
    slots: tuple[Count, ...]
    seconds: float
    pushed: tuple[tuple[Count, Count], ...] = ()
    crossed: tuple[tuple[Count, Count], ...] = ()


class NonFinite(TrainingMessage, frozen=True):
    """Contributions to `store` at `clock` held NaN or infinity and were left out: those of these replicas. Where the
    contributions of all replicas are summed, the sum was left out, and these of the sender's replicas caused it. With
    `weight` that of their batches is below 0 or not finite."""

    store: Count
    clock: Count
    replicas: tuple[Count, ...]
    weight: bool = False


class Staleness(TrainingMessage, frozen=True):
    """How stale the contributions were that a home has applied since its last such message: for each store the first
    step of which it may tell more, and rows of (step, number of versions since the one that the contribution is based
    on, number of such contributions).

    Only for stores whose policy allows more than 0.
    """

    stores: tuple[tuple[Count, Count, tuple[tuple[Count, Count, Count], ...]], ...]


class LeaveOut(TrainingMessage, frozen=True):
    """The worker of `replica` is lost, and the run goes on without it: homes take nothing more from it."""

    replica: Count


class LeftOut(TrainingMessage, frozen=True):
    """The answer of a worker with homes to LeaveOut, as pairs (store, clock): the store has, or will have, everything
    that `replica` did before that clock, and nothing of later clocks."""

    replica: Count
    stores: tuple[tuple[Count, Count], ...]


class Forwarded(TrainingMessage, frozen=True):
    """The leader of a site has sent the sum of its site to the homes of a store: the bytes of all its parts.

    It does so when the site has decided, which is after the leader's own step has ended unless that is the last one.
    """

    store: Count
    leader: Count
    clock: Count
    nbytes: Count

    @staticmethod
    def of(part: Contribution, nbytes: int) -> Forwarded:
        """About the sum of which this is a part."""
        ids: dict[str, Any] = {"plan_id": part.plan_id, "run": part.run, "cause": part.cause}
        return Forwarded(**ids, store=part.store, leader=part.replica, clock=part.clock, nbytes=nbytes)


class Traffic(TrainingMessage, frozen=True):
    """What this worker sent for each store in the run, counted when it is sent.

    `stores`: (store, contributions pushed, their bytes, bytes of those that crossed to another worker,
    bytes of published parameters that crossed, bytes that homes shared to couple layers, which crossed).
    `kept`: (store, the sum of squares of what error feedback here has not sent yet), where that is not 0.
    `homes`: (store with its home here, the applies and publications of it, how many seconds they took).
    """

    worker: Name
    stores: tuple[tuple[Count, Count, Count, Count, Count, Count], ...]
    kept: tuple[tuple[Count, float], ...] = ()
    homes: tuple[tuple[Count, Count, float], ...] = ()


class Retired(TrainingMessage, frozen=True):
    """This stage of a replica pushes nothing more. From stage 0 it means that the replica has no more work.

    Each stage sends it to the driver and to the homes that apply its contributions on arrival, on the link that carried
    the contributions. Stage 0 sends it to the other stages and to the leader of the decision too. `of_site`: it stands
    for all replicas of the site that `replica` leads, for the leader of the decision about sites.
    """

    replica: Count
    stage: Count = 0
    of_site: bool = False


class StopTraining(TrainingMessage, frozen=True):
    """End the run."""
