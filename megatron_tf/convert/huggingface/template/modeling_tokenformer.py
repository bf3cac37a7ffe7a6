"""TokenFormer (arXiv 2410.23168) for transformers: every projection is attention over learnable parameter tokens.

Written by megatron_tf, which this file and the configuration do not need. Shapes: B batch, S tokens, D hidden, N
parameter tokens, h heads, d head dimension, K keys (cached ones and those of the current tokens).
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, __version__
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_tokenformer import TokenFormerConfig

if __version__ == "5.3.0":  # does not initialize the output layer of tied models with custom code
    raise ImportError("transformers 5.3.0 does not tie the embeddings of models like this one: install 5.4 or later")

EPSILON = 1e-12  # a zero row gives zeros instead of NaN
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""Name of the cache in a model's output, which `generate` reads; transformers 5.24 renamed it."""


class Shared(NamedTuple):
    """Inputs of a forward pass that all layers share."""

    rotary: tuple[Tensor, Tensor]
    positions: Tensor  # [S], positions of the current tokens in the cache
    past_length: int | Tensor  # a tensor for a static cache, whose length is only known on the device
    attention_mask: Tensor | None  # [B, K]: True for real tokens; [B or 1, 1, S, K]: the complete mask; None: no mask
    cache: Cache | None


class Pattention(nn.Module):
    """A projection D -> D by attention over N parameter tokens; tau is their temperature."""

    def __init__(self, hidden_size: int, num_tokens: int, tau: float, norm_activation: str) -> None:
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.tau = tau
        self.norm_activation = norm_activation

    def weights(self, x: Tensor) -> Tensor:
        """Return the weight of each parameter token, [..., N], for x [..., D]."""
        scores = F.linear(x, self.key_tokens)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.norm_activation == "softmax":
            return (self.tau * wide.softmax(-1)).to(scores.dtype)
        is_gelu_first = self.norm_activation == "gelu_l2_norm"
        wide = F.gelu(wide) if is_gelu_first else wide
        wide = wide * (self.tau * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPSILON))
        return (wide if is_gelu_first else F.gelu(wide)).to(scores.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., D] -> [..., D]."""
        return self.weights(x) @ self.value_tokens


class TokenFormerAttention(nn.Module):
    """Causal self-attention between tokens whose four projections are Pattentions."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = _pattention(config, layer_idx, "attention.query", "qkv")
        self.key = _pattention(config, layer_idx, "attention.key", "qkv")
        self.value = _pattention(config, layer_idx, "attention.value", "qkv")
        self.proj = _pattention(config, layer_idx, "attention.proj", "proj")

    def forward(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        """Map x [B, S, D] to [B, S, D]; also return the attention weights [B, h, S, K] with eager attention."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q, k = _rotate(q, *shared.rotary), _rotate(k, *shared.rotary)
        if shared.cache is not None:
            # without them, a static cache of transformers 5.0 writes to the start; later versions count themselves
            k, v = shared.cache.update(k, v, self.layer_idx, {"cache_position": shared.positions})
        attend = _eager_attention if self.config._attn_implementation == "eager" else _sdpa_attention
        out, weights = attend(q, k, v, shared)
        return self.proj(out.transpose(1, 2).flatten(-2)), weights


class TokenFormerLayer(GradientCheckpointingLayer):
    """A pre-norm block: x += attention(norm(x)); x += ffn(norm(x)), where the norms have no parameters."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.epsilon = config.layer_norm_eps
        self.attention = TokenFormerAttention(config, layer_idx)
        self.ffn = _pattention(config, layer_idx, "ffn", "ffn")

    def forward(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        """Map x [B, S, D] to [B, S, D]; also return the attention weights as the attention does."""
        attended, weights = self.attention(self._norm(x), shared)
        x = x + attended
        return x + self.ffn(self._norm(x)), weights

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.epsilon)


class TokenFormerPreTrainedModel(PreTrainedModel):
    """Base class of both models."""

    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, Pattention):
            nn.init.normal_(module.key_tokens, std=std)
            depth, width = self.config.num_hidden_layers, self.config.hidden_size
            nn.init.normal_(module.value_tokens, std=2.0 / (depth * math.sqrt(width)))
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class TokenFormerModel(TokenFormerPreTrainedModel):
    """The model without its output layer: ids to hidden states."""

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([TokenFormerLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Map input_ids [B, S] to last_hidden_state [B, S, D], after the final norm.

        `attention_mask` is [B, K] with 1 for real tokens, or [B or 1, 1, S, K] as created by `generate` for a static
        cache. `cache` and `past_key_values` are two names of the same argument. `output_attentions` needs
        attn_implementation="eager". Unknown arguments raise TypeError unless they are None.
        """
        # not declared: `generate` of 5.24 warns about models that declare it
        positions = kwargs.pop("cache_position", None)
        _check_arguments(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        output_hidden_states = _flag(output_hidden_states, self.config, "output_hidden_states")
        output_attentions = _flag(output_attentions, self.config, "output_attentions")
        _check_attention(self.config, output_attentions)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._choose_cache(cache, past_key_values, use_cache)
        past_length = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = past_length + torch.arange(x.shape[1], device=x.device)
        shared = Shared(
            rotary=_rotary_tables(positions[None] if position_ids is None else position_ids, self.config, x.dtype),
            positions=positions,
            past_length=past_length,
            attention_mask=_simplify_mask(attention_mask),
            cache=cache,
        )
        hidden_states, attentions = [x], []
        for layer in self.layers:
            x, weights = layer(x, shared)
            hidden_states.append(x)
            attentions.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=(*hidden_states[:-1], x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            **{CACHE: cache},
        )

    def _choose_cache(self, cache: Cache | None, past_key_values: Cache | None, use_cache: bool | None) -> Cache | None:
        """Return the given cache, whatever `use_cache` is, or a new one if it is set."""
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            raise ValueError("cache and past_key_values are two names of the same argument: give only one")
        cache = past_key_values if cache is None else cache
        is_recomputed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if is_recomputed and cache is not None:
            raise ValueError("a cache cannot be used with gradient checkpointing: the backward pass fills it twice")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return DynamicCache() if cache is None and use_cache and not is_recomputed else cache


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """The model with its output layer: ids to logits over the padded vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TokenFormerConfig) -> None:
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Map input_ids [B, S] to logits [B, S, V], or only those of the last `logits_to_keep` tokens.

        With labels [B, S] (-100 to ignore) also computes the loss: the mean, or the sum divided by
        `num_items_in_batch`. `shift_labels` are labels already shifted by one. The other arguments are those of
        TokenFormerModel."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _check_arguments(unknown: dict[str, Any]) -> None:
    """Raise TypeError for an unused argument: ignoring it could silently give wrong results."""
    for name, value in unknown.items():
        if value is not None:
            raise TypeError(
                f"TokenFormer's forward() got an unexpected keyword argument {name!r}. If transformers {__version__} "
                "passed it, modeling_tokenformer.py is too old for it: install transformers 5.24, or export again"
            )


def _flag(value: bool | None, config: TokenFormerConfig, name: str) -> bool:
    """Return `value`, by default that of the configuration. Raises ValueError unless it is a boolean."""
    value = getattr(config, name) if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")  # noqa: TRY004
    return value


def _check_attention(config: TokenFormerConfig, output_attentions: bool) -> None:
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(f"attn_implementation must be 'sdpa' or 'eager', not {config._attn_implementation!r}")
    if output_attentions and config._attn_implementation != "eager":
        raise ValueError("output_attentions=True needs attn_implementation='eager'")


def _pattention(config: TokenFormerConfig, layer_idx: int, module: str, kind: str) -> Pattention:
    tau = config.tau[f"layers.{layer_idx}.{module}"]
    return Pattention(config.hidden_size, config.token_counts[kind][layer_idx], tau, config.norm_activation)


def _rotary_tables(positions: Tensor, config: TokenFormerConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin [B or 1, 1, S, rotated dimensions] of positions [B or 1, S]; half-split as in GPT-NeoX.

    They are fp64 for activations of fp64, otherwise fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    dim = int(config.hidden_size // config.num_attention_heads * config.rotary_percent)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim
    angles = positions.to(wide)[:, None, :, None] * (1.0 / config.rotary_base**exponents)
    angles = angles.repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head; x [B, h, S, d]."""
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos.to(x.dtype) + turned * sin.to(x.dtype), passed), dim=-1)


def _simplify_mask(mask: Tensor | None) -> Tensor | None:
    """Replace a mask [B, K] that hides nothing by None: attention without a mask is faster."""
    if mask is None or mask.dim() == 4:
        return mask
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # a compiled graph can't depend on the values
    return None if not is_traced and bool(mask.all()) else mask.bool()


def _sdpa_attention(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> tuple[Tensor, None]:
    num_queries, num_keys, past = q.shape[-2], k.shape[-2], shared.past_length
    has_all_keys = isinstance(past, int) and num_keys == past + num_queries  # a static cache has unused positions
    if shared.attention_mask is None and has_all_keys and (past == 0 or num_queries == 1):
        return F.scaled_dot_product_attention(q, k, v, is_causal=num_queries > 1), None
    mask = _attention_mask(shared.positions, num_keys, shared.attention_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, shared: Shared) -> tuple[Tensor, Tensor]:
    mask = _attention_mask(shared.positions, k.shape[-2], shared.attention_mask)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    least = torch.finfo(scores.dtype).min  # not -inf: a query without any visible key would give NaN
    scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return weights @ v, weights


def _attention_mask(positions: Tensor, num_keys: int, given: Tensor | None) -> Tensor:
    """Return which keys the queries at `positions` [S] can see, [B or 1, 1, S, K]; `given` is as in `Shared`."""
    if given is not None and given.dim() == 4:
        return given
    queries, keys = positions[:, None], torch.arange(num_keys, device=positions.device)
    mask = (keys <= queries)[None, None]
    if given is not None:
        is_real = F.pad(given, (0, num_keys - given.shape[1]))[:, None, None]
        mask = mask & is_real | (keys == queries)  # a query without any visible key would give NaN
    return mask
