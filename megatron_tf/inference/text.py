"""Text generation: incremental decoding of generated tokens, and stop conditions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import UserError
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.model import LanguageModel
from megatron_tf.inference.sampling import Sampling

_INCOMPLETE = "\ufffd"  # what decoders emit for a character with missing bytes


@dataclass(frozen=True)
class Limits:
    """The limits of a continuation, in addition to the end of the document."""

    max_new_tokens: int = 100
    stop: Sequence[str] = field(default_factory=tuple)
    """Strings before which a continuation is cut off."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens ({self.max_new_tokens}) must be 1 or more")
        if not all(self.stop):
            raise UserError("a stop string is empty: every text would end immediately")


class Continuation:
    """The generated text of one prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], limits: Limits) -> None:
        self.text = ""
        """The text so far that can no longer change."""
        self.num_tokens = 0
        """The number of generated tokens, without the end of document."""
        self.finish_reason: Literal["eod", "stop", "length"] | None = None
        self._tokenizer = tokenizer
        self._limits = limits
        self._ids = list(prompt)
        self._shown = (0, len(self._ids))
        """(start, shown): ids before `shown` are in the text; later ids are decoded with those from `start`."""
        self._held = ""

    def add(self, token: int) -> str:
        """Append a token; return what it adds to `text`, and set `finish_reason` if it is the last."""
        if token == self._tokenizer.eod:
            return self._end("eod")
        self._ids.append(token)
        self.num_tokens += 1
        self._held += self._decoded(is_last=False)
        if self._cut_at_stop():
            return self._show(len(self._held))
        if self.num_tokens == self._limits.max_new_tokens:
            return self._end("length")
        return self._show(len(self._held) - _start_of_stop(self._held, self._limits.stop))

    def _end(self, reason: Literal["eod", "length"]) -> str:
        self.finish_reason = reason
        self._held += self._decoded(is_last=True)
        self._cut_at_stop()  # text held back within a character has not been searched yet
        return self._show(len(self._held))

    def _cut_at_stop(self) -> bool:
        """Cut the text before the first stop string; return whether there is one."""
        found = [index for index in map(self._held.find, self._limits.stop) if index >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.finish_reason = "stop"
        return bool(found)

    def _show(self, count: int) -> str:
        piece, self._held = self._held[:count], self._held[count:]
        self.text += piece
        return piece

    def _decoded(self, is_last: bool) -> str:
        """Return the text of ids that are not in the text yet; empty while it ends within a character."""
        start, shown = self._shown
        before = self._tokenizer.decode(self._ids[start:shown])
        now = self._tokenizer.decode(self._ids[start:])
        if not is_last and now.endswith(_INCOMPLETE):
            return ""
        self._shown = shown, len(self._ids)
        return now[len(before) :]


def check_text(text: str, source: str) -> None:
    """Check that a text is valid Unicode, unlike one from bytes that are not UTF-8.

    Raises UserError, which names its `source`, if it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{source}: character {error.start + 1} is {text[error.start]!a}, which is not text: it must be valid UTF-8"
        ) from None


def continue_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    sampling: Sampling,
    limits: Limits,
    seed: int | Sequence[int] = 0,
) -> Iterator[tuple[int, str, Continuation]]:
    """Continue texts as `continue_ids` does. An empty prompt starts a document: after the end of another one."""
    ids = [row.tolist() or [tokenizer.eod] for row in tokenizer.encode_batch(prompts).rows()]
    return continue_ids(model, tokenizer, ids, sampling=sampling, limits=limits, seed=seed)


def continue_ids(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    limits: Limits,
    seed: int | Sequence[int] = 0,
) -> Iterator[tuple[int, str, Continuation]]:
    """Yield (index of the prompt, new text, its continuation) token by token, until all prompts are finished.

    `prompts` are ids, at least one in each. `seed` is one for all, so that equal prompts get equal texts, or one for
    each (see `seed_of_sample`).
    """
    texts = [Continuation(tokenizer, prompt, limits) for prompt in prompts]
    generation = Generation(model, prompts, sampling, seed=seed)
    while generation.active:
        for sample, token in generation.step().items():
            yield sample, texts[sample].add(token), texts[sample]
        generation.finish([sample for sample in generation.active if texts[sample].finish_reason])


def _start_of_stop(text: str, stop: Sequence[str]) -> int:
    """Return the number of characters at the end of the text that may be the start of a stop string."""
    longest = max(map(len, stop), default=1) - 1
    for length in range(min(len(text), longest), 0, -1):
        if any(each.startswith(text[-length:]) for each in stop):
            return length
    return 0
