"""Keys and values that attention layers have seen of a batch, whose samples may differ in length.

Shapes: B samples, S new tokens of each, h heads of this rank, d head_dim, C positions that have memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_FIRST_CAPACITY = 128  # positions; doubled whenever they are full


@dataclass(frozen=True, kw_only=True)
class CachePositions:
    """Where the new tokens of one step go, and what they see: every token at their own position or before it."""

    indices: Tensor
    """[S, B], or [S, 1] where all samples have the same length."""
    start: int | None
    """The first new position, where that is the same in all samples."""
    end: int
    """Positions that are in use after the step, in the longest sample."""
    mask: Tensor | None
    """[B or 1, 1, S, end], true where a key is seen; None where all are, or where nothing came before."""


class LayerCache:
    """Keys and values of one layer, each [B, h, C, d]."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, positions: CachePositions) -> Tensor:
        """Attention of new q, k, v [S, B, h, d] over all that came before -> [S, B, h, d]; k and v are kept."""
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        self.key = _with(self.key, k, positions)
        self.value = _with(self.value, v, positions)
        key = self.key[:, :, : positions.end]
        value = self.value[:, :, : positions.end]
        is_causal = positions.start == 0
        return F.scaled_dot_product_attention(q, key, value, positions.mask, is_causal=is_causal).permute(2, 0, 1, 3)


class KeyValueCache:
    """What all layers of a model have seen of a batch; the first lengths[b] positions of sample b count.

    A cache is made empty for a batch and grows with each call of the model that it is given to.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]
        self.lengths: list[int] | None = None

    def extend(self, batch: int, count: int, device: torch.device) -> CachePositions:
        """Positions for `count` more tokens of every sample, which count from now on."""
        lengths = self.lengths or [0] * batch
        assert len(lengths) == batch, f"the cache is of {len(lengths)} samples, not {batch}"
        self.lengths = [length + count for length in lengths]
        end = max(self.lengths)
        is_even = min(lengths) == max(lengths)
        past = torch.tensor(lengths[:1] if is_even else lengths, device=device)
        indices = past + torch.arange(count, device=device)[:, None]
        all_seen = is_even and (count == 1 or lengths[0] == 0)
        mask = None if all_seen else torch.arange(end, device=device) <= indices.t()[:, None, :, None]
        return CachePositions(indices=indices, start=lengths[0] if is_even else None, end=end, mask=mask)

    def keep(self, lengths: Sequence[int]) -> None:
        """Forget what is stored beyond each sample's length, such as padding."""
        self.lengths = list(lengths)

    def select(self, samples: Sequence[int]) -> None:
        """Keep only these samples, in this order."""
        assert self.lengths is not None
        self.lengths = [self.lengths[i] for i in samples]
        for layer in self.layers:
            if layer.key is not None and layer.value is not None:
                index = torch.tensor(samples, dtype=torch.int64, device=layer.key.device)
                layer.key, layer.value = layer.key[index], layer.value[index]


def _with(buffer: Tensor | None, new: Tensor, positions: CachePositions) -> Tensor:
    """The buffer [B, h, C, d], larger where it was full, with new [B, h, S, d] in it."""
    if buffer is None or buffer.shape[2] < positions.end:
        capacity = max(_FIRST_CAPACITY, positions.end, 0 if buffer is None else 2 * buffer.shape[2])
        # zeros: a position that is masked is still multiplied by its weight of zero
        larger = new.new_zeros((*new.shape[:2], capacity, new.shape[3]))
        if buffer is not None:
            larger[:, :, : buffer.shape[2]] = buffer
        buffer = larger
    if positions.start is not None:
        buffer[:, :, positions.start : positions.end] = new
    else:
        samples = torch.arange(len(new), device=new.device)[:, None]
        buffer[samples, :, positions.indices.t()] = new.transpose(1, 2)
    return buffer
