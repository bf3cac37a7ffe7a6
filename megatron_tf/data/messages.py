"""Messages of chat data: OpenAI's {"role", "content"}, and ShareGPT's {"from", "value"}."""

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
"""Has a text under "role" and one under "content"; other keys are for the template."""

ASSISTANT = "assistant"
_ROLES = {"human": "user", "gpt": ASSISTANT}
"""ShareGPT's name of a role -> that of chat templates."""


class BadRowError(ValueError):
    """Raised for a row that holds no document; the message is the kind of bad row that it counts as."""


def messages_of(value: Any) -> list[Message]:
    """Return the messages of a conversation. Raises BadRowError if it is none."""
    if not isinstance(value, list) or not value:
        raise BadRowError("not a list of messages")
    return [_message(each) for each in value]


def is_answer(message: Message) -> bool:
    """Return whether a message is the assistant's."""
    return bool(message["role"] == ASSISTANT)


def _message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadRowError("a message is not an object")
    message = dict(value)
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message["role"] = _ROLES.get(role, role) if isinstance(role, str) else role
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise BadRowError(f"a message without a text as its {key}")
    return message
