"""Dropout whose masks follow from the seed, the sample and the place in the model, and not from what was drawn before.

So a resumed run and a layer that is computed again draw the same ones, with no state of a generator to keep.

| what is dropped | on each rank | mask |
|---|---|---|
| embedding, output of attention and ffn | [S, B, D], the same on every tensor-parallel rank | the same on every rank |
| the same under sequence parallelism | [s, B, D], part of the sequence | that part of the mask of one rank |
| weights of attention | [B, h / R, S, S], some of the heads | another on every rank |

Masks of hidden states do not depend on the layout, on devices of the same kind; those of attention depend on the
number of tensor-parallel ranks and on which samples are in a micro-batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_tf.parallel.collectives import group_rank, group_size
from megatron_tf.tokenformer.initial_values import stream_seed


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Rates, and what the masks of one layer and one micro-batch are drawn from."""

    hidden_rate: float
    attention_rate: float
    seed: int
    samples: tuple[int, ...] = ()
    """The number of each sample in the data of the run."""
    layer: int | None = None
    """None for the embedding."""

    def hidden(self, x: Tensor, branch: str, sequence_group: ProcessGroup | None) -> Tensor:
        """x [s, B, D] with elements dropped and the others scaled up; `sequence_group` shards the sequence, if any."""
        if not self.hidden_rate:
            return x
        length, start = x.shape[0] * group_size(sequence_group), x.shape[0] * group_rank(sequence_group)
        part = slice(start, start + x.shape[0])
        masks = [self._mask(x, branch, length=length, sample=sample)[part] for sample in self.samples]
        return x.masked_fill(torch.stack(masks, 1), 0.0) / (1.0 - self.hidden_rate)

    @contextmanager
    def attention(self, x: Tensor, group: ProcessGroup | None) -> Iterator[float]:
        """The rate for the weights of attention; torch's own generators are seeded for this rank's heads meanwhile."""
        if not self.attention_rate:
            yield 0.0
            return
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(stream_seed(self.seed, "attention dropout", self.layer, self.samples, group_rank(group)))
            yield self.attention_rate

    def _mask(self, x: Tensor, branch: str, *, length: int, sample: int) -> Tensor:
        """What is dropped of one sample: [S, D], of which a rank may need a part only."""
        generator = torch.Generator(x.device)
        generator.manual_seed(stream_seed(self.seed, "hidden dropout", self.layer, branch, sample))
        mask = torch.empty(length, x.shape[-1], dtype=torch.bool, device=x.device)
        return mask.bernoulli_(self.hidden_rate, generator=generator)
