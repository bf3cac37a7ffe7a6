"""Finds the chat template of a tokenizer."""

import json
from pathlib import Path
from typing import Any

from megatron_tf.data.chat_template import ChatTemplate
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.tokenizer_files import NAMING_FILES

CHATML = "chatml"
"""Name of the built-in template, in the format of ChatML."""
_CHATML = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>\\n' }}{% endgeneration %}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
_OWN_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


def read_chat_template(tokenizer_model: Path, given: str | None) -> ChatTemplate:
    """Read the template that a path or the name of the built-in one `given` selects, or else the tokenizer's own.

    That is chat_template.jinja next to the tokenizer, or the chat_template of its tokenizer_config.json. Raises
    DataError if there is none, or it is malformed.
    """
    folder = tokenizer_model.parent
    source, text = _text(folder, given)
    try:
        return ChatTemplate(text, tuple(sorted(_special_tokens(folder).items())))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _text(folder: Path, given: str | None) -> tuple[str, str]:
    """Return (name of the source, template)."""
    if given == CHATML:
        return "the built-in template", _CHATML
    path = folder / _OWN_FILE if given is None else Path(given)
    if path.is_file():
        return str(path), path.read_text(encoding="utf-8")
    if given is not None:
        raise DataError(f"--chat-template: there is no file {path}: give a file, or {CHATML} for the built-in template")
    template = _read(folder / _CONFIG).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if isinstance(template, str):
        return str(folder / _CONFIG), template
    raise DataError(
        f"the tokenizer in {folder} has no chat template, neither in {_OWN_FILE} nor in {_CONFIG}: give one as "
        f"--chat-template FILE, or --chat-template {CHATML} for the built-in one"
    )


def _special_tokens(folder: Path) -> dict[str, str]:
    """Return the special tokens that a tokenizer's files name, such as bos_token; the first file wins."""
    tokens: dict[str, str] = {}
    for name in NAMING_FILES:
        for key, token in _read(folder / name).items():
            value = token.get("content") if isinstance(token, dict) else token  # a dict is an AddedToken
            if key.endswith("_token") and isinstance(value, str):
                tokens.setdefault(key, value)
    return tokens


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): fix it, or move the tokenizer away") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object: fix it, or move the tokenizer away")
    return content
