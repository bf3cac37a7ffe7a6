"""TokenFormer and the plain transformer by their formulas, in plain torch operations of the parameters' dtype.

An oracle: nothing here is shared with the package except the configuration, and parameters go by their names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.config import ModelConfig, RunConfig
from megatron_tf.tokenformer.parameters import model_parameters

_EPSILON = 1e-24  # added to the squared norm of a row


def initial_parameters(config: RunConfig) -> dict[str, Tensor]:
    """Return the initial values of a run by name: leaves in float64 that require gradients."""
    parameters = {}
    for name, parameter in model_parameters(config.model).items():
        rows = parameter.initial_rows(config.training.seed, 0, parameter.shape[0])
        parameters[name] = rows.double().requires_grad_()
    return parameters


def pattention(x: Tensor, keys: Tensor, values: Tensor, *, norm: str, tau: float) -> Tensor:
    """Compute a Pattention of x [..., D] with keys [N, D] and values [N, E] -> [..., E]."""
    scores = x @ keys.T
    if norm == "softmax":
        return tau * scores.softmax(-1) @ values
    if norm == "gelu_l2_norm":
        scores = F.gelu(scores)
    scaled = tau * scores / (scores.square().sum(-1, keepdim=True) + _EPSILON).sqrt()
    return (scaled if norm == "gelu_l2_norm" else F.gelu(scaled)) @ values


def initial_tau(norm: str, num_tokens: int) -> float:
    """Return the temperature of a Pattention that was initialized with this number of tokens."""
    return float(num_tokens) if norm == "softmax" else math.sqrt(num_tokens)


def logits(config: ModelConfig, parameters: dict[str, Tensor], ids: Tensor, taus: dict[str, float]) -> Tensor:
    """Compute the logits [B, S, V] of ids [B, S]; `taus` has the temperatures that are not the initial ones."""
    x = parameters["embedding.weight"][ids]
    for layer in range(config.num_layers):
        path = f"layers.{layer}"
        normalized = _normalized(config, parameters, x, path=f"{path}.attention_norm")
        x = x + _attention(config, parameters, normalized, path=f"{path}.attention", taus=taus)
        normalized = _normalized(config, parameters, x, path=f"{path}.ffn_norm")
        x = x + _feed_forward(config, parameters, normalized, path=f"{path}.ffn", taus=taus)
    x = _normalized(config, parameters, x, path="final_norm")
    name = "head.weight" if config.untie_embeddings_and_output_weights else "embedding.weight"
    return x @ parameters[name].T


def mean_loss(
    config: ModelConfig, parameters: dict[str, Tensor], ids: Tensor, taus: dict[str, float] | None = None
) -> Tensor:
    """Compute the mean loss of predicting each id from those before it, for samples of ids [B, S + 1]."""
    scores = logits(config, parameters, ids[:, :-1], taus or {})
    return F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten())


def decay_groups(parameters: dict[str, Tensor], weight_decay: float) -> list[dict]:
    """Return the groups of torch.optim.AdamW: weight decay for all but the norms, which are vectors."""
    norms = [value for value in parameters.values() if value.dim() == 1]
    others = [value for value in parameters.values() if value.dim() > 1]
    return [{"params": others, "weight_decay": weight_decay}, {"params": norms, "weight_decay": 0.0}]


def _normalized(config: ModelConfig, parameters: dict[str, Tensor], x: Tensor, *, path: str) -> Tensor:
    if config.norm == "rmsnorm":
        return rms_norm(x, parameters[f"{path}.weight"], config.layernorm_epsilon)
    centered = x - x.mean(-1, keepdim=True)
    normalized = centered / (centered.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    if path != "final_norm":
        return normalized
    return normalized * parameters["final_norm.weight"] + parameters["final_norm.bias"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide x by the root of its mean square over the last dimension, plus epsilon, and multiply by the weight."""
    return x * weight / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def _project(
    config: ModelConfig, parameters: dict[str, Tensor], x: Tensor, *, path: str, taus: dict[str, float]
) -> Tensor:
    if config.layer == "transformer":
        weight = parameters[f"{path}.weight"]
        return x @ (weight if path.endswith(".proj") else weight.T)  # the output weight is stored transposed
    keys, values = parameters[f"{path}.key_tokens"], parameters[f"{path}.value_tokens"]
    norm = config.norm_activation
    tau = taus.get(path, initial_tau(norm, len(keys)))
    return pattention(x, keys, values, norm=norm, tau=tau)


def _attention(
    config: ModelConfig, parameters: dict[str, Tensor], x: Tensor, *, path: str, taus: dict[str, float]
) -> Tensor:
    heads = []
    for name in ("query", "key", "value"):
        projected = _project(config, parameters, x, path=f"{path}.{name}", taus=taus)
        heads.append(projected.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2))
    q, k, v = heads
    if config.qk_norm:
        q = rms_norm(q, parameters[f"{path}.query_norm.weight"], config.layernorm_epsilon)
        k = rms_norm(k, parameters[f"{path}.key_norm.weight"], config.layernorm_epsilon)
    q, k = _rotated(q, config), _rotated(k, config)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)
    out = (weights @ v).transpose(1, 2).flatten(-2)
    return _project(config, parameters, out, path=f"{path}.proj", taus=taus)


def _rotated(x: Tensor, config: ModelConfig) -> Tensor:
    """Rotate pairs (i, i + dim / 2) of the first dim dimensions of x [B, h, S, d] by position times frequency."""
    dim = int(x.shape[-1] * config.rotary_percent)
    half = dim // 2
    frequencies = config.rotary_base ** (-torch.arange(half, dtype=x.dtype) * 2 / dim)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second, passed = x[..., :half], x[..., half:dim], x[..., dim:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, passed), -1)


def _feed_forward(
    config: ModelConfig, parameters: dict[str, Tensor], x: Tensor, *, path: str, taus: dict[str, float]
) -> Tensor:
    if config.mlp == "swiglu":
        gate = x @ parameters[f"{path}.gate.weight"].T
        return (gate * gate.sigmoid() * (x @ parameters[f"{path}.up.weight"].T)) @ parameters[f"{path}.down.weight"]
    if config.layer == "transformer":
        return F.gelu(x @ parameters[f"{path}.up.weight"].T) @ parameters[f"{path}.down.weight"]
    return _project(config, parameters, x, path=path, taus=taus)
