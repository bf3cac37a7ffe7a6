"""What each parameter token or hidden unit contributes, against its definition in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_tf.model.contributions import observe_modules, unit_contributions
from tests.support.grown import PLAIN
from tests.support.models import random_model
from tests.support.training import STRONG


@pytest.fixture
def samples():
    ids = np.random.default_rng(0).integers(0, 257, (5, 17))
    return list(torch.from_numpy(ids))


def inputs_of(model, path, samples):
    """The inputs of a module over all positions, [T, D] in float64."""
    found = []
    module = model.transformer.get_submodule(path)
    with torch.no_grad(), module.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0])):
        for ids in samples:
            model(ids[None])
    return torch.cat([x.flatten(0, -2) for x in found]).double()


def weights_of(norm, scores, tau):
    if norm == "l2_norm_gelu":
        return F.gelu(tau * scores / scores.norm(dim=-1, keepdim=True))
    if norm == "gelu_l2_norm":
        return tau * F.gelu(scores) / F.gelu(scores).norm(dim=-1, keepdim=True)
    return tau * torch.softmax(scores, -1)


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("path", ["layers.0.attention.key", "layers.1.attention.proj", "layers.2.ffn"])
def test_a_token_contributes_the_norm_of_its_weight_times_its_value(norm, path, samples):
    model = random_model(norm_activation=norm)
    module = model.transformer.get_submodule(path)
    keys, values = module.key_tokens.detach().double(), module.value_tokens.detach().double()
    weights = weights_of(norm, inputs_of(model, path, samples) @ keys.T, module.tau)
    expected = [float((weights[:, j, None] * values[j]).norm()) for j in range(len(keys))]
    found = unit_contributions(model.transformer, samples)[path]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("keys", [PLAIN, STRONG], ids=["gelu", "swiglu"])
def test_a_hidden_unit_contributes_the_norm_of_its_activation_times_its_row(keys, samples):
    model = random_model(**keys)
    contributions = unit_contributions(model.transformer, samples)
    assert list(contributions) == [f"layers.{i}.ffn" for i in range(3)]
    module = model.transformer.get_submodule("layers.1.ffn")
    up, down = module.up.weight.detach().double(), module.down.weight.detach().double()
    x = inputs_of(model, "layers.1.ffn", samples)
    hidden = F.gelu(x @ up.T) if keys is PLAIN else F.silu(x @ module.gate.weight.detach().double().T) * (x @ up.T)
    expected = [float((hidden[:, j, None] * down[j]).norm()) for j in range(len(up))]
    assert contributions["layers.1.ffn"].tolist() == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_no_bit_depends_on_the_number_of_threads(samples):
    model = random_model()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(unit_contributions(model.transformer, samples))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for path, one in found[0].items():
        assert torch.equal(one, found[1][path]), path


def test_every_operation_of_a_sample_runs_on_one_thread(samples):
    threads = set()

    def observe(path, module, x):
        threads.add(torch.get_num_threads())

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        list(observe_modules(random_model().transformer, samples, observe))
    finally:
        torch.set_num_threads(before)
    assert threads == {1}


def test_samples_are_kept_apart_and_in_order(samples):
    model = random_model()
    found = list(observe_modules(model.transformer, samples, lambda path, module, x: x.flatten(0, -2).double()))
    together = torch.cat([sample["layers.2.ffn"] for sample in found])
    assert torch.equal(together, inputs_of(model, "layers.2.ffn", samples))
    assert not model.transformer.get_submodule("layers.2.ffn")._forward_pre_hooks
