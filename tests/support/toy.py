"""Tensors of a small model, and checkpoints of them as the ranks of any layout would write them, in one process."""

from dataclasses import replace

import torch

from megatron_tf.checkpoint.commit import prepare_directory, publish, temporary_directory
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import Target
from megatron_tf.checkpoint.save import write_rank
from megatron_tf.config import ModelConfig
from megatron_tf.parallel.sharding import RowShard, split_rows
from tests.support.records import make_record

GROUPS = ("model", "exp_avg", "exp_avg_sq")
LAYERS, HIDDEN, VOCABULARY = 3, 6, 24
TOKENS = {"qkv": 12, "proj": 12, "ffn": 36}
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": 6,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": VOCABULARY,
    "norm_activation": "l2_norm_gelu",
    **{f"{kind}_tokens": count for kind, count in TOKENS.items()},
}
MODULES = {
    **{f"attention.{part}": "qkv" for part in ("query", "key", "value")},
    "attention.proj": "proj",
    "ffn": "ffn",
}
TAU = {f"layers.{i}.{module}": TOKENS[kind] ** 0.5 for i in range(LAYERS) for module, kind in MODULES.items()}


def record(step=100):
    """Make the record that a trainer would write next to the tensors."""
    return make_record(ModelConfig(**MODEL), step=step, samples=64 * step, tokens=512 * step, adam_steps=step)


def shapes(tokens=TOKENS):
    """Return logical name -> global shape, in the model's order."""
    found = {"embedding.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        for module, kind in MODULES.items():
            for side in ("key", "value"):
                found[f"layers.{i}.{module}.{side}_tokens"] = (tokens[kind], HIDDEN)
    return found | {"final_norm.weight": (HIDDEN,), "final_norm.bias": (HIDDEN,)}


def random_tensors(seed=0, tokens=TOKENS):
    """Return {group: {name: tensor}}; rows don't depend on the number of tokens in other tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        group: {name: torch.randn(shape, generator=generator) for name, shape in shapes(tokens).items()}
        for group in GROUPS
    }


def is_replicated(name):
    """Return whether all tensor-parallel ranks hold the whole tensor, as in the model."""
    return name.startswith("final_norm.")


def stage_of(name, stages):
    """Return the stage of a tensor: layers evenly, the embedding first, the norm last."""
    if name.startswith("layers."):
        return min(stages - 1, int(name.split(".")[1]) * stages // LAYERS)
    return 0 if name.startswith("embedding.") else stages - 1


def target(tensor, stages):
    """Make a target layout for resharding."""
    starts = [-(-stage * LAYERS // stages) for stage in range(stages)]
    stops = [*starts[1:], 2 * LAYERS]  # layers that growth adds are on the last stage
    return Target(tensor, [range(*layers) for layers in zip(starts, stops, strict=True)])


def rank_shards(tensors, layout, rank):
    """Return {group: [RowShard]} of the rank (stage, tensor, replica) of the layout (tensor, stages, replicas)."""
    (ranks, stages, replicas), (stage, tensor, replica) = layout, rank
    groups = {}
    for group, named in tensors.items():
        groups[group] = []
        for name, whole in named.items():
            is_copy = name == "embedding.weight" and stage == stages - 1 != 0  # tied: the last stage has it too
            if stage_of(name, stages) == stage or is_copy:
                start, stop = (0, len(whole)) if is_replicated(name) else split_rows(len(whole), ranks, tensor)
                low, high = split_rows(stop - start, replicas, replica)
                writer = not is_copy and (tensor == 0 or not is_replicated(name))
                rows = whole[start + low : start + high].clone()
                groups[group].append(RowShard(name, tuple(whole.shape), start + low, start + high, rows, writer))
    return groups


def all_ranks(layout):
    """Return (stage, tensor, replica) of every rank."""
    tensor, stages, replicas = layout
    return [(p, t, d) for p in range(stages) for t in range(tensor) for d in range(replicas)]


def write(root, tensors, layout=(1, 1, 1), step=100):
    """Do everything that the layout's ranks do in a save except the commit."""
    prepare_directory(root, step, 0)
    directory = temporary_directory(root, step)
    return [
        write_rank(directory, rank_shards(tensors, layout, (p, t, d)), f"pp{p:02d}-tp{t:02d}-dp{d:02d}")
        for p, t, d in all_ranks(layout)
    ]


def save(root, tensors, layout=(1, 1, 1), step=100, facts=None):
    """Save a checkpoint as the layout's ranks do; return its directory."""
    return publish(root, step, record=facts or record(step), written=write(root, tensors, layout, step))


def blank(groups):
    """Return the same shards, filled with NaN."""
    return {
        group: [replace(shard, tensor=torch.full_like(shard.tensor, torch.nan)) for shard in shards]
        for group, shards in groups.items()
    }


def read_all(path):
    """Read {group: {name: tensor}} of a checkpoint."""
    reader = CheckpointReader(path)
    return {
        group: {
            name: reader.read_rows(group, name, start=0, stop=reader.shape(group, name)[0])
            for name in reader.names(group)
        }
        for group in reader.groups()
    }


def same(left, right):
    """Return whether two sets of tensors are equal bit for bit."""
    return left.keys() == right.keys() and all(
        left[group].keys() == right[group].keys()
        and all(
            torch.equal(tensor.view(torch.int32), right[group][name].view(torch.int32))
            for name, tensor in named.items()
        )
        for group, named in left.items()
    )
