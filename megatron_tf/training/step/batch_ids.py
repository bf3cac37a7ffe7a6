"""A batch with an id that the vocabulary has not: found by one rank, told alike by all."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_tf.data.bad_ids import describe_bad_id, first_bad_id
from megatron_tf.data.loader import BatchLoader, sample_numbers
from megatron_tf.parallel.mesh import Mesh


def bad_id_of_batch(loader: BatchLoader, batch: Tensor, first: int, vocab_size: int, mesh: Mesh) -> str | None:
    """Where the first bad id of a global batch is; None where there is none. Every rank calls it and gets the same.

    `batch` [count, B, S + 1] is this rank's part of the global batch that begins at sample `first`.
    """
    found: list[Any] = [_first_of_rank(loader, batch, first, vocab_size)]
    if mesh.world is not None:
        mine, found = found[0], [None] * mesh.world.size()
        dist.all_gather_object(found, mine, group=mesh.world)
    bad = min((each for each in found if each is not None), default=None)
    return None if bad is None else str(bad[1])


def _first_of_rank(loader: BatchLoader, batch: Tensor, first: int, vocab_size: int) -> tuple[int, str] | None:
    """(sample, what is wrong with it) of the first bad id in this rank's part."""
    count, size, length = batch.shape
    bad = first_bad_id(batch.numpy().ravel(), vocab_size)
    if bad is None:
        return None
    numbers = sample_numbers(first, count * size * loader.replicas, size, loader.replica, loader.replicas)
    row, position = divmod(bad, length)
    sample = int(numbers.ravel()[row])
    value = int(batch.flatten()[bad])
    return sample, describe_bad_id(value, vocab_size, *loader.dataset.place(sample, position))
