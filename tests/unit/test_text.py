"""From tokens to text as they come: characters of several bytes, stop strings, ends."""

import pytest

from megatron_tf.data.tokenizer import NullTokenizer
from megatron_tf.errors import UserError
from megatron_tf.inference.text import Continuation, Limits


def feed(text, limits, prompt="ask: "):
    """Add the text's bytes one at a time -> (pieces, the continuation)."""
    tokenizer = NullTokenizer()
    continuation = Continuation(tokenizer, list(prompt.encode()), limits)
    pieces = []
    for token in [*text.encode(), tokenizer.eod]:
        pieces.append(continuation.add(token))
        assert "".join(pieces) == continuation.text
        if continuation.finish_reason:
            break
    return pieces, continuation


def test_characters_come_whole():
    pieces, found = feed("a€é", Limits())
    assert pieces == ["a", "", "", "€", "", "é", ""]
    assert (found.text, found.finish_reason, found.num_tokens) == ("a€é", "eod", 6)


def test_an_incomplete_character_at_the_end_is_shown_as_one():
    assert feed("a€", Limits(max_new_tokens=3))[1].text == "a\ufffd"


@pytest.mark.parametrize(
    "text, stop, wanted",
    [
        ("one. two. three", ["."], "one"),
        ("one\n\ntwo", ["\n\n", "tw"], "one"),
        ("one two three", ["three", "two t"], "one "),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("prompt ends before", ["ask"], "prompt ends before"),
        ("€ and é", ["é"], "€ and "),
    ],
)
def test_stop_strings_end_the_text_before_them(text, stop, wanted):
    found = feed(text, Limits(stop=stop))[1]
    assert found.text == wanted
    assert found.finish_reason == ("eod" if wanted == text else "stop")


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
    assert feed("x stone", Limits(stop=["stop"]))[0] == ["x", " ", "", "", "", "ston", "e", ""]


def test_what_was_held_back_within_a_character_is_searched_for_stop_strings_at_the_end():
    class Whole(NullTokenizer):
        """Several bytes a token, as of byte-level BPE: the last one ends within a character."""

        def decode(self, ids):
            return b"".join([b"one ", b"STOP two \xe2"][i] for i in ids).decode(errors="replace")

    for limits, last in ((Limits(max_new_tokens=2, stop=["STOP"]), []), (Limits(stop=["STOP"]), [NullTokenizer.eod])):
        continuation = Continuation(Whole(), [], limits)
        for token in [0, 1, *last]:
            continuation.add(token)
        assert (continuation.text, continuation.finish_reason) == ("one ", "stop")


def test_length():
    found = feed("one two", Limits(max_new_tokens=3, stop=["e t"]))[1]
    assert (found.text, found.finish_reason, found.num_tokens) == ("one", "length", 3)


def test_limits_without_a_meaning_are_refused():
    with pytest.raises(UserError, match="max_new_tokens"):
        Limits(max_new_tokens=0)
    with pytest.raises(UserError, match="stop string is empty"):
        Limits(stop=["a", ""])
