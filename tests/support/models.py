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
from megatron_tf.parallel.mesh import Mesh
from tests.support.records import make_record
from tests.support.training import small_run

VOCAB = 257  # of NullTokenizer
SEQ_LENGTH = 16  # of small_run


def random_model(dtype: torch.dtype = torch.float32, **keys) -> LanguageModel:
    """Create a model whose logits are far apart; keywords are keys of its configuration."""
    config = dataclasses.replace(small_run(model={"vocab_size": VOCAB}).model, **keys)
    transformer = TokenFormer(config, dtype=dtype).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return LanguageModel(transformer, make_record(config)).eval()


def greedy_ids(model: LanguageModel, prompts, num_tokens: int):
    """Return a number of greedy ids after each prompt, without stopping at the end of a document."""
    generation = Generation(model, prompts, Sampling(temperature=0))
    steps = [generation.step() for _ in range(num_tokens)]
    return [[step[sample] for step in steps] for sample in range(len(prompts))]


def write_checkpoint(root, model: LanguageModel):
    """Write the model as a checkpoint of a run on bytes, of precision fp64 or fp32; return its directory."""
    precision = "fp64" if model.transformer.dtype == torch.float64 else "fp32"
    config = to_dict(small_run(model=_keys(model.config), training={"precision": precision}))
    record = make_record(model.config, config=config, tokenizer=NullTokenizer().identity)
    save_checkpoint(
        root,
        0,
        tensors={"model": parameter_shards(model.transformer, mesh=Mesh(torch.device("cpu")))},
        record=record,
        writer_label="one",
    )
    return root


def _keys(config: ModelConfig):
    absent = {"qkv_tokens", "proj_tokens"}  # of a plain transformer, unlike the small run's own
    return {key: value for key, value in to_dict(config).items() if value is not None or key in absent}
