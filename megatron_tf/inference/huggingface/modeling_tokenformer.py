"""TokenFormer (arXiv 2410.23168) for transformers: every projection is attention over learnable parameter tokens.

Written by megatron_tf; this file and the configuration stand alone. Shapes: B batch, S tokens, D hidden, N parameter
tokens, h heads, d head dimension, K keys (tokens before these and these).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_tokenformer import TokenFormerConfig

EPSILON = 1e-12  # a row of zeros gives zeros instead of NaN


class Pattention(nn.Module):
    """The parameter tokens of one projection D -> D; tau is their temperature, which growth does not change."""

    def __init__(self, hidden_size: int, num_tokens: int, tau: float, norm_activation: str) -> None:
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.value_tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.tau = tau
        self.norm_activation = norm_activation

    def weights(self, x: Tensor) -> Tensor:
        """What each parameter token counts for: [..., N] of x [..., D]."""
        scores = F.linear(x, self.key_tokens)
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.norm_activation == "softmax":
            return (self.tau * wide.softmax(-1)).to(scores.dtype)
        is_gelu_first = self.norm_activation == "gelu_l2_norm"
        wide = F.gelu(wide) if is_gelu_first else wide
        wide = wide * (self.tau * torch.rsqrt(wide.square().sum(-1, keepdim=True) + EPSILON))
        return (wide if is_gelu_first else F.gelu(wide)).to(scores.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.weights(x) @ self.value_tokens


class TokenFormerAttention(nn.Module):
    """Causal self-attention between tokens, whose four projections are Pattentions."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query = _pattention(config, layer_idx, "attention.query", "qkv")
        self.key = _pattention(config, layer_idx, "attention.key", "qkv")
        self.value = _pattention(config, layer_idx, "attention.value", "qkv")
        self.proj = _pattention(config, layer_idx, "attention.proj", "proj")

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_length: int,
        past_key_values: Cache | None,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]; `attention_mask` [B, past + S] is true for real tokens, None where all are; or it
        is made already [B or 1, 1, S, K]."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        mask = _attention_mask(q.shape[-2], k.shape[-2], past_length, attention_mask, q.device)
        is_causal = mask is None and q.shape[-2] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.proj(out.transpose(1, 2).flatten(-2))


class TokenFormerLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += ffn(norm(x)), with norms without parameters."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.epsilon = config.layer_norm_eps
        self.attention = TokenFormerAttention(config, layer_idx)
        self.ffn = _pattention(config, layer_idx, "ffn", "ffn")

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """x [B, S, D] -> [B, S, D]; the other arguments are those of the attention."""
        x = x + self.attention(self._norm(x), *arguments)
        return x + self.ffn(self._norm(x))

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.epsilon)


class TokenFormerPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

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
    """Ids to the hidden states before the output layer."""

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
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, S] -> last_hidden_state [B, S, D], after the final norm.

        `attention_mask` [B, past + S] is 1 for real tokens; or it is what `generate` makes for a static cache.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.gradient_checkpointing and self.training):
            past_key_values = DynamicCache()
        past = int(past_key_values.get_seq_length()) if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = None if bool(attention_mask.all()) else attention_mask.bool()
        arguments = (_rotary_tables(position_ids, self.config), attention_mask, past, past_key_values)
        seen = [x]
        for layer in self.layers:
            x = layer(x, *arguments)
            seen.append(x)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*seen[:-1], x) if output_hidden_states or self.config.output_hidden_states else None,
        )


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """Ids to logits over the padded vocabulary."""

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, S] -> logits [B, S, V], or of the last `logits_to_keep` tokens only, and with labels [B, S]
        (-100 for none) the mean loss."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


def _pattention(config: TokenFormerConfig, layer_idx: int, module: str, kind: str) -> Pattention:
    tau = config.tau[f"layers.{layer_idx}.{module}"]
    return Pattention(config.hidden_size, config.token_counts[kind][layer_idx], tau, config.norm_activation)


def _rotary_tables(positions: Tensor, config: TokenFormerConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [B or 1, 1, S, rotated dimensions], of positions [B or 1, S]; half-split, as NeoX has it."""
    dim = int(config.hidden_size // config.num_attention_heads * config.rotary_percent)
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    angles = positions.float()[:, None, :, None] * (1.0 / config.rotary_base**exponents)
    angles = angles.repeat(1, 1, 1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head; x [B, h, S, d]."""
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((rotated * cos.to(x.dtype) + turned * sin.to(x.dtype), passed), dim=-1)


def _attention_mask(
    num_queries: int, num_keys: int, past: int, given: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees [B or 1, 1, S, K]; None where plain causal attention, or all keys, is meant."""
    if given is not None and given.dim() == 4:
        return given
    if given is None and num_keys == past + num_queries and (past == 0 or num_queries == 1):
        return None
    queries = past + torch.arange(num_queries, device=device)[:, None]
    keys = torch.arange(num_keys, device=device)
    mask = (keys <= queries)[None, None]
    if given is not None:
        is_real = F.pad(given, (0, num_keys - given.shape[1]))[:, None, None]
        mask = mask & is_real | (keys == queries)  # a query without any key would be NaN
    return mask
