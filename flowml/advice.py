"""What `flowml.advise` returns: how policies did in a simulation, ranked, and in words why.

A trial is a simulated fit of one policy. Trials are compared by the time to as many examples as the synchronous fit has
used: a policy that drops a quarter of the work needs a third more steps. Times that differ by less than `TIE` are a
tie, and in a tie the policy that changes training less comes first. The words are made from what a trial has measured
and from the knobs of its policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowml.policy import UNBOUNDED, Coded, Gossip, Policy
from flowml.policy.filters import is_lossless
from flowml.policy.published import PolicyRule
from flowml.render.units import bytes_text, clip, plural, seconds_text

TIE = 0.05
"""Times that differ by less than this share are a tie: models of machines are not better than that."""
NOTICED = 0.005
"""A share of the work below this is not worth a word."""
STALE = 0.05
"""A mean staleness below this is shown as 0.0, and is not worth a word."""
SHOWN = 3
"""The best policies that the text explains."""

Policies = Policy | Mapping[str, Policy] | PolicyRule


@dataclass(frozen=True)
class Trial:
    """One policy in the simulation. Times and bytes are those to `Advice.examples` used examples.

    Attributes:
        name: the call of `fm.policies` that makes the policy, or "as given".
        policies: what to give to `fm.Trainer(policies=)`.
        seconds: virtual time.
        nbytes: what all replicas and homes have sent.
        staleness: by how many versions a contribution was behind the newest parameters: the mean.
        most_stale: the most.
        dropped: the share of the computed examples that no update has used.
        notes: the warnings that the fit gave.
    """

    name: str
    policies: Policies = field(repr=False)
    seconds: float
    nbytes: float
    staleness: float = 0.0
    most_stale: int = 0
    dropped: float = 0.0
    notes: tuple[str, ...] = ()
    speed: float = 1.0
    """The time of the synchronous fit divided by this one's."""
    why: str = ""


@dataclass(frozen=True)
class Advice:
    """Policies in the order of their time to `examples` used examples; see `flowml.advise`. `print` says it in words.

    Time says nothing about how much a model learns from an example: stale and local updates learn less from each. The
    texts say how a policy departs from synchronous training, and ties go to the one that departs less.

    Attributes:
        replicas, steps, batch_size: the setting.
        own_s: the mean seconds that one step of a replica computes.
        slowest_s: the mean seconds of the slowest replica of each step.
        trials: the policies, best first.
        refused: why other policies cannot train this model, by name.
    """

    replicas: int
    steps: int
    batch_size: int
    own_s: float
    slowest_s: float
    trials: tuple[Trial, ...]
    refused: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def examples(self) -> int:
        return self.steps * self.batch_size

    @property
    def best(self) -> Trial:
        return self.trials[0]

    def __getitem__(self, name: str) -> Trial:
        """The trial of this name. Raises KeyError, which lists the names."""
        for trial in self.trials:
            if trial.name == name:
                return trial
        raise KeyError(f"{name!r}; there are {', '.join(trial.name for trial in self.trials)}")

    def __str__(self) -> str:
        width = max(len("policy"), *(len(trial.name) for trial in self.trials))
        lines = [
            self.setting(),
            "",
            f"{'policy':<{width}}  {'time':>9}{'speed':>9}{'bytes':>11}{'stale':>8}{'lost':>7}",
        ]
        for t in sorted(self.trials, key=lambda trial: trial.seconds):
            speed = f"{t.speed:.2f} ×"
            lines.append(
                f"{t.name:<{width}}  {_time(t.seconds):>9}{speed:>9}{bytes_text(t.nbytes):>11}"
                f"{t.staleness:>8.1f}{t.dropped:>7.1%}"
            )
        if self.best.seconds > min(trial.seconds for trial in self.trials):
            lines += ["", f"{self.best.name} is within {TIE:.0%} of the fastest, and changes training least of those."]
        told = [*self.trials[:SHOWN], *(t for t in self.trials[SHOWN:] if t.name in PLAIN)]
        lines += ["", *(f"{t.name}: {t.why}" for t in told)]
        lines += [f"{t.name}: {clip(note, 200)}" for t in told for note in t.notes]
        if self.refused:
            lines += ["", "not possible here:", *(f"  {n}: {clip(why, 160)}" for n, why in self.refused.items())]
        return "\n".join(lines)

    def setting(self) -> str:
        """What a synchronous step consists of, in words."""
        step_s = next((t.seconds for t in self.trials if t.name == SYNCHRONOUS), 0.0) / self.steps
        parts = {
            "what a replica computes": self.own_s,
            "waiting for the slowest replica": self.slowest_s - self.own_s,
            "exchanging values": step_s - self.slowest_s,
        }
        most = max(parts, key=lambda name: parts[name])
        return (
            f"{plural(self.replicas, 'replica')}, the time to {self.examples:,} examples ({plural(self.steps, 'step')} "
            f"of {self.batch_size:,}). A step of a replica computes {seconds_text(self.own_s)}, that of the slowest "
            f"{seconds_text(self.slowest_s)}, and a synchronous step takes {seconds_text(step_s)}: most of it is "
            f"{most}."
        )


SYNCHRONOUS = "synchronous()"
GIVEN = "as given"
PLAIN = (SYNCHRONOUS, GIVEN)
"""The trials that the text always explains."""


def _time(seconds: float) -> str:
    """Seconds in one unit, so that a column of them can be compared."""
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.3g} s"


def ranked(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials by time, and those in a tie in the order given, which is that in which they change training."""
    left, found = list(trials), list[Trial]()
    while left:
        bound = min(trial.seconds for trial in left) * (1 + TIE)
        found += [trial for trial in left if trial.seconds <= bound]
        left = [trial for trial in left if trial.seconds > bound]
    return tuple(found)


def why(trial: Trial, plain: Trial, each: Sequence[Policy]) -> str:
    """Why a trial takes the time that it takes, and what that costs, beside `plain`, the synchronous fit. `each`: the
    policies of its layers."""
    if trial.name == SYNCHRONOUS:
        return "each step waits for all replicas, and equals one step on the whole batch"
    ratio = trial.nbytes / plain.nbytes if plain.nbytes else 1.0
    speed = plain.seconds / trial.seconds
    pace = "as fast as" if abs(speed - 1) < TIE else f"{speed:.2f} times as fast as"
    gains = [text for policy in each for text in _gains(policy)]
    if ratio < 0.8:
        gains.append(f"it moves {ratio:.2g} of the bytes")
    costs = [text for policy in each for text in _costs(policy)]
    if trial.dropped > NOTICED:
        costs.append(f"{trial.dropped:.0%} of the computed work is lost")
    if trial.staleness >= STALE:
        costs.append(f"contributions are {trial.staleness:.1f} versions old on average, {trial.most_stale} at most")
    if ratio > 1.25:
        costs.append(f"it moves {ratio:.2g} times the bytes")
    gained, paid = (", ".join(dict.fromkeys(texts)) for texts in (gains, costs))
    because = f": {gained}" if gained else ""
    return f"{pace} synchronous training{because}; {paid or 'its updates are those of synchronous training'}"


def _gains(policy: Policy) -> list[str]:
    """What a policy does not wait for."""
    found: list[str] = []
    if policy.local or isinstance(policy.remote, Gossip):
        found.append("slow steps of a replica even out between two exchanges")
    elif not policy.clocked:
        found.append("no replica waits for a slow one" + (" within its bound" if policy.staleness < UNBOUNDED else ""))
    elif policy.staleness:
        found.append("values are exchanged while the next step computes")
    if policy.clocked and not policy.quorum.waits_for_all:
        found.append("a step does not wait for the slowest replicas")
    return found


def _costs(policy: Policy) -> list[str]:
    """How a policy departs from synchronous training, as far as its knobs say it."""
    found: list[str] = []
    if isinstance(policy.quorum, Coded):
        found.append("each example is computed several times")
    if isinstance(policy.remote, Gossip):
        found.append(f"replicas average with neighbours only, every {plural(policy.remote.every, 'step')}")
    elif policy.local:
        found.append(f"replicas drift apart for {plural(policy.every.push, 'step')} between exchanges")
    elif policy.every.push > 1:
        found.append(f"one update has the gradients of {policy.every.push} steps")
    if not is_lossless(policy.filters):
        found.append("what is sent is compressed with a loss")
    return found
