"""What growth in width makes of each tensor, by dense matrices, and models to grow."""

import math

import torch

from megatron_tf.config import GrowthStage, ModelConfig
from tests.support.doubles import STRONG, TOKENFORMER, TRANSFORMER, checkpoint_of, random_parameters

MODELS = {
    **{norm: {**TOKENFORMER, "norm_activation": norm} for norm in ("l2_norm_gelu", "gelu_l2_norm", "softmax")},
    "transformer": TRANSFORMER,
    "gated": {**TRANSFORMER, "mlp": "swiglu", "qk_norm": True},
    "strong": STRONG,
}
MODELS |= {f"{name} untied": {**keys, "untie_embeddings_and_output_weights": True} for name, keys in MODELS.items()}
MULTIPLES = [2, 3, 1.5]
CASES = [(name, multiple) for name in MODELS for multiple in MULTIPLES if multiple != 1.5 or "strong" not in name]
"""All that can grow: the norms of `strong` have weights inside the blocks, which 1.5 can't mix."""
ROOT = math.sqrt(3)
BLOCK = torch.tensor([[1, 0], [(1 + ROOT) / 4, (3 - ROOT) / 4], [(1 - ROOT) / 4, (3 + ROOT) / 4]], dtype=torch.float64)


def stream_matrix(width, multiple):
    """C [new width, width]."""
    if multiple == 1.5:
        return torch.kron(torch.eye(width // 2, dtype=torch.float64), BLOCK)
    return torch.eye(width, dtype=torch.float64).repeat(multiple, 1)


def head_matrix(width, multiple):
    """R [new width, width]: copies of heads, the first ones once more."""
    return torch.eye(width, dtype=torch.float64).repeat(2 if multiple == 1.5 else multiple, 1)[: int(multiple * width)]


def widened(tensors, multiple):
    """Every tensor of a wider model as a linear function of the old ones."""
    width = len(tensors["final_norm.weight"])
    stream, heads = stream_matrix(width, multiple), head_matrix(width, multiple)
    reads = stream / multiple
    reads_heads = heads / heads.sum(0)
    found = {}
    for name, old in tensors.items():
        module, _, role = name.removeprefix("layers.").rpartition(".")
        is_qkv = module.endswith((".query", ".key", ".value"))
        if name == "final_norm.weight":
            square = torch.einsum("ij,ik->jki", stream, stream).flatten(0, 1)  # C^T diag(w') C = diag(w)
            found[name] = torch.linalg.lstsq(square, old.diag().flatten()[:, None], driver="gelsd").solution[:, 0]
        elif name == "final_norm.bias":
            found[name] = reads @ old
        elif is_qkv and role == "weight":
            found[name] = heads @ old @ reads.t()
        elif module.endswith(".proj") and role == "weight":
            found[name] = reads_heads @ old @ stream.t()
        elif module.endswith(".proj") and role == "key_tokens":
            found[name] = old @ reads_heads.t()
        elif is_qkv and role == "value_tokens":
            found[name] = old @ heads.t()
        elif module.endswith(("query_norm", "key_norm")):
            found[name] = old
        elif role == "key_tokens" or module.endswith((".up", ".gate")):
            found[name] = old @ reads.t()
        else:
            found[name] = old @ stream.t()
    return found


def source_of(keys, groups=("model",), **counters):
    config = ModelConfig(**keys)
    tensors = {group: random_parameters(config, seed) for seed, group in enumerate(groups)}
    return checkpoint_of(config, tensors, **counters)


def stage_of(multiple, **keys):
    return GrowthStage(hidden_multiple=multiple, **keys)


def close(found, expected, relative=1e-12):
    """Whether the largest difference is this small relative to the largest number."""
    return float((found - expected).abs().max()) <= relative * float(expected.abs().max())
