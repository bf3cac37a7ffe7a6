"""Whether a checkpoint that was written holds what it should."""

from collections.abc import Callable
from pathlib import Path

from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint, read_blocks
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differing_values
from megatron_tf.errors import UserError


class VerificationError(UserError):
    """The new checkpoint is there and is not what it should be."""

    exit_code = 3


def compare_tensors(
    expected: Checkpoint, path: Path, progress: Callable[[int], object] = lambda num_bytes: None
) -> None:
    """Raise VerificationError unless the checkpoint at `path` is sound and holds what was `expected`, bit for bit.

    `progress` takes the bytes compared since it was called before.
    """
    found = CheckpointReader(path, check_at_end=True)
    for group in expected.groups():
        for name in expected.names(group):
            rows = expected.shape(group, name)[0]
            sides = (read_blocks(checkpoint, group, name, stop=rows) for checkpoint in (expected, found))
            for wanted, have in zip(*sides, strict=True):
                if differing_values(wanted, have):  # by their bytes: a NaN equals the same NaN
                    raise VerificationError(f"{path}: {group} {name} is not what it should be")
                progress(have.nbytes)
    if found.record != expected.record:
        raise VerificationError(f"{path}: its metadata is not what it should be")
    try:
        found.verify()
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
