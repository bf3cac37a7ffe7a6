"""Checkpoints with Adam moments of small random models, grown by stages, and a text to measure on."""

import numpy as np
import torch

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import GrowthStage, to_dict
from megatron_tf.data.tokenizer import NullTokenizer
from megatron_tf.growth.grow import grow
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.dtypes import DTYPES
from tests.support.data import write_data_set
from tests.support.models import SEQ_LENGTH, VOCAB, random_model
from tests.support.records import make_record
from tests.support.toy import target
from tests.support.training import small_run

PLAIN = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
"""Keys of the model that make it a plain transformer."""


def write_text(prefix):
    """Write 20 samples of random ids in two documents; return the prefix."""
    ids = np.random.default_rng(0).integers(0, VOCAB, 20 * (SEQ_LENGTH + 1)).astype(np.uint16)
    return write_data_set(prefix, [ids[:100], ids[100:]])


def trained_checkpoint(root, precision="fp32", **keys):
    """Save a model, with these keys of its configuration, with Adam moments after 5 steps; return the directory."""
    model = random_model(dtype=DTYPES[precision], **keys)
    shards = parameter_shards(model.transformer, mesh=Mesh(torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    groups = {"model": shards}
    for group in ("exp_avg", "exp_avg_sq"):
        moments = [torch.rand(shard.tensor.shape, generator=generator).to(shard.tensor.dtype) for shard in shards]
        groups[group] = [shard.with_tensor(moment) for shard, moment in zip(shards, moments, strict=True)]
    sections = {key: value for key, value in to_dict(model.config).items() if value is not None or key in keys}
    record = make_record(
        model.config,
        config=to_dict(small_run(model=sections, training={"precision": precision})),
        tokenizer=NullTokenizer().identity,
        step=5,
        samples=40,
        tokens=640,
        adam_steps=5,
    )
    save_checkpoint(root, 5, tensors=groups, record=record, writer_label="one")
    return root


def grow_by_stages(source, root, *stages):
    """Grow a checkpoint by the keys of stages, one after the other; return the new directory."""
    checkpoint = CheckpointReader(source)
    for stage in stages:
        checkpoint = grow(checkpoint, GrowthStage(**stage))
    reshard(checkpoint, root, target(1, 1), check_source=lambda: None)
    return root
