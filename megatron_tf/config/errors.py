"""The exception for invalid configurations."""

from megatron_tf.errors import UserError


class ConfigError(UserError, ValueError):
    """Raised for an invalid configuration. The message names the key and says how to fix it.

    It is also a ValueError because validators raise it: pydantic only collects those, and adds the key to them.
    """
