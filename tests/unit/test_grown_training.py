"""A run that grows twice against formulas in float64 with an AdamW that counts the updates of every row."""

import math

import pytest
import torch

from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.parameters import model_parameters
from tests.support import textbook
from tests.support.grown_training import growing_run, train_and_grow
from tests.support.training import random_batch, small_run

ONE_PROCESS = Mesh(torch.device("cpu"))
FIRST = {
    "at_step": 10,
    "qkv_tokens": 48,
    "ffn_tokens": 96,
    "old_tokens_lr_scale": 0.5,
    "new_tokens_lr_scale": 2.0,
    "rewarmup_iters": 4,
    "rewarmup": "new",
}
SECOND = {"at_step": 20, "ffn_tokens": 192, "init": "duplicate", "rewarmup_iters": 3}


class Twin:
    """The run by its formulas: parameters by name, and for each row its moments, counts, rates and warm-up."""

    def __init__(self, config):
        self.config, self.adam = config, config.optimizer
        self.values = textbook.initial_parameters(config)
        self.taus = {}
        for name, value in self.values.items():
            if name.endswith(".key_tokens"):
                path = name.removesuffix(".key_tokens")
                self.taus[path] = textbook.initial_tau(config.model.norm_activation, len(value))
        self.rows = {name: self.rows_of(value) for name, value in self.values.items()}

    @staticmethod
    def rows_of(value, **changed):
        """State of rows without a history."""
        ones = torch.ones(len(value), *[1] * (value.dim() - 1), dtype=torch.float64)
        state = {"m": torch.zeros_like(value), "v": torch.zeros_like(value), "t1": 0 * ones, "t2": 0 * ones}
        state |= {"rate": ones, "step_scale": ones, "warm": 0 * ones, "warmed": 0 * ones}
        return {key: rows.detach() for key, rows in state.items()} | {
            key: number * ones for key, number in changed.items()
        }

    def step(self, model, step):
        """Train on a batch; the loss."""
        leaves = {name: value.detach().requires_grad_() for name, value in self.values.items()}
        ids = random_batch(self.config, step, ONE_PROCESS).ids.flatten(0, 1).long()
        loss = textbook.mean_loss(model, leaves, ids, self.taus)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
        clip = min(1.0, self.adam.clip_grad / (norm.item() + 1e-6))
        for name, gradient in gradients.items():
            self.values[name] = self.updated(name, clip * gradient)
        return loss.item()

    def updated(self, name, gradient):
        """AdamW, arXiv 1711.05101, algorithm 2."""
        rows, value, adam = self.rows[name], self.values[name].detach(), self.adam
        decay = 0.0 if name.startswith("final_norm") else adam.weight_decay
        rows["warmed"] = rows["warmed"] + 1
        warm = torch.where(rows["warm"] > 0, (rows["warmed"] / rows["warm"].clamp(min=1)).clamp(max=1), 1.0)
        lr = adam.lr * rows["rate"] * warm
        rows["t1"], rows["t2"] = rows["t1"] + 1, rows["t2"] + 1
        rows["m"] = adam.adam_beta1 * rows["m"] + (1 - adam.adam_beta1) * gradient
        rows["v"] = adam.adam_beta2 * rows["v"] + (1 - adam.adam_beta2) * gradient.square()
        m = rows["m"] / (1 - adam.adam_beta1 ** rows["t1"])
        v = rows["v"] / (1 - adam.adam_beta2 ** rows["t2"])
        return value - lr * decay * value - lr * rows["step_scale"] * m / (v.sqrt() + adam.adam_eps)

    def append(self, name, values, states):
        """Replace a tensor by parts, each with the state of its rows."""
        self.values[name] = torch.cat(values)
        self.rows[name] = {key: torch.cat([state[key] for state in states]) for key in states[0]}

    def grow_by_zero_keys(self, model, seed):
        """The first stage, to `model`: new rows, and other rates of old and new rows in the layers."""
        for name, parameter in model_parameters(model).items():
            value, old = self.values[name].detach(), self.rows[name]
            if parameter.layer is None:
                continue
            old = old | {"rate": 0.5 * torch.ones_like(old["rate"])}
            added = parameter.shape[0] - len(value)
            new = parameter.initial_rows(seed, len(value), parameter.shape[0]).double()
            if name.endswith(".key_tokens"):
                new = torch.zeros_like(new)
            parts = [value, new][: 2 if added else 1]
            self.append(name, parts, [old, self.rows_of(new, rate=2.0, warm=4)][: len(parts)])

    def duplicate(self, found):
        """The second stage, for the values `found` of the run: copies of each row of ffn, V/2 with opposite noise."""
        for name, rows in self.rows.items():
            one = torch.ones_like(rows["rate"])
            rows |= {"rate": one, "warm": 3 * one, "warmed": 0 * one}
            if ".ffn." not in name:
                continue
            value, is_value = self.values[name].detach(), name.endswith(".value_tokens")
            first, second = found[name].double().chunk(2)
            if is_value:
                torch.testing.assert_close(first + second, value, rtol=1e-9, atol=1e-11)
                assert (first - second).abs().max() > 1e-4
                rows |= {"step_scale": rows["step_scale"] / 2}
            else:
                torch.testing.assert_close(first, value, rtol=1e-9, atol=1e-11)
                assert torch.equal(first, second)
                rows |= {"m": rows["m"] / 2, "v": rows["v"] / 4}
            self.append(name, [first, second], [rows, dict(rows)])
        for path in self.taus:
            self.taus[path] *= math.sqrt(2) if path.endswith(".ffn") else 1


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_thirty_steps_with_two_growths_are_those_of_the_formulas(norm, untied, tmp_path):
    base = small_run(
        model={"norm_activation": norm, "untie_embeddings_and_output_weights": untied},
        training={"micro_batch_size": 4},
        optimizer={"clip_grad": 0.9},
    )
    config = growing_run(base, tmp_path, [FIRST, SECOND])
    twin, step = Twin(base), 0
    for stage, state, losses in train_and_grow(config, ONE_PROCESS, 30):
        model = config.at_stage(stage).model
        if stage == 1 and not losses:
            twin.grow_by_zero_keys(model, config.training.seed)
        elif stage == 2 and not losses:
            twin.duplicate({shard.name: shard.tensor.clone() for shard in state.shards})
        for loss in losses:
            assert loss == pytest.approx(twin.step(model, step), rel=1e-9), step
            step += 1
        for shard in state.shards:
            expected = twin.values[shard.name].detach()
            assert (shard.tensor - expected).abs().max() <= 1e-9 * expected.abs().max(), (stage, shard.name)
    assert step == 30
