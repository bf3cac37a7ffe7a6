"""A batch with an id that the vocabulary has not: found by one rank, told alike by all."""

from megatron_tf.data.bad_ids import describe_bad_id, first_bad_id
from megatron_tf.data.batch import Batch
from megatron_tf.data.blend import Samples
from megatron_tf.parallel.mesh import Mesh


def bad_id_of_batch(batch: Batch, dataset: Samples, *, vocab_size: int, mesh: Mesh) -> str | None:
    """Where the first bad id of a global batch is; None where there is none. Every rank calls it and gets the same.

    `batch` is this rank's part of the global batch, of samples of `dataset`.
    """
    found = mesh.gather(_first_of_rank(batch, dataset, vocab_size))
    bad = min((each for each in found if each is not None), default=None)
    return None if bad is None else str(bad[1])


def _first_of_rank(batch: Batch, dataset: Samples, vocab_size: int) -> tuple[int, str] | None:
    """(sample, what is wrong with it) of the first bad id in this rank's part."""
    ids = batch.ids.flatten()
    bad = first_bad_id(ids.numpy(), vocab_size)
    if bad is None:
        return None
    row, position = divmod(bad, batch.ids.shape[-1])
    sample = int(batch.sample_numbers.flatten()[row])
    return sample, describe_bad_id(int(ids[bad]), vocab_size, dataset.place(sample, position))
