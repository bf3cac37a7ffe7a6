"""Conversations as token ids, with a loss mask that selects the answers."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_tf.data.chat_template import Conversation
from megatron_tf.data.encoded import Encoded
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.tokenizer import HFTokenizer, Tokenizer


def encode_conversations(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, eod: int | None
) -> tuple[Encoded, Encoded]:
    """Return the ids of each conversation, and for each id 1 if it is a target, else 0, as uint8.

    Targets are the tokens of which any character belongs to an answer. `eod` is appended unless the template ends the
    conversation with it; it is a target after an answer. Raises DataError for a tokenizer that does not give the
    characters of its tokens.
    """
    if not isinstance(tokenizer, HFTokenizer):
        raise DataError("--sft needs --tokenizer-type HFTokenizer, which tells the characters of each token")
    rows, masks = [], []
    encoded = tokenizer.encode_with_offsets([conversation.text for conversation in conversations])
    for conversation, (ids, offsets) in zip(conversations, encoded, strict=True):
        mask = _targets(offsets, conversation.answers)
        if eod is not None and (not len(ids) or ids[-1] != eod):
            ids = np.append(ids, eod)
            mask = np.append(mask, np.uint8(conversation.ends_in_answer))
        rows.append(ids)
        masks.append(mask)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return Encoded(np.concatenate(rows), lengths), Encoded(np.concatenate(masks), lengths)


def _targets(offsets: NDArray[np.int64], answers: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """Return which tokens, whose (start, stop) characters are `offsets` [tokens, 2], overlap with an answer."""
    starts, stops = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), dtype=np.uint8)
    for start, stop in answers:
        mask |= (starts < stop) & (stops > start)
    return mask
