"""The exception for invalid configurations."""

from collections.abc import Mapping
from typing import Any

from megatron_tf.errors import UserError


class ConfigError(UserError, ValueError):
    """Raised for an invalid configuration. The message names the key and says how to fix it.

    It is also a ValueError because validators raise it: pydantic only collects those, and adds the key to them.
    """


def message_of(fault: Mapping[str, Any]) -> str:
    """Return the message of a fault that pydantic found, with the key and its value unless our own check names them."""
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "value_error" or not fault["loc"]:
        return message
    return f"{'.'.join(map(str, fault['loc']))}={fault['input']}: {message}"
