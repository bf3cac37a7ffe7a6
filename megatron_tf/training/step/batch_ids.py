"""Report the same out-of-vocabulary id on every rank, whichever rank's part of the batch holds it."""

from megatron_tf.data.bad_ids import describe_bad_id, first_bad_id
from megatron_tf.data.batch import Batch
from megatron_tf.data.blend import Samples
from megatron_tf.parallel.mesh import Mesh


def bad_id_of_batch(batch: Batch, dataset: Samples, *, vocab_size: int, mesh: Mesh) -> str | None:
    """Describe the first out-of-vocabulary id of a global batch, or return None if there is none. Collective.

    `batch` is this rank's part of the global batch, made of samples of `dataset`. Returns the same on every rank.
    """
    found = mesh.gather(_first_of_rank(batch, dataset, vocab_size))
    bad = min((each for each in found if each is not None), default=None)
    return None if bad is None else str(bad[1])


def _first_of_rank(batch: Batch, dataset: Samples, vocab_size: int) -> tuple[int, str] | None:
    """Return (sample number, description) of the first bad id in this rank's part."""
    ids = batch.ids.flatten()
    bad = first_bad_id(ids.numpy(), vocab_size)
    if bad is None:
        return None
    row, position = divmod(bad, batch.ids.shape[-1])
    sample = int(batch.sample_numbers.flatten()[row])
    return sample, describe_bad_id(int(ids[bad]), vocab_size, dataset.place(sample, position))
