"""Checkpoints of models that were not trained."""

from dataclasses import asdict
from pathlib import Path

import torch

from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import to_dict
from megatron_tf.data.tokenizer import build_tokenizer
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.training.checkpointing import new_progress
from tests.support.training import small_run

SEQ_LENGTH = 24


def save_byte_model(root: Path, seed: int = 0) -> Path:
    """A run's directory with a model of bytes that has opinions: its logits differ by several nats."""
    config = small_run(
        model={"vocab_size": 257},
        training={"seq_length": SEQ_LENGTH},
        data={"tokenizer_type": "NullTokenizer"},
    )
    model = TokenFormer(config.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    progress = asdict(new_progress(config.model, build_tokenizer("NullTokenizer", None).identity))
    training = {key: progress[key] for key in ("step", "samples", "tokens", "adam_steps")}
    metadata = {"model": to_dict(config.model), "config": to_dict(config), "training": training}
    metadata |= {key: progress[key] for key in ("tau", "tokenizer")} | {"lineage": []}
    save_checkpoint(root, 0, {"model": parameter_shards(model)}, metadata, "one", None)
    return root
