"""What is wrong with a checkpoint."""

from megatron_tf.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that is not there, damaged, or of something else: the message names the file or tensor."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was written: another one may be sound."""


class FormatVersionError(CheckpointError):
    """A checkpoint that another version of this program wrote."""
