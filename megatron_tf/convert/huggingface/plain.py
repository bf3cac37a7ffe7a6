"""Plain transformers as architectures that transformers itself has: Llama, or Qwen3 with QK-norm.

Both rotate dimension i of a head together with i + head_dim / 2, as we do, so that no rows are permuted.
"""

from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.config import ModelConfig

RELATIVE_TOLERANCE = 1e-5
"""Share of the largest logit that counts as rounding: in any dtype, transformers computes these norms in fp32."""


def check_plain(model: ModelConfig, where: Path) -> None:
    """Raise CheckpointError, with what is missing, if transformers has no architecture of this plain transformer."""
    needed = {
        "norm: rmsnorm": model.norm == "rmsnorm",
        "mlp: swiglu": model.mlp == "swiglu",
        "rotary_percent: 1.0": model.rotary_percent == 1.0,
        "the same ffn_tokens in every layer": len(set(model.token_counts("ffn"))) == 1,
    }
    if missing := [what for what, is_met in needed.items() if not is_met]:
        raise CheckpointError(
            f"{where} is a plain transformer that transformers does not have: it can be exported as {_name(model)} "
            f"only with {', '.join(missing)}"
        )


def architecture(model: ModelConfig) -> str:
    """Return the name of the class in transformers."""
    return f"{_name(model)}ForCausalLM"


def plain_config(model: ModelConfig) -> dict[str, Any]:
    """Return config.json as far as it depends on the model."""
    rotary = {"rope_type": "default", "rope_theta": model.rotary_base}
    (ffn_tokens,) = set(model.token_counts("ffn"))
    return {
        "architectures": [architecture(model)],
        "model_type": _name(model).lower(),
        "intermediate_size": ffn_tokens,
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_parameters": rotary,
        "rope_theta": model.rotary_base,  # read by other programs, and by transformers before version 5
    }


def _name(model: ModelConfig) -> str:
    return "Qwen3" if model.qk_norm else "Llama"
