"""TokenFormer: a decoder whose every projection is a Pattention (arXiv 2410.23168).

A `TokenFormer` holds a contiguous range of the layers. With all of them, and no group, it is the whole model on one
device; a pipeline stage is the same class with fewer layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from megatron_tf.config import ModelConfig
from megatron_tf.kernels.adapters import Attend
from megatron_tf.kernels.dispatch import Kernels
from megatron_tf.layers.attention import Attention, LinearAttention, PattentionAttention
from megatron_tf.layers.cache import CachePositions, KeyValueCache
from megatron_tf.layers.dropout import Dropout
from megatron_tf.layers.embedding import VocabularyWeight
from megatron_tf.layers.linear import MLP
from megatron_tf.layers.norm import FinalNorm
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.rotary import rotary_tables
from megatron_tf.layers.sequence import enter_tensor_parallel, leave_tensor_parallel


class Block(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += ffn(norm(x)), where ffn is a single Pattention, or an MLP."""

    def __init__(self, config: ModelConfig, layer: int, *, group: ProcessGroup | None, sequence_parallel: bool) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        norm = config.norm_activation
        ffn_tokens = config.token_counts("ffn")[layer]
        if config.layer == "tokenformer":
            qkv_tokens, proj_tokens = (config.token_counts(kind)[layer] for kind in ("qkv", "proj"))
            self.attention: Attention = PattentionAttention(
                width,
                heads,
                qkv_tokens=qkv_tokens,
                proj_tokens=proj_tokens,
                norm_activation=norm,
                group=group,
                sequence_parallel=sequence_parallel,
            )
            self.ffn: Pattention | MLP = Pattention(width, width, num_tokens=ffn_tokens, norm_activation=norm)
        else:
            self.attention = LinearAttention(width, heads, group=group, sequence_parallel=sequence_parallel)
            self.ffn = MLP(width, ffn_tokens)
        self.epsilon = config.layernorm_epsilon
        self.normalise = Kernels().normalise
        self.group = group
        self.sequence_parallel = sequence_parallel

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        *,
        attend: Attend | None = None,
        documents: Sequence[Sequence[int]] | None = None,
        dropout: Dropout | None = None,
    ) -> Tensor:
        """x [s, B, D] -> [s, B, D]; the other arguments are those of Attention."""
        sequence_group = self.group if self.sequence_parallel else None
        normalised = self.normalise(x, None, None, epsilon=self.epsilon)
        out = self.attention(normalised, rotary, attend=attend, documents=documents, dropout=dropout)
        x = x + (out if dropout is None else dropout.hidden(out, "attention", sequence_group))
        normalised = self.normalise(x, None, None, epsilon=self.epsilon)
        # gathered after the norm: each rank normalizes its own part of the sequence alone
        hidden = enter_tensor_parallel(normalised, self.group, self.sequence_parallel)
        out = self.ffn(hidden, self.group) if isinstance(self.ffn, Pattention) else self.ffn(hidden)
        out = leave_tensor_parallel(out, self.group, self.sequence_parallel)
        return x + (out if dropout is None else dropout.hidden(out, "ffn", sequence_group))


class TokenFormer(nn.Module):
    """Layers `layers` of the model; with the embedding if they include the first, with norm and head if the last.

    Parameters are named the same in every stage, so that a name means one logical tensor. With all the layers they are
    those that `megatron_tf/tokenformer/parameters.py` declares, in its order.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        *,
        group: ProcessGroup | None = None,
        sequence_parallel: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        self.config = config
        self.dtype = dtype
        self.group = group
        self.sequence_parallel = sequence_parallel
        self.recompute_blocks = False
        self.dropout: Dropout | None = None
        self.is_first = layers.start == 0
        self.is_last = layers.stop == config.num_layers
        self.is_tied = not config.untie_embeddings_and_output_weights
        if self.is_first or (self.is_last and self.is_tied):
            self.embedding = self._vocabulary_weight()
        self.layers = nn.ModuleDict(
            {str(i): Block(config, i, group=group, sequence_parallel=sequence_parallel) for i in layers}
        )
        if self.is_last:
            sequence_group = group if sequence_parallel else None
            self.final_norm = FinalNorm(config.hidden_size, config.layernorm_epsilon, sequence_group)
            if not self.is_tied:
                self.head = self._vocabulary_weight()

    def forward(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        *,
        document_starts: Tensor | None = None,
        sample_numbers: Tensor | None = None,
    ) -> Tensor:
        """Ids [B, S] (first stage) or hidden states [s, B, D] -> this rank's logits [S, B, V / R] (last stage) or
        hidden states [s, B, D]; the other arguments are those of `hidden_states`."""
        x = self.hidden_states(x, cache, document_starts=document_starts, sample_numbers=sample_numbers)
        return self.logits(x) if self.is_last else x

    def hidden_states(
        self,
        x: Tensor,
        cache: KeyValueCache | None = None,
        *,
        document_starts: Tensor | None = None,
        sample_numbers: Tensor | None = None,
    ) -> Tensor:
        """Ids [B, S] (first stage) or hidden states [s, B, D] -> hidden states [s, B, D] after the layers.

        `cache` holds the tokens that came before these, and takes these in. `document_starts` [B, S] is where each
        token's document begins: documents do not see each other, and positions restart in each. `sample_numbers` [B]
        are those of the samples in the data of the run; without them nothing is dropped. Both are read on the host:
        on a device they would make it wait."""
        dropout = None
        if self.dropout is not None and sample_numbers is not None:
            dropout = replace(self.dropout, samples=tuple(sample_numbers.tolist()))
        positions = cache.extend(x.shape[0], x.shape[1], x.device) if cache is not None else None
        if self.is_first:
            x = self.embedding.embed(x).to(self.dtype)
            if dropout is not None:
                x = dropout.hidden(x, "embedding", self.group if self.sequence_parallel else None)
        rotary = self._rotary(x, positions, document_starts)
        documents = None if document_starts is None else _document_lengths(document_starts)
        for i, (layer, block) in enumerate(self.layers.items()):
            attend: Attend | None = None
            if cache is not None and positions is not None:
                attend = partial(cache.layers[i].attend, positions=positions)
            dropped = None if dropout is None else replace(dropout, layer=int(layer))
            run: Callable[..., Tensor] = block
            if self.recompute_blocks and torch.is_grad_enabled():
                run = partial(checkpoint, block, use_reentrant=False)
            x = run(x, rotary, attend=attend, documents=documents, dropout=dropped)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states [s, B, D] after the last layer -> this rank's logits [S, B, V / R]."""
        x = enter_tensor_parallel(self.final_norm(x), self.group, self.sequence_parallel)
        return (self.embedding if self.is_tied else self.head).logits(x)

    def use(self, kernels: Kernels) -> None:
        """Compute with these kernels: none of them changes what is computed, beyond rounding."""
        for module in self.modules():
            if isinstance(module, Pattention):
                module.use(kernels.pattention)
            elif isinstance(module, Attention):
                module.attend = kernels.attend
            elif isinstance(module, (Block, FinalNorm)):
                module.normalise = kernels.normalise
            elif isinstance(module, VocabularyWeight):
                module.linear = kernels.linear

    def pattentions(self) -> dict[str, Pattention]:
        """Every Pattention by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Pattention)}

    def _vocabulary_weight(self) -> VocabularyWeight:
        config = self.config
        return VocabularyWeight(
            config.padded_vocab_size, config.hidden_size, group=self.group, sequence_parallel=self.sequence_parallel
        )

    def _rotary(
        self, x: Tensor, positions: CachePositions | None, document_starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ranks = self.group.size() if self.group is not None and self.sequence_parallel else 1
        dim = int(self.config.head_dim * self.config.rotary_percent)
        indices = positions.indices if positions else torch.arange(x.shape[0] * ranks, device=x.device)[:, None]
        if document_starts is not None:
            indices = indices - document_starts.t().to(x.device)
        cos, sin = rotary_tables(indices, dim, self.config.rotary_base)
        return cos.to(x.dtype), sin.to(x.dtype)


def _document_lengths(document_starts: Tensor) -> list[list[int]]:
    """Lengths of each sample's documents, from where the one of each token begins [B, S]."""
    return [torch.unique_consecutive(starts, return_counts=True)[1].tolist() for starts in document_starts]
