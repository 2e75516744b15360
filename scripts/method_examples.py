"""The runnable example of each page of docs/methods: the names that a user calls, and what they print.

Most methods are a policy, and their example trains one small model beside synchronous training, on simulated replicas
that differ from step to step. `method_pages` prints each on its page, with what it has printed.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass

from flowml.errors import FlowmlWarning

PROBLEM = """\
import jax.numpy as jnp
import numpy as np
import optax

import flowml as fm

rng = np.random.default_rng(0)
x = rng.normal(size=(256, 64)).astype(np.float32)
source = {"x": x, "y": np.tanh(x @ rng.normal(size=(64, 16)) / 8).astype(np.float32)}
params = {"w": jnp.zeros((64, 16))}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) - batch["y"]) ** 2)

"""

FITS = """\

def trained(name, policies, rate):
    machines = fm.sim.LogNormal(mean_s=1.0, sigma=0.3), fm.sim.Network(latency_s=1e-3, bytes_per_s=1e5){slow}
    cluster = fm.SimulatedCluster({workers}, *machines{devices})
    trainer = fm.Trainer(loss, optax.sgd(rate), cluster=cluster, replicas={replicas}, policies=policies{trainer})
    result = trainer.fit(params, source, batch_size={batch}, steps={steps}{fit})
    kilobytes = sum(layer["pushed_bytes"] for layer in result.traffic.values()) / 1e3
    better = loss(params, source) / loss(result.params, source)
    took = f"{{result.virtual_seconds:5.1f}} s, {{kilobytes:5.0f}} kB"
    print(f"{{name:<12}} {{took}}, a tenth of the loss: {{better > 10}}")


trained("synchronous", fm.policies.synchronous(), {plain})
trained("{name}", {call}, {rate})
"""


@dataclass(frozen=True)
class Fit:
    """An example that trains with a policy. `name` has at most 12 letters; `rate` is of SGD."""

    name: str
    call: str
    rate: str = "4.0"
    plain: str = "4.0"
    workers: int = 4
    replicas: int = 4
    devices: str = ""
    trainer: str = ""
    batch: int = 64
    steps: int = 80
    fit: str = ""
    slow: str = ""

    @property
    def code(self) -> str:
        return PROBLEM + FITS.format(**vars(self))


SLOW = """
    machines = fm.sim.Straggler(machines[0], factor=8, workers=[1]), machines[1]  # one of them is slow"""
ADAM = """
policies = {
    "conv*": fm.policies.adam_convolution(10),  # each replica sends the sum of 10 of its updates, and waits for none
    "dense*": fm.policies.factors(),  # a large matrix: the home multiplies what replicas send
    "*": fm.policies.every(4),
}
for pattern, policy in policies.items():
    print(f"{pattern:<7}{policy.describe()}")

rule = fm.policies.adam_auto(batch=16, k=10)  # the same by the shape of each parameter, for Trainer(policies=rule)
for shape in ((3, 3, 16, 32), (256, 128), (32, 8)):
    print(f"{shape!s:<16}{rule('layer', shape).describe()}")

cluster = fm.SimulatedCluster(4, fm.sim.ShiftedExponential(1.0, 0.1), fm.sim.Network(1e-3, 1e6))
for name, policy in {"all work": fm.policies.asynchronous(), "75 %": fm.policies.adam_epoch(0.75)}.items():
    trainer = fm.Trainer(loss, optax.sgd(0.5), cluster=cluster, replicas=4, policies=policy)
    result = trainer.fit(params, source, batch_size=16, epochs=4)
    halved = loss(result.params, source) < loss(params, source) / 2
    print(f"{name}: {result.virtual_seconds:.1f} s, the loss fell by half: {halved}")
"""

SANDBLASTER = """
with fm.Cluster.threads(workers=2) as cluster:
    found = fm.methods.lbfgs(loss, params, source, cluster, steps=12, portions=2)  # a Minimum
    print("a hundredth of the loss:", found.losses[-1] < found.losses[0] / 100)

    # What it is written with: vectors that stay on the homes, and the loss and gradient of all examples in portions.
    vectors = fm.methods.Vectors(params, cluster)
    start = vectors.put(params)
    portions = fm.methods.Portions(loss, source, vectors, cluster, portions=2, copies=True)
    value, gradient = portions(start)
    downhill = vectors.combine(1.0, start, -1.0, gradient)
    print("a step down:", portions(downhill)[0] < value, vectors.dot(gradient, gradient) > 0)

# As a rule of a fit, for any optimizer: portions of each batch, and copies of late ones.
slow = fm.sim.Straggler(fm.sim.Constant(1.0), factor=5, workers=[0])
for name, policy in {"waiting": fm.policies.synchronous(), "portions": fm.policies.speculate(4)}.items():
    cluster = fm.SimulatedCluster(4, slow, fm.sim.Network(1e-3, 1e8))
    trainer = fm.Trainer(loss, optax.sgd(4.0), cluster=cluster, replicas=4, policies=policy)
    print(f"{name}: {trainer.fit(params, source, batch_size=64, steps=20).virtual_seconds:.1f} s")
"""

CHAOS = """

def fit(replicas, steps):
    machines = fm.sim.LogNormal(mean_s=0.1, sigma=0.1), fm.sim.Network(1e-4, 1e9)
    lock = fm.sim.Homes(apply_s=1e-3)  # an update holds the lock of its layer for 1 ms
    cluster = fm.SimulatedCluster(1, *machines, homes=lock, devices_per_worker=replicas)
    trainer = fm.Trainer(loss, optax.sgd(1.0), cluster=cluster, replicas=replicas, policies=fm.policies.hogwild())
    return trainer.fit(params, source, batch_size=16 * replicas, steps=steps)


model = fm.methods.TimeModel.of({1: fit(1, 10), 2: fit(2, 10)})  # two probes of ten steps
eight = fit(8, 60)
print(f"60 steps of 8: {eight.seconds:.1f} s, predicted {model.seconds(items=480, replicas=8):.1f} s")
print("within 15 %:", abs(model.error(eight, replicas=8)) < 0.15)
print("a tenth of the loss:", loss(eight.params, source) < loss(params, source) / 10)
"""

ENSEMBLE = """

def predict(params, inputs):
    return jnp.tanh(inputs @ params["w"])


inputs, optimizer = x[:128], optax.sgd(2.0)  # labels are not needed
policy = fm.policies.ensemble_compression(predict, inputs, every=20, steps=50, optimizer=optimizer)
print(policy)
cluster = fm.SimulatedCluster(4, fm.sim.Constant(1.0), fm.sim.Network(1e-3, 1e6))
trainer = fm.Trainer(loss, optax.sgd(4.0), cluster=cluster, replicas=4, policies=policy)
result = trainer.fit(params, source, batch_size=64, steps=40)
print("a tenth of the loss:", loss(result.params, source) < loss(params, source) / 10)
"""

VOTING = """
labels = (x[:, 4] + 0.5 * x[:, 9] > 0).astype(float)
with fm.Cluster.threads(workers=2) as cluster:
    whole = fm.methods.boost(x, labels, cluster, trees=4, depth=2)  # a Boosted, whose trees are each a Tree
    voted = fm.methods.boost(x, labels, cluster, trees=4, depth=2, vote=2)
print(f"{len(voted.trees)} trees, {voted.tree_bytes / whole.tree_bytes:.0%} of the bytes")
print("more than 85 % right:", np.mean((voted.margin(x) > 0) == labels) > 0.85)

# As a rule of a fit: each replica votes for 8 of the 64 rows, and the 16 winners are applied.
cluster = fm.SimulatedCluster(4, fm.sim.Constant(1.0), fm.sim.Network(1e-3, 1e6))
trainer = fm.Trainer(loss, optax.sgd(4.0), cluster=cluster, replicas=4, policies=fm.policies.vote(8))
result = trainer.fit(params, source, batch_size=64, steps=160)
print("a tenth of the loss:", loss(result.params, source) < loss(params, source) / 10)
"""

EXAMPLES: dict[str, Fit | str] = {
    "adam": ADAM,
    "downpour": Fit("downpour", "fm.policies.downpour(4, 2)", rate="1.0"),
    "sandblaster": SANDBLASTER,
    "parameter_server": Fit("filters", "fm.policies.parameter_server(1e-5, staleness=4)", rate="1.0"),
    "ssp": Fit("ssp", "fm.policies.ssp(8)", rate="1.0"),
    "chaos": CHAOS,
    "zinkevich": Fit("average", "fm.policies.average_once()"),
    "double_buffering": Fit("two buffers", "fm.policies.double_buffer()"),
    "local_sgd": Fit("local sgd", "fm.policies.local_sgd(8)"),
    "elastic": Fit("elastic", "fm.policies.elastic_averaging(8, 0.2)"),
    "backup": Fit("3 of 4", "fm.policies.backup_workers(3)"),
    "compensation": Fit("compensate", "fm.policies.compensate(0.75)"),
    "coding": Fit("coded", "fm.policies.coded(1)", slow=SLOW),
    "coded_reduce": Fit("tree", "fm.policies.coded_reduce(2, 2, 1)", workers=6, replicas=6, batch=48, slow=SLOW),
    "drop_compute": Fit("threshold", "fm.policies.drop_compute(1.2)", trainer=", microbatches=4"),
    "rudra": Fit("softsync", "fm.policies.softsync(4)"),
    "ring": Fit("ring", "fm.policies.ring()"),
    "d_psgd": Fit("gossip", 'fm.policies.gossip("ring")'),
    "no_loco": Fit("pairs", "fm.policies.no_loco(8)", steps=200),
    "diloco": Fit("diloco", "fm.policies.diloco(20)"),
    "streaming_diloco": Fit("streaming", "fm.policies.diloco(20, fragments=1, delay=4, alpha=0.5)"),
    "decoupled": Fit("decoupled", "fm.policies.decoupled_diloco(20, quorum=2)"),
    "sparse_loco": Fit("sparse", "fm.policies.sparse_loco(8, 1 / 16, 2)", steps=200),
    "gaia": Fit("gaia", "fm.policies.gaia(0.1, sites=2, staleness=2)"),
    "admm": Fit(
        "admm",
        "fm.policies.admm(0.1, share=2, staleness=4, every=4)",
        rate="1.0",
        batch=256,
        fit=", shuffle=False",
    ),
    "ensemble": ENSEMBLE,
    "voting": VOTING,
    "power_sgd": Fit("PowerSGD", "fm.policies.power_sgd(2)"),
    "one_bit": Fit("1 bit", "fm.policies.one_bit()"),
    "qsgd": Fit("QSGD", "fm.policies.qsgd(4)"),
    "top_k": Fit("top 5 %", "fm.policies.deep_compression(0.05)"),
    "skeleton": Fit("random 10 %", "fm.policies.skeleton(0.1)"),
}
"""Page -> the example, or what follows the problem in it."""


def example(name: str) -> str:
    """The Python of a page's example."""
    found = EXAMPLES[name]
    return (found.code if isinstance(found, Fit) else PROBLEM + found).rstrip() + "\n"


def printed(code: str) -> str:
    """What an example prints. Some losses are not convex, of which some methods warn."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore", FlowmlWarning)
        exec(code, {"__name__": "example"})
    return output.getvalue()
