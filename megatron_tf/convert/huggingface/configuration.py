"""Interprets config.json of an export the way transformers does."""

from collections.abc import Mapping
from typing import Any

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.config import TOKEN_KINDS, ModelConfig

_KEYS = {
    "num_layers": ("num_hidden_layers", 12),
    "hidden_size": ("hidden_size", 768),
    "num_attention_heads": ("num_attention_heads", 12),
    "norm_activation": ("norm_activation", "l2_norm_gelu"),
    "rotary_percent": ("rotary_percent", 0.25),
    "rotary_base": ("rotary_base", 10000.0),
    "layernorm_epsilon": ("layer_norm_eps", 1e-5),
    "init_method_std": ("initializer_range", 0.02),
}
"""Our key -> (transformers' key, default of TokenFormerConfig)."""
VOCAB_SIZE, MAX_POSITIONS = 50304, 2048
"""Defaults of TokenFormerConfig for the rows of the embedding and the sequence length."""
_FACTORS = {"qkv": 1, "proj": 1, "ffn": 4}


def model_section(config: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model that transformers builds from a config.json, by our keys. `saved` is the model at the export: it
    supplies the padding of the vocabulary, and the form of values that did not change."""
    model = dict(saved)
    for ours, (theirs, default) in _KEYS.items():
        model[ours] = config.get(theirs, default)
    for kind, counts in _token_counts(config, model).items():
        saved_counts = saved.get(f"{kind}_tokens")
        as_list = saved_counts if isinstance(saved_counts, list) else [saved_counts] * len(counts)
        is_changed = as_list != counts
        if is_changed:
            saved_counts = counts[0] if len(set(counts)) == 1 else counts
        model[f"{kind}_tokens"] = saved_counts
    model["untie_embeddings_and_output_weights"] = not config.get("tie_word_embeddings", True)
    return model


def check_vocabulary(config: Mapping[str, Any], model: ModelConfig, source: object) -> None:
    """Raise CheckpointError if transformers' embedding does not have the size of our padded vocabulary."""
    rows = config.get("vocab_size", VOCAB_SIZE)
    if rows != model.padded_vocab_size:
        raise CheckpointError(
            f"{source}: vocab_size is {rows}, and {model.vocab_size} ids padded to a multiple of "
            f"{model.make_vocab_size_divisible_by} are {model.padded_vocab_size}: was the embedding resized?"
        )


def _token_counts(config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, list[int]]:
    given = config.get("token_counts")
    if given:
        return {kind: list(given[kind]) for kind in TOKEN_KINDS}
    return {kind: [model["hidden_size"] * factor] * model["num_layers"] for kind, factor in _FACTORS.items()}
