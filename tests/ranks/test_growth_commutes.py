"""A growth commutes with a training step: "step, then grow" equals "grow, then step", in fp64."""

import math
from functools import partial

import pytest

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step
from tests.support.grown_training import growing_run
from tests.support.layouts import layout_config
from tests.support.records import NO_TOKENIZER
from tests.support.toy import GROUPS
from tests.support.training import PLAIN, STRONG, random_batch

BEFORE = 2
TOLERANCE = 1e-12
NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
LAYOUTS = [(1, 1, 1), (2, 2, 1)]
COPIES = {"init": "duplicate", "noise": 0.0}
ALL_ROWS = {
    "twice the tokens": {**COPIES, "qkv_tokens": 64, "proj_tokens": 48, "ffn_tokens": 128},
    "twice the width": {"hidden_multiple": 2, "noise": 0.0},
}
OTHER_FACTORS = {
    "three times the tokens of a kind": {**COPIES, "ffn_tokens": 192},
    "three times the width": {"hidden_multiple": 3, "noise": 0.0},
    "twice the width and tokens": {"hidden_multiple": 2, **COPIES, "ffn_tokens": 128},
}
"""Growths after which every row is a copy: all of them commute."""
OLD_ROWS = {
    "zero keys": {"qkv_tokens": 48, "ffn_tokens": 96},
    "identity layers": {"insert_layers": [1, 3]},
    "copied layers with zeros": {"num_layers": 6, "layer_order": "stacked", "layer_init": "copy_zero"},
}
"""Growths that add rows that are no copies: the old rows commute."""
HIDDEN_UNITS = {
    "zero_key": {"ffn_tokens": 96},
    "zero_value": {"ffn_tokens": 96, "mlp_init": "zero_value"},
    "duplicate": {"ffn_tokens": 128, "mlp_init": "duplicate", "noise": 0.0},
    "width": {"hidden_multiple": 2, "noise": 0.0},
}
TRANSFORMERS = {"plain": PLAIN, "strong": STRONG}


def config_of(layout, root, stage, model, *, untied):
    """A run that grows after BEFORE steps, without clipping and with a negligible epsilon."""
    optimizer = {"clip_grad": 0, "adam_eps": 1e-100}
    # scores of about 1: where weights are almost equal, gradients are differences of almost equal numbers
    keys = {"init_method_std": 0.2, **model}
    base = layout_config(layout, untied=untied, model=keys, optimizer=optimizer)
    return growing_run(base, root / "run", [{**stage, "at_step": BEFORE}])


def both_orders(mesh, config, root):
    """Train, and save in `root` before the growth: one step later in `stepped`, and in `grown` after growing and it."""
    build = partial(build_state, mesh=mesh)
    state, record = build(config.at_stage(0)), new_record(config, NO_TOKENIZER)

    def step(state, record):
        train_step(state, random_batch(config, record.training.step, mesh), config.optimizer.lr)
        return record.after_step(config.training.global_batch_size, 1, 0.0)

    for _ in range(BEFORE):
        record = step(state, record)
    save_state(state, config.at_stage(0), record, root=config.checkpoint.save)
    save_state(state, config.at_stage(0), step(state, record), root=root / "stepped")
    run = Resume(config, mesh, tokenizer=NO_TOKENIZER, build=build).restore()
    assert run.stage == 1
    save_state(run.state, config.at_stage(1), step(run.state, run.record), root=root / "grown")


def check(rank_pool, layout, root, stage, model, *, untied=False):
    """Compare both orders on all rows that were there before the growth, or are copies of them."""
    config = config_of(layout, root, stage, model, untied=untied)
    rank_pool.run(both_orders, *layout, config, root)
    expected = grow(CheckpointReader(root / "stepped"), GrowthStage(**stage))
    found = CheckpointReader(root / "grown")
    compared = 0
    for group in GROUPS:
        assert found.names(group) == expected.names(group)
        for name in found.names(group):
            rows = found.shape(group, name)[0]
            one, other = (each.read_rows(group, name, start=0, stop=rows) for each in (found, expected))
            low = 0
            for run in found.record.all_generations.runs(name, rows):
                part = slice(low, low + run.count)
                low += run.count
                if run.generation.exp_avg_steps == BEFORE + 1:  # has the moments of old rows
                    limit = TOLERANCE * other.abs().max()
                    assert (one[part] - other[part]).abs().max() <= limit, (group, name, run)
                    compared += one[part].numel()
    return compared


def sizes(checkpoint):
    """The number of elements of its tensors."""
    return sum(math.prod(checkpoint.shape(group, name)) for group in GROUPS for name in checkpoint.names(group))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stage", ALL_ROWS)
def test_copies_commute(rank_pool, tmp_path, layout, untied, norm, stage):
    compared = check(rank_pool, layout, tmp_path, ALL_ROWS[stage], {"norm_activation": norm}, untied=untied)
    assert compared == sizes(CheckpointReader(tmp_path / "grown"))


@pytest.mark.parametrize("stage", OTHER_FACTORS)
def test_copies_by_other_factors_commute(rank_pool, tmp_path, stage):
    compared = check(rank_pool, (2, 1, 1), tmp_path, OTHER_FACTORS[stage], {})
    assert compared == sizes(CheckpointReader(tmp_path / "grown"))


@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.parametrize("stage", OLD_ROWS)
def test_old_rows_commute(rank_pool, tmp_path, norm, stage):
    compared = check(rank_pool, (2, 2, 1), tmp_path, OLD_ROWS[stage], {"norm_activation": norm})
    assert compared == sizes(CheckpointReader(tmp_path / "stepped"))


@pytest.mark.parametrize("model", TRANSFORMERS)
@pytest.mark.parametrize("stage", HIDDEN_UNITS)
def test_the_plain_transformer_commutes(rank_pool, tmp_path, model, stage):
    compared = check(rank_pool, (2, 2, 1), tmp_path, HIDDEN_UNITS[stage], TRANSFORMERS[model])
    has_only_copies = stage in ("duplicate", "width")
    assert compared == sizes(CheckpointReader(tmp_path / ("grown" if has_only_copies else "stepped")))


@pytest.mark.parametrize("model", TRANSFORMERS)
@pytest.mark.parametrize("stage", ["identity layers", "copied layers with zeros"])
def test_old_layers_of_the_plain_transformer_commute(rank_pool, tmp_path, model, stage):
    compared = check(rank_pool, (2, 2, 1), tmp_path, OLD_ROWS[stage], TRANSFORMERS[model])
    assert compared == sizes(CheckpointReader(tmp_path / "stepped"))


def test_without_step_scales_they_do_not(rank_pool, tmp_path):
    stage = {**ALL_ROWS["twice the tokens"], "step_scale": "none"}
    with pytest.raises(AssertionError, match=r"model.*value_tokens"):
        check(rank_pool, (1, 1, 1), tmp_path, stage, {})
