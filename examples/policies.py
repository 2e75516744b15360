"""Trains a small net on scikit-learn's digits with three mixes of per-layer update policies, in virtual time.

Four workers hold a replica each. One of them is three times as slow as the others. Each mix says for each layer how its
replicas are kept in step. The table shows what a mix costs and brings: virtual seconds, bytes that replicas push,
work items that were dropped, and accuracy. Below it stands who was late.

    python examples/policies.py [--steps 150]
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _arguments import positive
from sklearn.datasets import load_digits

import flowml as fm

MIXES = {
    "every layer synchronous": {"*": fm.Policy()},
    "quorum, and factors for the large layer": {
        "hidden/*": fm.Policy(quorum=fm.Quorum(0.75), payload=fm.Factors()),
        "*": fm.policies.quorum(0.75),
    },
    "local steps, and 8 bits without waiting": {
        "hidden/*": fm.policies.local_sgd(8),
        "*": fm.policies.asynchronous(filters=(fm.filters.quantise(8),)),
    },
}


def net(params: Any, image: jax.Array) -> jax.Array:
    hidden = jnp.tanh(image @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["output"]["kernel"] + params["output"]["bias"]


def loss(params: Any, batch: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(net(params, batch["image"]), batch["label"]).mean()


def init(size: int = 64) -> Any:
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (64, size)) / 8, "bias": jnp.zeros(size)},
        "output": {"kernel": jax.random.normal(keys[1], (size, 10)) / size**0.5, "bias": jnp.zeros(10)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=150, help="steps of each fit (default: 150)")
    arguments = parser.parse_args()
    pixels, label = load_digits(return_X_y=True)
    image, label = (pixels / 16).astype(np.float32), label.astype(np.int32)
    train, test = slice(0, 1500), slice(1500, None)
    machines = fm.sim.Straggler(fm.sim.LogNormal(mean_s=0.1, sigma=0.1), factor=3, workers=(3,))
    network = fm.sim.Network(latency_s=1e-3, bytes_per_s=1e6)
    for name, policies in MIXES.items():
        cluster = fm.SimulatedCluster(workers=4, compute=machines, network=network, seed=1)
        trainer = fm.Trainer(loss, optax.sgd(0.3), cluster=cluster, replicas=4, policies=policies)
        source = {"image": image[train], "label": label[train]}
        result = trainer.fit(init(), source, batch_size=60, steps=arguments.steps, progress=False)
        accuracy = float((net(result.params, image[test]).argmax(1) == label[test]).mean())
        pushed = sum(counts["pushed_bytes"] for counts in result.traffic.values())
        print(f"{name}: {result.seconds:.1f} s, {pushed / 1e6:.1f} MB pushed, accuracy {accuracy:.0%}")
        for pattern, policy in policies.items():
            print(f"    {pattern:<9}{policy.describe()}")
        print("    " + str(result.stragglers()).replace("\n", "\n    "))


if __name__ == "__main__":
    main()
