"""A small training run on any layout, without files; every layout must give the same results."""

import torch

from megatron_tf.config import RunConfig, parse_config
from megatron_tf.data.batch import Batch, DocumentMasking, make_batch
from megatron_tf.model.parallelize import parameters_of
from megatron_tf.parallel.collectives import all_gather_copy
from megatron_tf.parallel.sharding import local_tensor
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import forward_backward, mean_over_replicas, train_step

VOCAB = 100
EOD = 48
PLAIN = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
STRONG = {**PLAIN, "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True}
"""Keys of the plain transformer, and of the one that is built as Qwen3 is."""


def small_run(**sections) -> RunConfig:
    """Configure a run of a tiny model; each keyword overrides keys of one section."""
    values = {
        "model": {
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "qkv_tokens": 32,
            "proj_tokens": 24,
            "ffn_tokens": 64,
            "vocab_size": VOCAB,
            "make_vocab_size_divisible_by": 8,
        },
        "training": {"seq_length": 16, "micro_batch_size": 1, "global_batch_size": 8, "train_iters": 20},
        "optimizer": {"lr": 1e-3, "clip_grad": 0.5},
        # lanes, the default order, would read the files of the data when a run is restored
        "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer", "order": "counter"},
        "parallel": {},
    }
    for section, keys in sections.items():
        values.setdefault(section, {}).update(keys)
    return parse_config(RunConfig, values, "test")


def random_batch(config: RunConfig, step: int, mesh, first: int = 0) -> Batch:
    """Make this data-parallel rank's part of the batch of `step`, numbered from `first`, with a learnable pattern."""
    training, data = config.training, config.data
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCAB, (training.global_batch_size, 1), generator=generator)
    stride = torch.randint(1, 4, (training.global_batch_size, 1), generator=generator)
    ids = (start + stride * torch.arange(training.seq_length + 1)) % VOCAB
    numbers = first + torch.arange(training.global_batch_size)
    ids, numbers = (
        values.unflatten(0, (-1, mesh.size("dp"), training.micro_batch_size))[:, mesh.rank("dp")].numpy()
        for values in (ids, numbers)
    )
    return make_batch(ids, numbers, DocumentMasking(EOD, data.eod_mask_loss, data.reset_attention_mask))


def shard_group(mesh):
    """Return the group of ranks that this rank's parameters are sharded over; None for just this one."""
    dim = mesh.sharing.ndim - 1 if mesh.sharing else 0
    return mesh.sharing.get_group(dim) if mesh.sharing and mesh.sharing.size(dim) > 1 else None


def whole_gradients(state):
    """Return name -> gradient of the logical tensor for this rank's stages, before the optimizer step.

    A tied embedding on two ranks has part of its gradient on each.
    """
    gradients, declared = {}, model_parameters(state.stages[0].config)
    for shard, parameter in zip(state.shards, parameters_of(state.stages), strict=True):
        local = local_tensor(parameter.grad).detach()
        gathered = all_gather_copy(local, 0, shard_group(state.mesh))
        if declared[shard.name].is_sharded:
            gathered = all_gather_copy(gathered, 0, state.mesh.group("tp"))
        whole = gathered.numpy().copy()
        gradients[shard.name] = gradients[shard.name] + whole if shard.name in gradients else whole
    return gradients


def training_run(mesh, config: RunConfig, steps: int = 20):
    """Train from scratch and return ([(loss, gradient norm)] of every step, gradients of the first)."""
    state = build_state(config, mesh)
    loss = forward_backward(state, random_batch(config, 0, mesh))
    gradients = whole_gradients(state)
    scale = state.scaler.scale
    curve = [(mean_over_replicas(loss, mesh) / scale, state.optimizer.step(config.optimizer.lr, 1 / scale).norm)]
    for step in range(1, steps):
        result = train_step(state, random_batch(config, step, mesh), config.optimizer.lr)
        curve.append((result.loss, result.grad_norm))
    return curve, gradients
