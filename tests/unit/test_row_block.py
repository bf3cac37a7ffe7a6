"""A block in one call against its modules, and when it is left to them."""

import copy

import pytest
import torch

from megatron_tf.inference.generation import Generation
from megatron_tf.inference.sampling import Sampling
from megatron_tf.layers.cache import KeyValueCache
from megatron_tf.model import tokenformer
from megatron_tf.model.decoding import decode
from tests.support.models import random_model
from tests.support.training import PLAIN

NORMS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]
# lengths of prompts, also equal ones, whose samples share positions; numbers of tokens that come together after them
CALLS = [([9], [1, 1]), ([5, 130], [1, 3]), ([1, 2, 3], [2, 1]), ([200], [8]), ([6, 6], [2, 3])]
NAMES = ["", "attention", "attention.query", "attention.proj", "attention_norm", "ffn_norm", "ffn"]


def modules_only(*args, **kwargs):
    return None


def hidden_states(model, lengths, counts):
    """Hidden states of the tokens after prompts of these lengths."""
    ids = torch.randint(257, (len(lengths), max(lengths) + sum(counts)), generator=torch.Generator().manual_seed(1))
    cache, found = KeyValueCache(model.config.num_layers), []
    prompts, *rest = ids.split([max(lengths), *counts], 1)
    model.hidden_states(prompts, cache)
    cache.keep(lengths)
    for tokens in rest:
        found.append(model.hidden_states(tokens, cache))
    return torch.cat(found, 1)


def arranged(dtype, **keys):
    model = random_model(**keys).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    model.arrange_for_decoding()
    return model


# times the error of the modules: in fp32 the exponential of the C++ code counts, which is within 2e-7
@pytest.mark.parametrize(
    ("dtype", "times", "error"), [(torch.float32, 3.0, 5e-6), (torch.bfloat16, 1.5, 0.05)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("rotary_percent", [0.25, 1.0])
@pytest.mark.parametrize(("lengths", "counts"), CALLS)
@torch.no_grad()
def test_a_block_in_one_call_is_as_near_to_float64_as_its_modules(
    dtype, times, error, norm, rotary_percent, lengths, counts, monkeypatch
):
    model, decoded = arranged(dtype, norm_activation=norm, rotary_percent=rotary_percent), []

    def counted(*args, **kwargs):
        decoded.append(decode(*args, **kwargs))
        return decoded[-1]

    monkeypatch.setattr(tokenformer, "decode", counted)
    found = hidden_states(model, lengths, counts)
    assert all(states is not None for states in decoded[-len(counts) * model.config.num_layers :])
    monkeypatch.setattr(tokenformer, "decode", modules_only)
    of_modules = hidden_states(model, lengths, counts)
    exact = hidden_states(copy.deepcopy(model).double(), lengths, counts)
    errors = [float((states.double() - exact).norm() / exact.norm()) for states in (found, of_modules)]
    assert errors[0] <= times * errors[1]
    assert errors[0] <= error


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_its_modules_still_run(name):
    model = arranged(torch.float32)
    seen, module = [], model.transformer.layers["0"].get_submodule(name)
    generation = Generation(model, [[3, 1, 4]], Sampling(temperature=0))
    expected = [generation.step() for _ in range(3)]
    module.register_forward_hook(lambda *args: seen.append(name))
    generation = Generation(model, [[3, 1, 4]], Sampling(temperature=0))
    assert [generation.step() for _ in range(3)] == expected
    assert seen == [name] * 3


def call(model, x, **keys):
    """Call the first block."""
    cache = KeyValueCache(1)
    positions = cache.extend(x.shape[1], x.shape[0], device=x.device, dtype=x.dtype)
    rotary = model.transformer._rotary(x, positions, None)
    return decode(model.transformer.layers["0"], x, rotary, cache=cache.layers[0], positions=positions)


def test_what_it_can_not_compute_is_left_to_the_modules():
    model, x = arranged(torch.float32), torch.randn(2, 3, 32)
    assert call(model, x) is None  # a gradient is needed
    with torch.no_grad():
        assert call(model, x) is not None
        assert call(model, x.repeat(6, 1, 1)) is None
        assert call(model, x.bfloat16()) is None
        assert call(model, x.repeat(1, 1, 2)[..., ::2]) is None
        assert call(random_model(), x) is None  # values are not arranged
        assert call(random_model(**PLAIN), x) is None
        model.transformer.layers["0"].ffn_norm.normalize = model.transformer.layers["0"].attention_norm.normalize = max
        assert call(model, x) is None
