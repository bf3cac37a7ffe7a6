"""Small models with random weights, in memory and as checkpoints."""

import dataclasses

import torch

from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.config import ModelConfig, to_dict
from megatron_tf.data.tokenizer import NullTokenizer
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.model import LanguageModel
from megatron_tf.inference.sampling import Sampling
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.model.tokenformer import TokenFormer
from tests.support.records import make_record
from tests.support.training import small_run

VOCAB = 257  # of NullTokenizer
SEQ_LENGTH = 16  # of small_run


def random_model(dtype: torch.dtype = torch.float32, **keys) -> LanguageModel:
    """A model whose logits are far apart: keywords are keys of its configuration."""
    config = dataclasses.replace(small_run(model={"vocab_size": VOCAB}).model, **keys)
    transformer = TokenFormer(config, dtype=dtype).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return LanguageModel(transformer, make_record(config)).eval()


def greedy_ids(model: LanguageModel, prompts, num_tokens: int):
    """What follows each prompt: so many of the likeliest ids, whatever they are."""
    generation = Generation(model, prompts, Sampling(temperature=0))
    steps = [generation.step() for _ in range(num_tokens)]
    return [[step[sample] for step in steps] for sample in range(len(prompts))]


def write_checkpoint(root, model: LanguageModel):
    """The model as a checkpoint of a run on bytes; returns its directory."""
    config = to_dict(small_run(model=_keys(model.config)))
    record = make_record(model.config, config=config, tokenizer=NullTokenizer().identity)
    save_checkpoint(root, 0, tensors={"model": parameter_shards(model.transformer)}, record=record, writer_label="one")
    return root


def _keys(config: ModelConfig):
    return {key: value for key, value in to_dict(config).items() if value is not None}
