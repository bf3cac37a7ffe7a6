"""What a user can fix, told from our own bugs."""


class UserError(Exception):
    """Says what a user can fix: a command ends with it as one line, without a traceback.

    Base of ConfigError, DataError, CheckpointError and the others of this package. Whatever else a command raises is a
    bug of ours and shows where it was raised. An error without a message ends a command silently: another rank has
    said why.
    """

    exit_code = 1
    """Of the command that ends with it."""
