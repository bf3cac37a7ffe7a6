"""The error of a configuration."""

from megatron_tf.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration a user can fix: the message says where and how.

    It is a ValueError too because validators raise it: pydantic collects no other errors, and adds the key.
    """
