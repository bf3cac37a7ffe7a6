"""Kinds of parameters, by which they are decayed."""

from megatron_tf.config import ParameterKind

_KINDS: dict[str, ParameterKind] = {
    "embedding": "embedding",
    "query": "qkv",
    "key": "qkv",
    "value": "qkv",
    "proj": "proj",
    "ffn": "ffn",
    "final_norm": "final_norm",
    "head": "head",
}


def parameter_kind(name: str) -> ParameterKind:
    """Of a logical parameter: `layers.3.attention.query.key_tokens` is of kind qkv."""
    return _KINDS[next(part for part in name.split(".") if part in _KINDS)]
