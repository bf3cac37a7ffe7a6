"""Configuration of a TokenFormer (arXiv 2410.23168) for transformers. Written by megatron_tf, but independent of it."""

import math
from typing import Any

from transformers import PretrainedConfig


class TokenFormerConfig(PretrainedConfig):
    """Sizes of the model, and the temperature tau of every projection, which is state but not a tensor.

    `token_counts` maps each kind of projection (qkv, proj, ffn) to the number of parameter tokens in each layer. `tau`
    maps module paths, such as `layers.0.attention.query`, to temperatures, by default those at initialization.
    `vocab_size` is the number of embedding rows, including padding. `megatron_tf` holds what megatron_tf needs to
    import the model again.
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
        self.tau = tau or self._initial_tau()
        self.rotary_percent = rotary_percent
        self.rotary_base = rotary_base
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        self.megatron_tf = megatron_tf
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _initial_tau(self) -> dict[str, float]:
        kinds = {f"attention.{part}": "qkv" for part in ("query", "key", "value")}
        kinds |= {"attention.proj": "proj", "ffn": "ffn"}
        return {
            f"layers.{i}.{module}": float(count) if self.norm_activation == "softmax" else math.sqrt(count)
            for module, kind in kinds.items()
            for i, count in enumerate(self.token_counts[kind])
        }
