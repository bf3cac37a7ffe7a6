"""The base class of errors that a user can fix, as opposed to bugs."""


class UserError(Exception):
    """An error that a user can fix. A command reports it in one line, without a traceback.

    Base class of ConfigError, DataError, CheckpointError and the others of this package. Any other exception of a
    command is a bug and shows its traceback. An error without a message ends a command silently, because another rank
    has reported the cause.
    """

    exit_code = 1
    """Exit code of a command that ends with this error."""
