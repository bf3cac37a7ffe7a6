"""The model class for lm-evaluation-harness: its arguments, blank contexts, repeated requests."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

from lm_eval.api.instance import Instance

from megatron_tf.config import ConfigError
from megatron_tf.errors import UserError
from megatron_tf.inference.lm_eval_model import MegatronTF
from tests.support.models import random_model, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint", random_model()))


@pytest.fixture(scope="module")
def model(checkpoint):
    return MegatronTF(checkpoint)


def request(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


@pytest.mark.parametrize("blanks", ["", " ", "  \n\t", "\n"])
def test_a_context_of_blanks_is_an_end_of_document(model, blanks):
    [(found, _)] = model.loglikelihood([request("loglikelihood", blanks, "two")])
    ids = torch.tensor([[256, *(blanks + "two").encode()]])
    with torch.no_grad():
        logits = torch.log_softmax(model._model(ids[:, :-1])[0].double(), -1)
    expected = logits.gather(-1, ids[0, 1:, None]).sum()
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_repeats_are_independent_samples_and_the_first_stays_as_it_was(model):
    options = {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
    repeated = [request("generate_until", "x", options) for _ in range(6)]
    torch.manual_seed(3)
    texts = model.generate_until([*repeated, request("generate_until", "y", options)])
    assert len(set(texts[:6])) == 6
    assert model.generate_until(repeated[:1]) == texts[:1]
    assert model.generate_until([request("generate_until", "y", options)]) == texts[6:]
    assert model.generate_until([*repeated, request("generate_until", "y", options)]) == texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": "RUN"}, "model_args has the unknown key 'pretrained': did you mean checkpoint?"),
        ({"checkpoint": "RUN", "max_lenght": 3}, "did you mean max_length?"),
        ({"checkpoint": "RUN", "zzz": 3}, "the keys are checkpoint, tokenizer_model, batch_size"),
        ({}, "model_args has no checkpoint: add checkpoint=DIR"),
        ({"checkpoint": "RUN", "dtype": "int8"}, "dtype is 'int8': choose from float32"),
        ({"checkpoint": "RUN", "max_length": "abc"}, "max_length is 'abc'"),
        ({"checkpoint": "RUN", "max_length": 1}, "max_length is 1: it must be 2 or more"),
        ({"checkpoint": "RUN", "max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"checkpoint": "RUN", "distributed_timeout_seconds": "x"}, "distributed_timeout_seconds is 'x'"),
        ({"checkpoint": "RUN", "tokenizer_model": ""}, "tokenizer_model is empty"),
    ],
)
def test_arguments_that_cannot_be_are_named(checkpoint, arguments, message):
    given = {key: checkpoint if value == "RUN" and key == "checkpoint" else value for key, value in arguments.items()}
    with pytest.raises(ConfigError) as caught:
        MegatronTF(**given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("bf16", torch.bfloat16), ("auto", torch.float32)]
)
def test_dtype_is_that_of_weights_and_activations(checkpoint, name, dtype):
    model = MegatronTF(checkpoint, dtype=name)
    assert {parameter.dtype for parameter in model._model.parameters()} == {dtype}
    assert model._model(torch.tensor([[1, 2]])).dtype == dtype
    [(found, _)] = model.loglikelihood([request("loglikelihood", "a", "b")])
    assert found < 0


def test_a_request_that_is_not_text_is_named(model):
    with pytest.raises(UserError, match=r"a request of the task: character 2 is .* which is not text"):
        model.loglikelihood([request("loglikelihood", "a", "\ud83d")])
