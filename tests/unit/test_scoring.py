"""Scores of continuations and windows against the plain model, one text at a time."""

import random

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.inference.model import load_model
from megatron_tf.inference.scoring import Request, rolling_windows, score
from tests.support.models import random_model, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of bytes, untrained."""
    return load_model(write_checkpoint(tmp_path_factory.mktemp("model"), random_model()))


@torch.no_grad()
def plain_score(model, request):
    """Token by token, each from a call of its own."""
    total, is_greedy = 0.0, True
    for i in range(len(request.ids) - request.num_scored, len(request.ids)):
        logits = model(torch.tensor([request.ids[:i]]))[0, -1]
        total += float(torch.log_softmax(logits, -1)[request.ids[i]])
        is_greedy &= int(logits[:257].argmax()) == request.ids[i]
    return total, is_greedy


def requests_of(model, count):
    """Of all lengths; half of them end as the model would."""
    generator = random.Random(1)
    for number in range(count):
        ids = [generator.randrange(257) for _ in range(generator.randint(1, 20))]
        num_scored = generator.randint(1, 5)
        for _ in range(num_scored):
            logits = model(torch.tensor([ids]))[0, -1, :257]
            ids.append(int(logits.argmax()) if number % 2 else generator.randrange(257))
        yield Request(ids, num_scored)


@pytest.mark.parametrize("logits", [1, 1000, 1 << 26], ids=lambda count: f"{count} logits at a time")
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_scores_are_those_of_the_plain_model(model, batch_size, logits, monkeypatch):
    monkeypatch.setattr("megatron_tf.inference.scoring._LOGITS", logits)
    requests = list(requests_of(model, 21))
    scores = dict(score(model, requests, batch_size))
    assert sorted(scores) == list(range(21))
    for i, request in enumerate(requests):
        expected, is_greedy = plain_score(model, request)
        assert scores[i].log_likelihood == pytest.approx(expected, abs=2e-4)
        assert scores[i].is_greedy == is_greedy
    assert {found.is_greedy for found in scores.values()} == {True, False}


@pytest.mark.parametrize("length", [1, 2, 5, 6, 11, 23, 24])
@pytest.mark.parametrize("window, stride", [(1, 1), (5, 5), (5, 2), (5, 1), (30, 30)])
def test_windows_score_each_id_once(length, window, stride):
    ids, first = list(range(length)), 1
    for request in rolling_windows(ids, window=window, stride=stride):
        last = request.ids[-1]
        assert list(request.ids) == ids[max(0, last - window) : last + 1]
        assert last + 1 - request.num_scored == first
        assert first == 1 or request.num_scored <= stride
        first = last + 1
    assert first == length


@pytest.mark.parametrize("length", [2, 6, 7, 24])
def test_windows_are_those_of_lm_eval(length):
    utils = pytest.importorskip("lm_eval.utils")
    pairs = utils.get_rolling_token_windows(list(range(1, length)), 0, 6, 1)
    expected = [utils.make_disjoint_window(pair) for pair in pairs]
    found = [
        (w.ids[: len(w.ids) - w.num_scored], w.ids[-w.num_scored :])
        for w in rolling_windows(range(length), window=6, stride=6)
    ]
    assert [(list(context), list(scored)) for context, scored in found] == expected


def test_windows_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="windows of 4 tokens can't move by 5"):
        list(rolling_windows([1, 2, 3], window=4, stride=5))
