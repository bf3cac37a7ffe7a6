"""Configuration of a TokenFormer (arXiv 2410.23168) for transformers. Written by megatron_tf; it stands alone."""

import math
from typing import Any

from transformers import PretrainedConfig


class TokenFormerConfig(PretrainedConfig):
    """Sizes, and the state that is no tensor: the temperature tau of every projection.

    `token_counts` holds, for each kind of projection (qkv, proj, ffn), the parameter tokens of each layer; `tau` the
    temperatures by module, such as `layers.0.attention.query`, by default as at birth. `vocab_size` are the rows of the
    embedding, padding included. `megatron_tf` is what megatron_tf needs to read the model back.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        token_counts: dict[str, list[int]] | None = None,
        tau: dict[str, float] | None = None,
        norm_activation: str = "l2_norm_gelu",
        rotary_percent: float = 0.25,
        rotary_base: float = 10000.0,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        megatron_tf: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.token_counts = token_counts or {
            kind: [hidden_size * factor] * num_hidden_layers for kind, factor in (("qkv", 1), ("proj", 1), ("ffn", 4))
        }
        self.norm_activation = norm_activation
        self.tau = tau or self._tau_at_birth()
        self.rotary_percent = rotary_percent
        self.rotary_base = rotary_base
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.megatron_tf = megatron_tf
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _tau_at_birth(self) -> dict[str, float]:
        kinds = {f"attention.{part}": "qkv" for part in ("query", "key", "value")}
        kinds |= {"attention.proj": "proj", "ffn": "ffn"}
        return {
            f"layers.{i}.{module}": float(count) if self.norm_activation == "softmax" else math.sqrt(count)
            for module, kind in kinds.items()
            for i, count in enumerate(self.token_counts[kind])
        }
