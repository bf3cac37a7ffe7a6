"""The key-value cache of a batch whose samples may differ in length.

Shapes: B samples, S new tokens of each, h heads of this rank, d head_dim, C positions allocated.

On a CPU, the keys and values of 16-bit activations are cached in fp32: torch's attention of one query takes six to nine
times as long in bf16 as in fp32 (docs/performance.md).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.tokenformer.dtypes import wide_dtype

_FIRST_CAPACITY = 128  # positions; doubled whenever the cache is full
_MASK_ALIGNMENT = 16  # memory-efficient attention copies a mask whose rows begin elsewhere, in every layer


@dataclass(frozen=True, kw_only=True)
class CachePositions:
    """Where the new tokens of one call are stored, and which keys they see: those at or before their own position."""

    indices: Tensor
    """[S, B], or [S, 1] where all samples have the same length."""
    start: int | None
    """The first new position if it is the same in all samples, else None."""
    end: int
    """Positions in use after the call, in the longest sample."""
    mask: Tensor | None
    """[B or 1, 1, S, end] of the cache's dtype, 0 where a key is seen and -inf elsewhere; None if every key is seen or
    the cache was empty."""


class LayerCache:
    """Keys and values of one layer, each [B, h, C, d]."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, positions: CachePositions) -> Tensor:
        """Store k and v, and apply attention of the new q, k, v [S, B, h, d] over all cached tokens -> [S, B, h, d]."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        self.key = _with(self.key, k, positions)
        self.value = _with(self.value, v, positions)
        with _backends(q.device):
            if positions.start == 0:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                key, value = (cached[:, :, : positions.end] for cached in (self.key, self.value))
                out = F.scaled_dot_product_attention(q.to(key.dtype), key, value, positions.mask).to(q.dtype)
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
        end = max(self.lengths)
        all_seen = start == 0 or (start is not None and count == 1)
        mask = None if all_seen else _mask(indices, end, _cached_dtype(device, dtype))
        return CachePositions(indices=indices, start=start, end=end, mask=mask)

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


def _cached_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return wide_dtype(dtype) if device.type == "cpu" else dtype


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


def _mask(indices: Tensor, end: int, dtype: torch.dtype) -> Tensor:
    """Build the mask of tokens at indices [S, B or 1] for attention over `end` positions; see CachePositions.

    As what is added to the scores, since torch would convert a boolean mask in every layer.
    """
    last = indices.t()[:, None, :, None]
    width = end + -end % _MASK_ALIGNMENT
    is_hidden = torch.arange(width, device=indices.device) > last
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=indices.device)
    return mask.masked_fill_(is_hidden, -torch.inf)[..., :end]


def _with(buffer: Tensor | None, new: Tensor, positions: CachePositions) -> Tensor:
    """Write new [B, h, S, d] into the buffer [B, h, C, d], which is reallocated if it is full."""
    if buffer is None or buffer.shape[2] < positions.end:
        capacity = max(_FIRST_CAPACITY, positions.end, 0 if buffer is None else 2 * buffer.shape[2])
        # zeros, not empty: masked positions are still multiplied by their weight of zero
        dtype = _cached_dtype(new.device, new.dtype)
        larger = new.new_zeros((*new.shape[:2], capacity, new.shape[3]), dtype=dtype)
        if buffer is not None:
            larger[:, :, : buffer.shape[2]] = buffer
        buffer = larger
    if positions.start is not None:
        buffer[:, :, positions.start : positions.end] = new
    else:
        samples = torch.arange(len(new), device=new.device)[:, None]
        buffer[samples, :, positions.indices.t()] = new.transpose(1, 2)
    return buffer
