"""training.precision fp64 on one process: against formulas in float64, from the values of an fp32 run."""

import pytest
import torch

from megatron_tf.errors import UserError
from megatron_tf.kernels import adapters
from megatron_tf.kernels.dispatch import choose_kernels
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, forward_backward, train_step
from tests.support import textbook
from tests.support.training import PLAIN, STRONG, random_batch, small_run

ONE_PROCESS = Mesh(torch.device("cpu"))
FP64 = {"precision": "fp64", "micro_batch_size": 2}
STEPS = 5
MODELS = {
    "l2_norm_gelu": {"norm_activation": "l2_norm_gelu"},
    "gelu_l2_norm": {"norm_activation": "gelu_l2_norm"},
    "softmax": {"norm_activation": "softmax"},
    "transformer": PLAIN,
    "rmsnorm": {**PLAIN, "norm": "rmsnorm"},
    "swiglu": {**PLAIN, "mlp": "swiglu"},
    "qk_norm": {**PLAIN, "mlp": "swiglu", "qk_norm": True},
    "strong": STRONG,
}


def ids_of(batch):
    return batch.ids.flatten(0, 1).long()


def textbook_run(config):
    """(loss and gradient norm of each step, final parameters) by plain formulas, autograd and torch's AdamW."""
    parameters = textbook.initial_parameters(config)
    optimizer = torch.optim.AdamW(
        textbook.decay_groups(parameters, config.optimizer.weight_decay),
        lr=config.optimizer.lr,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
        foreach=False,
    )
    curve = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = textbook.mean_loss(config.model, parameters, ids_of(random_batch(config, step, ONE_PROCESS)))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.optimizer.clip_grad)
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, parameters


CLIP_GRAD = {
    "l2_norm_gelu": 1.02,
    "gelu_l2_norm": 1.34,
    "softmax": 0.485,
    "transformer": 1.1,
    "rmsnorm": 1.1,
    "swiglu": 0.95,
    "qk_norm": 1.18,
    "strong": 1.2,
}
"""Between the gradient norms of the five steps."""


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("model", MODELS)
def test_five_steps_are_those_of_the_formulas_in_float64(model, untied):
    keys = {**MODELS[model], "untie_embeddings_and_output_weights": untied, "rotary_percent": 0.5}
    config = small_run(model=keys, training=FP64, optimizer={"clip_grad": CLIP_GRAD[model]})
    expected, parameters = textbook_run(config)
    assert {norm > CLIP_GRAD[model] for _, norm in expected} == {False, True}, "only some steps are clipped"
    state = build_state(config, ONE_PROCESS)
    for step, (loss, norm) in enumerate(expected):
        batch = random_batch(config, step, ONE_PROCESS)
        assert evaluation_loss(state, batch) == pytest.approx(loss, rel=1e-12)
        result = train_step(state, batch, config.optimizer.lr)
        assert result.loss == pytest.approx(loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(norm, rel=1e-12)
    for shard in state.shards:
        wanted = parameters[shard.name].detach()
        assert (shard.tensor - wanted).abs().max() <= 1e-12 * wanted.abs().max(), shard.name


def test_every_tensor_of_the_state_is_float64():
    state = build_state(small_run(training=FP64), ONE_PROCESS)
    loss = forward_backward(state, random_batch(small_run(training=FP64), 0, ONE_PROCESS))
    assert loss.dtype == torch.float64
    for shard, parameter in zip(state.shards, state.model.parameters(), strict=True):
        assert shard.tensor.dtype == parameter.grad.dtype == torch.float64, shard.name
    for moment in ("exp_avg", "exp_avg_sq"):
        assert {shard.tensor.dtype for shard in state.optimizer.moments(moment)} == {torch.float64}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_run_starts_from_the_values_of_an_fp32_run(model):
    narrow, wide = (
        build_state(small_run(model=dict(model), training={"precision": precision}), ONE_PROCESS).shards
        for precision in ("fp32", "fp64")
    )
    for shard, other in zip(narrow, wide, strict=True):
        assert (shard.tensor.dtype, other.tensor.dtype) == (torch.float32, torch.float64)
        assert torch.equal(shard.tensor.double(), other.tensor), shard.name


AUTO = dict.fromkeys(("pattention", "attention", "norm", "optimizer"), "auto")


def test_auto_selects_kernels_that_compute_in_fp64(monkeypatch):
    monkeypatch.setattr(adapters, "is_installed", lambda package: True)
    kernels = choose_kernels(AUTO, torch.device("cuda"), torch.float64)
    assert kernels.taken == "pattention eager, attention sdpa, norm torch, optimizer torch"
    assert kernels.loss.name == "eager"


@pytest.mark.parametrize(
    ("key", "name", "instead"),
    [
        ("pattention", "triton", "eager or compiled"),
        ("attention", "flash_attn", "sdpa"),
        ("attention", "transformer_engine", "sdpa"),
        ("norm", "apex", "torch"),
        ("norm", "transformer_engine", "torch"),
        ("optimizer", "apex", "torch"),
        ("optimizer", "transformer_engine", "torch"),
    ],
)
def test_a_requested_kernel_that_does_not_compute_in_fp64_is_refused(key, name, instead):
    config = small_run(training=FP64, kernels={key: name})
    with pytest.raises(UserError) as caught:
        build_state(config, ONE_PROCESS)
    assert str(caught.value) == f"kernels.{key}={name} does not compute in training.precision=fp64: choose {instead}"
