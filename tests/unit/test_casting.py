"""Parameters are cast once a step, however many micro-batches it has, and nothing that is computed changes."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.layers.casting import CastingModule, keeping_casts
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step import step
from megatron_tf.training.step.state import build_state
from tests.support.training import random_batch, small_run, training_run

MESH = Mesh(torch.device("cpu"))
TRANSFORMER = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}


def run_of(model=(), **training):
    scale = {"loss_scale": 256} if training["precision"] == "fp16" else {}
    training = {"micro_batch_size": 4, **training}
    return small_run(model=dict(model), training=training, loss_scale=scale, kernels={"pattention": "eager"})


class Casts(TorchDispatchMode):
    """Counts casts of `parameters` to 16 bits."""

    def __init__(self, parameters):
        super().__init__()
        self.places = {parameter.data_ptr() for parameter in parameters}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten._to_copy and args[0].data_ptr() in self.places:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("model", "casts"), [((), 3 * 10 + 1), (TRANSFORMER, 3 * 6 + 1)], ids=["tokenformer", "mlp"])
def test_a_parameter_is_cast_once_a_step(model, casts, recompute):
    """Final norm's two vectors are not kept: they are cast in each micro-batch."""
    for micro_batch_size, micro_batches in ((4, 2), (1, 8)):
        config = run_of(model, precision="bf16", recompute_granularity=recompute, micro_batch_size=micro_batch_size)
        state = build_state(config, MESH)
        with Casts(list(state.model.parameters())) as seen:
            step.train_step(state, random_batch(config, 0, MESH), 1e-3)
        assert seen.count == casts + 2 * micro_batches


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_bit_of_a_run_changes(monkeypatch, precision, recompute):
    """Losses and norms of four steps, in which parameters change, and the gradients of the first."""
    config = run_of(precision=precision, recompute_granularity=recompute, micro_batch_size=2)
    curve, gradients = training_run(MESH, config, 4)
    monkeypatch.setattr(step, "keeping_casts", lambda model: nullcontext())
    expected_curve, expected = training_run(MESH, config, 4)
    assert curve == expected_curve
    assert gradients.keys() == expected.keys()
    assert all((gradients[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("untied", [False, True])
def test_casts_take_two_bytes_of_each_parameter_but_the_norms_and_an_untied_embedding(untied):
    """While they are kept; afterwards they take none."""
    config = run_of({"untie_embeddings_and_output_weights": untied}, precision="bf16")
    state = build_state(config, MESH)
    batches = step.micro_batches(state, random_batch(config, 0, MESH), is_bad=False)
    modules = [module for module in state.model.modules() if isinstance(module, CastingModule)]
    with keeping_casts(state.model):
        state.runner.train(batches, 64.0)
        found = sum(cast.untyped_storage().nbytes() for module in modules for cast in module._kept.values())
    sizes = {name: parameter.numel() for name, parameter in state.model.named_parameters()}
    left_out = ["final_norm.weight", "final_norm.bias", *(["embedding.weight"] if untied else [])]
    assert found == 2 * (sum(sizes.values()) - sum(map(sizes.get, left_out)))
    assert not any(module._kept for module in modules)


def test_a_cast_outside_follows_the_parameter():
    module = CastingModule()
    module.weight = torch.nn.Parameter(torch.ones(2))
    with keeping_casts(module):
        assert module.cast("weight", torch.bfloat16).tolist() == [1, 1]
    module.weight.data.fill_(2)
    assert module.cast("weight", torch.bfloat16).tolist() == [2, 2]
    with keeping_casts(module):
        assert module.cast("weight", torch.bfloat16).tolist() == [2, 2]
        assert module.cast("weight", torch.float64).dtype == torch.float64
        assert module.cast("weight", torch.float32) is module.weight


def test_gradients_of_uses_add_up_in_the_parameters_type():
    """256 + 1 is 256 in bfloat16."""
    module = CastingModule()
    module.weight = torch.nn.Parameter(torch.ones(1))
    with keeping_casts(module):
        (256 * module.cast("weight", torch.bfloat16)).sum().backward()
        module.cast("weight", torch.bfloat16).sum().backward()
    assert module.weight.grad.dtype == torch.float32
    assert module.weight.grad.item() == 257
