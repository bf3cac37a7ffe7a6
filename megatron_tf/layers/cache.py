"""The key-value cache of a batch whose samples may differ in length.

Shapes: B samples, S new tokens of each, h heads of this rank, d head_dim, C positions allocated.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.kernels import row_attention

_FIRST_CAPACITY = 128  # positions; doubled whenever the cache is full
_MASK_ALIGNMENT = 16  # memory-efficient attention copies a mask whose rows begin elsewhere, in every layer


@dataclass(frozen=True, kw_only=True)
class CachePositions:
    """Where the new tokens of one call are stored, and which keys they see: those at or before their own position."""

    past: Sequence[int]
    """Tokens of each sample before the new ones."""
    indices: Tensor
    """[S, B], or [S, 1] where all samples have the same length."""
    start: int | None
    """The first new position if it is the same in all samples, else None."""
    end: int
    """Positions in use after the call, in the longest sample."""
    dtype: torch.dtype

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """Mask [B or 1, 1, S, end], 0 where a key is seen and -inf elsewhere; None if every key is seen or the cache
        was empty. It is what is added to the scores, since torch would convert a boolean mask in every layer.
        """
        if self.start == 0 or (self.start is not None and len(self.indices) == 1):
            return None
        last = self.indices.t()[:, None, :, None]
        width = self.end + -self.end % _MASK_ALIGNMENT
        is_hidden = torch.arange(width, device=last.device) > last
        mask = torch.zeros(is_hidden.shape, dtype=self.dtype, device=last.device)
        return mask.masked_fill_(is_hidden, -torch.inf)[..., : self.end]


class LayerCache:
    """Keys and values of one layer, each [B, h, C, d]."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def reserve(self, positions: CachePositions, *, heads: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Make space for new tokens, and return keys and values, [B, h, C, d] each, with the dtype of `like`."""
        if self.key is None or self.value is None or self.key.shape[2] < positions.end:
            held = 0 if self.key is None else self.key.shape[2]
            capacity = max(_FIRST_CAPACITY, positions.end, 2 * held)
            # zeros, not empty: masked positions are still multiplied by their weight of zero
            key, value = like.new_zeros(2, len(positions.past), heads, capacity, dim)
            if self.key is not None and self.value is not None:
                key[:, :, :held], value[:, :, :held] = self.key, self.value
            self.key, self.value = key, value
        return self.key, self.value

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, positions: CachePositions) -> Tensor:
        """Store k and v, and apply attention of the new q, k, v [S, B, h, d] over all cached tokens -> [S, B, h, d]."""
        keys, values = self.reserve(positions, heads=k.shape[2], dim=k.shape[3], like=k)
        if row_attention.is_for_rows(q, keys):
            return row_attention.attend(q, k, v, keys=keys, values=values, past=positions.past)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        _store(keys, k, positions)
        _store(values, v, positions)
        with _backends(q.device):
            if positions.start == 0:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                keys, values = (cached[:, :, : positions.end] for cached in (keys, values))
                out = F.scaled_dot_product_attention(q, keys, values, positions.mask)
        return out.permute(2, 0, 1, 3)


class KeyValueCache:
    """Keys and values of all layers for one batch; the first lengths[b] positions of sample b are valid.

    Create an empty cache for each batch; every call of the model that receives it appends the new tokens.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.lengths: list[int] | None = None
        self._past: Tensor | None = None  # uneven lengths on the device: a copy at each token would make the host wait

    def extend(self, batch: int, count: int, *, device: torch.device, dtype: torch.dtype) -> CachePositions:
        """Reserve positions for `count` more tokens of every sample, with activations of `dtype`, and return them."""
        lengths = self.lengths or [0] * batch
        assert len(lengths) == batch, f"the cache holds {len(lengths)} samples, not {batch}"
        self.lengths = [length + count for length in lengths]
        start = lengths[0] if min(lengths) == max(lengths) else None
        if start is not None:
            indices = torch.arange(start, start + count, device=device)[:, None]
        else:
            past = torch.tensor(lengths, device=device) if self._past is None else self._past
            indices = past + torch.arange(count, device=device)[:, None]
            self._past = past + count
        return CachePositions(past=lengths, indices=indices, start=start, end=max(self.lengths), dtype=dtype)

    def keep(self, lengths: Sequence[int]) -> None:
        """Truncate each sample to its length in `lengths`, to drop padding for example."""
        self.lengths, self._past = list(lengths), None

    def select(self, samples: Sequence[int]) -> None:
        """Keep only the samples with these indices, in this order."""
        assert self.lengths is not None
        self.lengths, self._past = [self.lengths[i] for i in samples], None
        index = torch.tensor(samples, dtype=torch.int64)
        for layer in self.layers:
            if layer.key is not None and layer.value is not None:
                index = index.to(layer.key.device)
                layer.key, layer.value = layer.key[index], layer.value[index]


@contextlib.contextmanager
def _backends(device: torch.device) -> Iterator[None]:
    """Exclude cuDNN's attention on a GPU: it builds a plan for every new shape, and each token is a new length."""
    if device.type != "cuda":
        yield
        return
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def _store(buffer: Tensor, new: Tensor, positions: CachePositions) -> None:
    """Write new [B, h, S, d] into the buffer [B, h, C, d]."""
    if positions.start is not None:
        buffer[:, :, positions.start : positions.end] = new
    else:
        samples = torch.arange(len(new), device=new.device)[:, None]
        buffer[samples, :, positions.indices.t()] = new.transpose(1, 2)
