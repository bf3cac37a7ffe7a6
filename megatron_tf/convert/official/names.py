"""Parameter names of the official implementation, and facts about its published models that no tensor contains."""

from megatron_tf.convert.names import NameTable
from megatron_tf.tokenformer.parameters import Module, Role

FILE = "pytorch_model.bin"
OFFICIAL = NameTable(
    paths={
        Module.EMBEDDING: "sequential.0.word_embeddings",
        Module.QUERY: "sequential.{block}.attention.query",
        Module.KEY: "sequential.{block}.attention.key",
        Module.VALUE: "sequential.{block}.attention.value",
        Module.PROJ: "sequential.{block}.attention.proj",
        Module.FFN: "sequential.{block}.mlp",
        Module.FINAL_NORM: "sequential.{norm}.norm",
        Module.HEAD: "sequential.{head}.final_linear",
    },
    roles={
        Role.KEYS: "key_param_tokens",
        Role.VALUES: "value_param_tokens",
        Role.WEIGHT: "weight",
        Role.BIAS: "bias",
    },
)
PUBLISHED = {"rotary_base": 10000.0, "rotary_percent": 0.25, "layernorm_epsilon": 1e-5}
"""Values of the published models that can't be inferred from tensors, by the keys of the model configuration."""
