"""Exceptions for unusable checkpoints."""

from megatron_tf.errors import UserError


class CheckpointError(UserError):
    """Raised for a checkpoint that is missing, damaged or of another model; the message names the file or tensor."""


class DamagedCheckpointError(CheckpointError):
    """Raised for a checkpoint whose files changed since they were written; an older one may be intact."""


class FormatVersionError(CheckpointError):
    """Raised for a checkpoint in the format of another version of this program."""
