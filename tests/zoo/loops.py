"""The table of all loops of the zoo."""

from __future__ import annotations

from tests.zoo import agents, images, sequences, tricks
from tests.zoo.loop import Loop

_FULLY = ("fc0",), ("fc1", "fc2")

LOOPS: tuple[Loop, ...] = (
    Loop("MNIST, linen", images.mnist_linen, (("conv", "norm"), ("fc1", "fc2"))),
    Loop("MNIST, nnx", images.mnist_nnx, (("conv", "norm"), ("fc1", "fc2"))),
    Loop("vision transformer", images.vit, (("embed", "block0"), ("block1", "head"))),
    Loop("autoencoder", images.vae, (("encoder",), ("decoder", "divergence"))),
    Loop("GAN", images.gan, (("generator",), ("critic",))),
    Loop("WGAN-GP", images.wgan_gp, (("generator",), ("critic",))),
    Loop("diffusion", images.diffusion, (("noise", "time"), ("down", "up"))),
    Loop("GPT", sequences.gpt, (("embed", "block0"), ("block1", "head"))),
    Loop("seq2seq", sequences.seq2seq, (("encoder",), ("decoder",))),
    Loop("character RNN", sequences.char_rnn, (("embed",), ("unit", "out"))),
    Loop("RNN", sequences.rnn, (("unit",), ("head",))),
    Loop("neural ODE", sequences.neural_ode, (("encoder",), ("field", "decoder"))),
    Loop("graph convolutions", sequences.gnn, (("first",), ("second", "readout"))),
    Loop("scanned transformer", sequences.scanned_transformer, (("embed",), ("stack", "head"))),
    Loop("word vectors", sequences.word_vectors, (("inner",), ("outer",))),
    Loop("PPO", agents.ppo, (("actor",), ("critic",))),
    Loop("REINFORCE", agents.reinforce, (("trunk",), ("head",))),
    Loop("DQN", agents.dqn, (("online",), ("target",))),
    Loop("SAC", agents.sac, (("actor",), ("critic", "target"))),
    Loop("HMC", agents.hmc, (("first",), ("second",))),
    Loop("momentum", tricks.plain_sgd, _FULLY),
    Loop("lookahead", tricks.lookahead, _FULLY),
    Loop("MultiSteps", tricks.multi_steps, _FULLY),
    Loop("accumulation", tricks.accumulation, _FULLY),
    Loop("frozen layers", tricks.frozen, _FULLY),
    Loop("loss scaling", tricks.mixed_precision, _FULLY, tolerance=5e-2),
    Loop("private gradients", tricks.private, _FULLY),
    Loop("slow targets", tricks.ema_targets, (("fc0", "fc1"), ("fc2", "predictor")), tolerance=2e-4),
    Loop("MAML", tricks.maml, _FULLY),
    Loop("sharpness", tricks.sharpness_aware, _FULLY),
    Loop("distillation", tricks.distillation, (("teacher",), ("fc*",))),
    Loop("contrastive", tricks.contrastive, (("image",), ("text", "match"))),
    Loop("line search", tricks.line_search, _FULLY),
    Loop("linen TrainState", tricks.linen_train_state, (("fc0",), ("norm", "fc1"))),
    Loop("equinox MLP", tricks.equinox_mlp, (("layers/0",), ("layers/1", "layers/2"))),
    Loop("haiku", tricks.haiku_batch_norm, (("linear", "batch_norm"), ("head",))),
)
