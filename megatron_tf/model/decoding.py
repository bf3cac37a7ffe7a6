"""Blocks of a TokenFormer in one call each, for decoding on a CPU."""

from torch import Tensor, nn

from megatron_tf.kernels.adapters import torch_norm
from megatron_tf.kernels.row_block import BlockWeights, can_run, run_block
from megatron_tf.layers.attention import PattentionAttention, has_hooks
from megatron_tf.layers.cache import CachePositions, LayerCache
from megatron_tf.layers.norm import BlockNorm
from megatron_tf.layers.pattention import Pattention
from megatron_tf.model.block import Block


def decode(
    block: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], *, cache: LayerCache, positions: CachePositions
) -> Tensor | None:
    """Apply a block to x [S, B, D] of new tokens -> [S, B, D], or return None if its modules have to be called."""
    weights = _weights(block) if isinstance(block, Block) else None
    if weights is None or not can_run(x, weights):
        return None
    cached = cache.reserve(positions, heads=weights.heads, dim=x.shape[-1] // weights.heads, like=x)
    return run_block(x, weights, rotary=rotary, cached=cached, past=positions.past)


def _weights(block: Block) -> BlockWeights | None:
    """Return the weights of a block of one rank that is arranged for decoding, and None for every other."""
    attention, ffn = block.attention, block.ffn
    first, second = block.attention_norm, block.ffn_norm
    if not (isinstance(attention, PattentionAttention) and isinstance(ffn, Pattention)):
        return None
    projections = [attention.query, attention.key, attention.value, attention.proj, ffn]
    if attention.input_ranks.group is not None or not all(p.kernels.stores_columns for p in projections):
        return None
    if not (isinstance(first, BlockNorm) and isinstance(second, BlockNorm) and first.normalize is torch_norm):
        return None
    if any(map(has_hooks, (block, attention, first, second, *projections))):  # hooks run only when a module is called
        return None
    return BlockWeights(
        keys=[p.key_tokens for p in projections],
        columns=[p.value_tokens.t() for p in projections],
        taus=[p.tau for p in projections],
        norm=ffn.norm.name,
        heads=ffn.value_tokens.shape[1] // attention.head_dim,
        epsilon=first.epsilon,
    )
