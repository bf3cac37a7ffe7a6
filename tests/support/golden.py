"""Fixtures of tests/golden, computed with the official implementation, under our names."""

import importlib.util
import json
from pathlib import Path

import torch

from megatron_tf.config import ModelConfig
from megatron_tf.convert.official.names import OFFICIAL
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.parameters import model_parameters

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("A_l2_norm_gelu", "B_gelu_l2_norm", "C_softmax")


def golden_case(case: str):
    """Load (model config, tensors, facts) of one fixture."""
    facts = json.loads((GOLDEN / f"{case}.json").read_text())
    official = facts["config"]
    config = ModelConfig(
        num_layers=official["num_layers"],
        hidden_size=official["hidden_size"],
        num_attention_heads=official["num_attention_heads"],
        qkv_tokens=official["qkv_slot_num"],
        proj_tokens=official["proj_slot_num"],
        ffn_tokens=official["ffn_slot_num"],
        vocab_size=official["padded_vocab_size"],
        norm_activation=official["norm_activation_type"],
    )
    if importlib.util.find_spec("safetensors") is None:
        import pytest  # the GPU report reads the fixtures without it

        pytest.skip("safetensors is not installed")
    from safetensors.torch import load_file

    return config, load_file(GOLDEN / f"{case}.safetensors"), facts


def fixture_name(model: TokenFormer, name: str) -> str:
    """Return the official name of a parameter of ours."""
    return OFFICIAL.of(model_parameters(model.config)[name], model.config.num_layers)


def golden_model(case: str, dtype: torch.dtype = torch.float32):
    """Return (single-device model with the fixture's parameters, tensors, facts)."""
    config, tensors, facts = golden_case(case)
    model = TokenFormer(config, dtype=dtype).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"param/{fixture_name(model, name)}"])
    return model, tensors, facts
