"""Gaia: sites send each other only changes that are significant, so that slow links between them do not decide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowml_tools.plots import Line, Plot
from flowml_tools.reproduce.claims import Claim, Outcome, at_least, at_most
from flowml_tools.reproduce.clocks import step_s
from flowml_tools.reproduce.learning import final_loss, loss, problem, train

if TYPE_CHECKING:
    import flowml as fm

LAN = 2e6
"""Bytes a second inside a site: the parameters take 5 ms, and a step computes 100 ms."""


def run(full: bool, seed: int) -> Outcome:
    import optax

    import flowml as fm

    sites, each, steps = (11, 2, 400) if full else (2, 2, 50)
    replicas = sites * each
    params, examples, _ = problem(seed)
    task: tuple[Any, Any, Any] = loss, params, examples

    def fitted(policy: fm.Policy, slower: float) -> tuple[float, float]:
        names = [f"site {i}" for i in range(sites)]
        table = {(a, b): (1e-3 * slower, LAN / slower) for a in names for b in names if a < b}
        local = fm.sim.Network(1e-4, LAN)
        network = fm.sim.Sites(table, dict.fromkeys(names, each), local=local, shared_lines=slower > 1)
        result = train(
            policy,
            replicas,
            steps=steps,
            seed=seed,
            problem=task,
            optimizer=optax.sgd(0.3),
            batch=16 * replicas,
            compute=fm.sim.Constant(0.1),
            network=network,
        )
        return step_s(result), final_loss(task, result)

    factors = (1, 15, 60)
    gaia = fm.policies.gaia(0.1, sites=sites, staleness=2)
    ours = {slower: fitted(gaia, slower) for slower in factors[1:]}
    plain = {slower: fitted(fm.Policy(), slower) for slower in factors}
    lan = plain[1][0]
    return Outcome(
        f"{sites} sites of {each} simulated replicas, {steps} steps of 0.1 s, a network of 32 x 64 x 8 with real "
        "arithmetic, 2 MB/s inside a site and 1, 15 or 60 times less between sites; threshold 10 %, two clocks of "
        "skew. Against a parameter server that all sites use.",
        (
            at_least("speed against the server, links 15 times slower", 1.8, plain[15][0] / ours[15][0]),
            at_least("speed against the server, links 60 times slower", 1.8, plain[60][0] / ours[60][0]),
            at_most("time of a step, links 15 times slower, against a LAN", 1.4, ours[15][0] / lan),
            at_most("time of a step, links 60 times slower, against a LAN", 1.4, ours[60][0] / lan),
            at_most("loss against the server after as many steps", 1.1, max(o[1] for o in ours.values()) / plain[1][1]),
        ),
        Plot(
            "A step of sites behind slow links",
            "times that links between sites are slower",
            "seconds a step",
            (
                Line("Gaia", [(slower, found[0]) for slower, found in ours.items()]),
                Line("parameter server", [(slower, found[0]) for slower, found in plain.items()]),
                Line("server in one LAN", [(1, lan), (60, lan)], dashed=True),
            ),
        ),
    )


CLAIM = Claim(
    "Hsieh et al., Gaia, NSDI 2017",
    "abstract, figures 8 to 10",
    "Gaia is 1.8 to 53.5 times as fast as training that waits for slow links, and takes 0.94 to 1.4 times as long as "
    "training in a LAN, at the same accuracy.",
    run,
)
