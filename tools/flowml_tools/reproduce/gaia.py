"""Gaia: sites send each other only changes that are significant, so that slow links between them do not decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Finding, Outcome, at_least, at_most
from flowml_tools.reproduce.clocks import step_s
from flowml_tools.reproduce.learning import final_loss, loss, problem, train

if TYPE_CHECKING:
    import flowml as fm

LAN = 2e6
"""Bytes a second inside a site: the parameters take 5 ms, and a step computes 100 ms."""


SLOWER = (1, 15, 60)
"""Times that links between sites are slower than those inside."""
EACH = 2
"""Replicas of a site."""


class Ways(NamedTuple):
    """Seconds of a step and the final loss, by how much slower the links between sites are."""

    gaia: dict[int, tuple[float, float]]
    server: dict[int, tuple[float, float]]

    def findings(self, sites: int) -> tuple[Finding, ...]:
        lan, here = self.server[1], f"{sites} sites"
        found: list[Finding] = []
        for slower in SLOWER[1:]:
            seconds, server = self.gaia[slower][0], self.server[slower][0]
            found += [
                at_least(f"{here}: speed against the server, links {slower} times slower", 1.8, server / seconds),
                at_most(f"{here}: time of a step against a LAN, links {slower} times slower", 1.4, seconds / lan[0]),
            ]
        worst = max(loss for _, loss in self.gaia.values())
        return *found, at_most(f"{here}: loss against the server after as many steps", 1.05, worst / lan[1])


def run(full: bool, seed: int) -> Outcome:
    sizes = {2: 400, 11: 400} if full else {2: 50, 11: 30}
    found = {sites: _both(sites, steps, seed) for sites, steps in sizes.items()}
    lines = [
        Line(f"{name}, {sites} sites", [(slower, values[0]) for slower, values in results.items()])
        for sites, both in found.items()
        for name, results in (("Gaia", both.gaia), ("server", both.server))
    ]
    many = found[11]
    return Outcome(
        f"2 and 11 sites of {EACH} simulated replicas, {' and '.join(map(str, sizes.values()))} steps of 0.1 s, a "
        "network of 32 x 64 x 8 with real arithmetic, 2 MB/s inside a site and 1, 15 or 60 times less between sites, "
        "where all messages of two sites share a line; threshold 10 %, two clocks of skew. Against a parameter server "
        "that all sites use; a LAN has the rate of a site everywhere.",
        tuple(finding for sites, both in found.items() for finding in both.findings(sites)),
        Plot(
            "A step of sites behind slow links",
            "times that links between sites are slower",
            "seconds a step",
            (*lines, Line("server in one LAN, 11 sites", [(s, many.server[1][0]) for s in (1, 60)], dashed=True)),
            log_y=True,
        ),
    )


def _both(sites: int, steps: int, seed: int) -> Ways:
    import flowml as fm

    gaia = fm.policies.gaia(0.1, sites=sites, staleness=2)
    ours = {slower: fitted(gaia, sites, slower, steps, seed) for slower in SLOWER[1:]}
    return Ways(ours, {slower: fitted(fm.Policy(), sites, slower, steps, seed) for slower in SLOWER})


def fitted(policy: fm.Policy, sites: int, slower: float, steps: int, seed: int) -> tuple[float, float]:
    """Seconds of a step, and the final loss, of sites whose links are so much slower than those inside."""
    import optax

    import flowml as fm

    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples
    names = [f"site {i}" for i in range(sites)]
    table = {(a, b): (1e-3 * slower, LAN / slower) for a in names for b in names if a < b}
    local = fm.sim.Network(1e-4, LAN)
    result = train(
        policy,
        sites * EACH,
        steps=steps,
        seed=seed,
        problem=task,
        optimizer=optax.sgd(0.3),
        batch=16 * sites * EACH,
        compute=fm.sim.Constant(0.1),
        network=fm.sim.Sites(table, dict.fromkeys(names, EACH), local=local, shared_lines=slower > 1),
    )
    return step_s(result), final_loss(task, result)


CLAIM = Claim(
    "Hsieh et al., Gaia, NSDI 2017",
    "abstract, figures 8 to 10",
    "Gaia is 1.8 to 53.5 times as fast as training that waits for slow links, and takes 0.94 to 1.4 times as long as "
    "training in a LAN, at the same accuracy.",
    run,
)
