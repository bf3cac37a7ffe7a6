"""GrownAdamW against torch's AdamW, and against textbook AdamW with counts of each generation, in float64."""

import copy
import io

import pytest
import torch

import megatron_tf
from megatron_tf.checkpoint.generations import Run
from megatron_tf.checkpoint.json_object import CheckpointError
from megatron_tf.errors import UserError
from megatron_tf.modules.adamw import MOMENTS, RUNS
from tests.support.textbook_adamw import BETAS, DECAY, EPS, GENERATIONS, textbook

OPTIONS = {"betas": BETAS, "eps": EPS, "weight_decay": DECAY}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameters_like(start):
    return [torch.nn.Parameter(value.clone()) for value in start]


def steps_of(optimizer, parameters, gradients):
    for values in gradients:
        for parameter, gradient in zip(parameters, values, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_without_generations_it_is_adamw_to_the_bit(how, dtype):
    start = [value.to(dtype) for value in (draw(5, 3), draw(4), draw(()))]
    gradients = [(draw(5, 3, seed=i), draw(4, seed=i), draw((), seed=i)) for i in range(1, 7)]
    results = []
    for kind in (torch.optim.AdamW, megatron_tf.GrownAdamW):
        parameters = parameters_like(start)
        groups = [{"params": parameters[:2], "lr": 0.02}, {"params": parameters[2:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.01, **OPTIONS, **how)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for values in gradients:
            steps_of(optimizer, parameters, [values])
            scheduler.step()
        results.append([*parameters, *(optimizer.state[p][key] for p in parameters for key in ("step", *MOMENTS))])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_parameter_without_a_gradient_is_not_counted():
    parameters = parameters_like([draw(4, 3), draw(4, 3)])
    optimizer = megatron_tf.GrownAdamW(parameters, lr=0.01)
    for parameter in parameters:
        optimizer.state[parameter] = state_of(draw(4, 3), draw(4, 3).abs(), [Run(4, GENERATIONS["new"])])
    parameters[0].grad = draw(4, 3)
    optimizer.step()
    assert [optimizer.runs(p)[0].generation.exp_avg_steps for p in parameters] == [1, 0]


def state_of(first, second, runs):
    return {"step": torch.tensor(0.0), "exp_avg": first.clone(), "exp_avg_sq": second.clone(), RUNS: tuple(runs)}


def runs_of_every_kind():
    """Each generation has another number of rows."""
    return [Run(count, generation) for count, generation in enumerate(GENERATIONS.values(), 1)]


@pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}])
def test_rows_of_each_generation_follow_textbook_adamw(how):
    runs, steps = runs_of_every_kind(), 6
    rows = sum(run.count for run in runs)
    start, gradients = draw(rows, 3), draw(steps, rows, 3, seed=1)
    first, second = 0.1 * draw(rows, 3, seed=2), 0.01 * draw(rows, 3, seed=3).abs()
    rates = [0.01, 0.02, 0.03, 0.02, 0.01, 0.005]
    (parameter,) = parameters_like([start])
    optimizer = megatron_tf.GrownAdamW([parameter], lr=1.0, **OPTIONS, **how)
    optimizer.state[parameter] = state_of(first, second, runs)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        steps_of(optimizer, [parameter], [(gradient,)])
    parts = torch.arange(rows).split([run.count for run in runs])
    expected = [
        textbook(start[part], (first[part], second[part]), run.generation, gradients=gradients[:, part], rates=rates)
        for part, run in zip(parts, runs, strict=True)
    ]
    found = parameter.detach(), *(optimizer.state[parameter][moment] for moment in MOMENTS)
    for one, others in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(others), rtol=1e-12, atol=1e-14)
    for before, run in zip(runs, optimizer.runs(parameter), strict=True):
        done = 0 if before.generation.is_frozen else steps
        assert run.generation.exp_avg_steps == before.generation.exp_avg_steps + done
        assert run.generation.exp_avg_sq_steps == before.generation.exp_avg_sq_steps + done


def optimizer_of_every_kind(parameter):
    runs = runs_of_every_kind()
    optimizer = megatron_tf.GrownAdamW([parameter], lr=0.01, **OPTIONS)
    rows = len(parameter)
    optimizer.state[parameter] = state_of(0.1 * draw(rows, 3, seed=2), 0.01 * draw(rows, 3, seed=3).abs(), runs)
    return optimizer


def test_a_state_dict_of_plain_values_resumes_to_the_bit():
    rows = sum(run.count for run in runs_of_every_kind())
    gradients = [(draw(rows, 3, seed=seed),) for seed in range(5)]
    (straight,) = parameters_like([draw(rows, 3)])
    steps_of(optimizer_of_every_kind(straight), [straight], gradients)

    (stopped,) = parameters_like([draw(rows, 3)])
    optimizer = optimizer_of_every_kind(stopped)
    steps_of(optimizer, [stopped], gradients[:3])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = megatron_tf.GrownAdamW([stopped], lr=1.0)
    resumed.load_state_dict(torch.load(buffer))  # weights_only, by default
    steps_of(resumed, [stopped], gradients[3:])
    assert torch.equal(stopped, straight)


def test_the_state_of_an_adamw_can_be_loaded():
    results = []
    for kind in (torch.optim.AdamW, megatron_tf.GrownAdamW):
        (parameter,) = parameters_like([draw(4, 3)])
        optimizer = torch.optim.AdamW([parameter], lr=0.01)
        steps_of(optimizer, [parameter], [(draw(4, 3, seed=1),)] * 3)
        other = kind([parameter], lr=0.5)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps_of(other, [parameter], [(draw(4, 3, seed=2),)] * 3)
        results.append(parameter)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 2}, r"state_dict is of another model: its generations cover 46 rows of a parameter \[45, 3\]"),
        ({"exp_avg_steps": -1}, "the optimizer's state_dict: generations.exp_avg_steps is -1, expected a whole number"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, message):
    rows = sum(run.count for run in runs_of_every_kind())
    (parameter,) = parameters_like([draw(rows, 3)])
    state = copy.deepcopy(optimizer_of_every_kind(parameter).state_dict())
    state["state"][0][RUNS][0] |= change
    with pytest.raises((UserError, CheckpointError), match=message):
        megatron_tf.GrownAdamW([parameter], lr=0.01).load_state_dict(state)


@pytest.mark.parametrize("option", ["amsgrad", "capturable", "differentiable"])
def test_options_that_know_no_generations_are_refused(option):
    (parameter,) = parameters_like([draw(4, 3)])
    with pytest.raises(UserError, match=f"^{option}: an optimizer of a grown model has no such option"):
        megatron_tf.GrownAdamW([parameter], lr=0.01, **{option: True})
    saved = torch.optim.AdamW([parameter], lr=0.01, **{option: True}).state_dict()
    with pytest.raises(UserError, match=f"^{option}: "):
        megatron_tf.GrownAdamW([parameter], lr=0.01).load_state_dict(saved)


def test_closures_and_hooks_work_as_in_any_optimizer():
    (parameter,) = parameters_like([draw(4, 3)])
    optimizer = megatron_tf.GrownAdamW([parameter], lr=0.01)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append("hook"))

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
    assert called == ["hook", "hook"]


def test_a_gradient_scaler_skips_a_step_that_overflows():
    (parameter,) = parameters_like([draw(4, 3).float()])
    optimizer = megatron_tf.GrownAdamW([parameter], lr=0.01, fused=True)
    optimizer.state[parameter] = state_of(torch.zeros(4, 3), torch.zeros(4, 3), [Run(4, GENERATIONS["new"])])
    before = parameter.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value, steps in ((torch.inf, 0), (8.0, 1)):
        parameter.grad = torch.full((4, 3), value)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.runs(parameter)[0].generation.exp_avg_steps == steps
    assert (parameter.detach() - before).abs().max() > 0
