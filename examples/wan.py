"""Trains over four regions of the world in virtual time, and then with two replicas for real.

Replicas in Oregon, Virginia, Frankfurt and Tokyo (two in each) train one model. The simulation runs the real tasks and
says what a step costs and how many bytes the replicas push: with a synchronous rule, with gradients every 16 steps, and
with DiLoCo, which pushes the change of 16 local steps (Douillard et al., DiLoCo, 2023). Then two replicas train with
DiLoCo, simulated and as two processes of this machine: they push the same bytes and reach the same loss.

    python examples/wan.py [--steps 64]
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import positive

import flowml as fm

EVERY = 16
COMPUTE = fm.sim.LogNormal(mean_s=0.05, sigma=0.2)

REGIONS = fm.sim.Regions.parse("""\
a,b,round_trip_or_delay_ms,gbit_per_s
Oregon,Virginia,67,0.79
Oregon,Frankfurt,143,0.404
Oregon,Tokyo,96,0.523
Virginia,Frankfurt,90,1.02
Virginia,Tokyo,143,0.524
Tokyo,Frankfurt,223,0.36
""")
"""Measured by Yuan et al., Decentralized training of foundation models in heterogeneous environments, NeurIPS 2022."""

RULES = {
    "synchronous": fm.policies.synchronous(),
    f"every {EVERY} steps": fm.policies.every(EVERY),
    "DiLoCo": fm.policies.diloco(EVERY, outer=optax.sgd(0.7, momentum=0.5, nesterov=True)),
}


def loss(params: Any, batch: Any) -> jax.Array:
    with fm.layer("hidden"):
        x = jnp.tanh(batch["x"] @ params["hidden"])
    with fm.layer("output"):
        return jnp.mean((x @ params["output"] - batch["y"]) ** 2)


def problem() -> tuple[Any, Any]:
    """Parameters, and a source of 2,048 examples that a network of the same form has labelled."""
    keys = jax.random.split(jax.random.key(0), 5)

    def network(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
        return {"hidden": jax.random.normal(a, (64, 512)) / 8, "output": jax.random.normal(b, (512, 16)) / 22}

    x = jax.random.normal(keys[4], (2048, 64))
    teacher = network(keys[2], keys[3])
    y = jnp.tanh(x @ teacher["hidden"]) @ teacher["output"]
    return network(keys[0], keys[1]), {"x": np.asarray(x), "y": np.asarray(y)}


def fit(cluster: Any, policy: fm.Policy, replicas: int, steps: int) -> fm.TrainingResult:
    trainer = fm.Trainer(loss, optax.sgd(0.2), cluster=cluster, replicas=replicas, policies=policy)
    params, source = problem()
    return trainer.fit(params, source, batch_size=16 * replicas, steps=steps, progress=False)


def pushed(result: fm.TrainingResult) -> int:
    return sum(layer["pushed_bytes"] for layer in result.traffic.values())


def final_loss(result: fm.TrainingResult) -> float:
    return float(loss(result.params, problem()[1]))


def over_regions(steps: int) -> None:
    network = fm.sim.Sites(REGIONS, dict.fromkeys(REGIONS.names, 2), shared_lines=True)
    print(
        f"{len(network.sites)} replicas in {', '.join(REGIONS.names)}, simulated; a step computes {COMPUTE.mean_s:g} s"
    )
    for name, policy in RULES.items():
        result = fit(fm.SimulatedCluster(len(network.sites), COMPUTE, network), policy, len(network.sites), steps)
        print(
            f"  {name:<16}{result.seconds / steps:8.3f} s and {pushed(result) / steps / 1e3:8.1f} kB a step, "
            f"loss {final_loss(result):.4f}"
        )


def two_for_real(steps: int) -> None:
    network = fm.sim.Sites(REGIONS, ["Oregon", "Frankfurt"])
    simulated = fit(fm.SimulatedCluster(2, COMPUTE, network), RULES["DiLoCo"], 2, steps)
    with fm.Cluster.local(workers=2) as cluster:
        real = fit(cluster, RULES["DiLoCo"], 2, steps)
    print("two replicas with DiLoCo")
    for name, result in (("in Oregon and Frankfurt, simulated", simulated), ("as processes of this machine", real)):
        print(f"  {name:<36}{result.seconds:6.2f} s, {pushed(result) / 1e3:.1f} kB, loss {final_loss(result):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=64, help="training steps (default: %(default)s)")
    steps = parser.parse_args().steps
    over_regions(steps)
    two_for_real(steps)


if __name__ == "__main__":
    main()
