"""Chat templates in the format of Hugging Face: conversations as text, and where its answers are."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.messages import BadRowError, Message, is_answer, messages_of

_MAX_REASON = 80  # characters of a template's own message

# Unicode noncharacters, which no text holds; the ends of an answer in what a template with generation marks renders
_START, _STOP = "\ufdd0answer\ufdd1", "\ufdd2answer\ufdd3"
_ENDS = re.compile(f"{_START}|{_STOP}")


class Conversation(NamedTuple):
    """A conversation as text."""

    text: str
    answers: Sequence[tuple[int, int]]
    """Start and stop of each answer, in characters."""
    ends_in_answer: bool
    """Whether the last message is an answer, which the end of the document is then part of."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, with the special tokens that it may name.

    Raises DataError if it is malformed. Templates are untrusted: they run in Jinja's sandbox.
    """

    text: str
    tokens: tuple[tuple[str, str], ...] = ()
    """(name, token), such as ("bos_token", "<s>")."""

    def __post_init__(self) -> None:
        try:
            _compiled(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is malformed in line {error.lineno}: {error.message}") from error

    @property
    def has_marks(self) -> bool:
        """Whether the template itself marks answers, by {% generation %}."""
        return re.search(r"{%-?\s*generation\s*-?%}", self.text) is not None

    def conversation(self, value: Any) -> Conversation:
        """Render a list of messages.

        Raises BadRowError for a value that is no conversation, has no answer, or that the template refuses, and
        DataError if the template does not tell where the answers are.
        """
        messages = messages_of(value)
        if not any(map(is_answer, messages)):
            raise BadRowError("no message of the assistant")
        text, marked = _without_marks(self._render(messages))
        answers = marked if self.has_marks else self._answers_by_prefix(messages, text)
        if not answers:
            raise BadRowError("the chat template marks no answer")
        return Conversation(text, answers, is_answer(messages[-1]))

    def _answers_by_prefix(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Find each answer as what it adds to the text: from the prompt for it to the next message."""
        answers = []
        for number, message in enumerate(messages):
            if not is_answer(message):
                continue
            prompt = self._render(messages[:number], prompts=True)
            answered = self._render(messages[: number + 1])
            if not (answered.startswith(prompt) and text.startswith(answered)):
                raise DataError(
                    f"the chat template renders message {number + 1} differently before its answer, or when other "
                    f"messages follow, so that answers can't be told from the rest: put {{% generation %}} and "
                    f"{{% endgeneration %}} around them in a copy of the template, and give it as --chat-template"
                )
            answers.append((len(prompt), len(answered)))
        return answers

    def _render(self, messages: Sequence[Message], prompts: bool = False) -> str:
        try:
            return _compiled(self.text).render(
                messages=[dict(message) for message in messages], add_generation_prompt=prompts, **dict(self.tokens)
            )
        except _RefusedError as error:
            raise BadRowError(f"the chat template refuses it: {str(error)[:_MAX_REASON]}") from error
        except Exception as error:  # a template can raise anything for messages that it was not written for
            raise BadRowError(f"the chat template fails with {type(error).__name__}") from error


class _RefusedError(Exception):
    """Raised by templates, through `raise_exception`."""


class _GenerationMarks(Extension):
    """{% generation %} ... {% endgeneration %}, the tag by which templates mark the answers."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> Node:
        """Compile a block into a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_STOP}"


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes characters for HTML


@cache
def _compiled(text: str) -> jinja2.Template:
    """Compile a template in the environment that templates of Hugging Face are written for.

    It has no `strftime_now`: the same conversations give the same text on any day.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(text)


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without marks, and the (start, stop) between each pair of them."""
    ends, removed = [], 0
    for mark in _ENDS.finditer(marked):
        ends.append(mark.start() - removed)
        removed += mark.end() - mark.start()
    return _ENDS.sub("", marked), list(zip(ends[::2], ends[1::2], strict=True))
