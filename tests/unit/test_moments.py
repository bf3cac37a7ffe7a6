"""Which stages of growth and phases of the data can meet is known before the run, as far as it can be."""

import itertools
import random

import pytest

from megatron_tf.config import ConfigError, DataPhase, RunConfig, parse_config, to_dict
from megatron_tf.config.moment import Moment, count_due, reachable
from megatron_tf.config.training import TrainingConfig
from tests.support.training import small_run


def at(*steps):
    return [Moment(at_step=step) for step in steps]


def visited(growth, phases, progress):
    """The pairs of counts that a run is in at some step; `progress` yields (step, tokens)."""
    found, stage, phase = {(0, 0)}, 0, 0
    for step, tokens in progress:
        stage = count_due(growth, step=step, tokens=tokens, done=stage)
        phase = count_due(phases, step=step, tokens=tokens, done=phase)
        found.add((stage, phase))
    return found


@pytest.mark.parametrize("growth, phases", itertools.product([(), (3,), (2, 5), (4, 9)], [(), (5,), (1, 2, 5), (4, 9)]))
def test_moments_in_steps_meet_exactly_as_in_a_run(growth, phases):
    run = [(step, 0) for step in range(1, 12)]
    assert set(reachable(at(*growth), at(*phases))) == visited(at(*growth), at(*phases), run)


def test_every_pair_of_any_run_is_reachable_when_steps_and_tokens_mix():
    choose = random.Random(1)

    def moments():
        times = sorted(choose.sample(range(1, 20), choose.randint(0, 3)))
        return [Moment(at_step=t) if choose.random() < 0.5 else Moment(at_tokens=10 * t) for t in times]

    for _ in range(300):
        growth, phases = moments(), moments()
        tokens = itertools.accumulate(choose.choice([1, 10, 25]) for _ in range(30))
        assert visited(growth, phases, enumerate(tokens, 1)) <= set(reachable(growth, phases))


def test_steps_and_tokens_can_come_in_either_order():
    assert len([*reachable(at(3), [Moment(at_tokens=5)])]) == 4
    assert [*reachable(at(3), at(3))] == [(0, 0), (1, 1)]


def test_a_phase_changes_what_it_names_and_ends_a_ramp_up_of_the_batch_size():
    training = TrainingConfig(
        seq_length=8, micro_batch_size=2, global_batch_size=8, train_iters=9, rampup_batch_size=(4, 2, 64)
    )
    longer = DataPhase(at_step=1, seq_length=32).training_after(training)
    assert (longer.seq_length, longer.global_batch_size, longer.rampup_batch_size) == (32, 8, (4, 2, 64))
    smaller = DataPhase(at_step=1, global_batch_size=2).training_after(training)
    assert (smaller.seq_length, smaller.global_batch_size, smaller.rampup_batch_size) == (8, 2, None)


PHASES = [{"at_step": 4, "seq_length": 32}, {"at_step": 8, "data_path": ["0.5 a", "0.5 b"], "micro_batch_size": 2}]


def configured(phases, *, growth=(), **sections):
    """A run over two tensor-parallel ranks with sequence parallelism, with these phases."""
    values = to_dict(small_run(parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}))
    for section, keys in ({"data": {"order": None}, "checkpoint": {"save": "run"}} | sections).items():
        values[section] |= keys
    values["data"]["phases"] = phases
    return parse_config(RunConfig, values | {"growth": [*growth]}, "test")


def test_the_configuration_in_force_has_all_changes_up_to_a_stage():
    config = configured(PHASES, growth=[{"at_step": 8, "ffn_tokens": 128}])
    first, second = config.at_stage(0, 1), config.at_stage(1, 2)
    assert (first.training.seq_length, first.data.data_path, first.model.ffn_tokens) == (32, ["unused"], 64)
    assert (second.training.seq_length, second.training.micro_batch_size) == (32, 2)
    assert (second.data.data_path, second.model.ffn_tokens) == (["0.5 a", "0.5 b"], 128)
    assert (second.data.phases, second.growth) == ([], [])


@pytest.mark.parametrize(
    "phases, sections, message",
    [
        ([{"at_step": 4, "seq_length": 33}], {}, r"data.phases\[0\]: training.seq_length \(33\) must be divisible by"),
        (
            [{"at_step": 4, "micro_batch_size": 3}],
            {},
            r"data.phases\[0\]: global_batch_size \(8\) must be divisible by",
        ),
        ([{"at_step": 4, "seq_length": 8}] * 2, {}, "data.phases: at_step must increase"),
        ([{"at_step": 4, "seq_length": 8}], {"data": {"order": "counter"}}, "data.phases needs data.order lanes"),
        ([{"at_step": 4, "seq_length": 8}], {"checkpoint": {"save": None}}, "data.phases needs checkpoint.save"),
        ([{"at_step": 4, "data_path": ["1 a", "b"]}], {}, r"data.phases\[0\].data_path: write every entry as PREFIX"),
    ],
)
def test_phases_that_cannot_be_are_refused_by_the_configuration(phases, sections, message):
    with pytest.raises(ConfigError, match=message):
        configured(phases, **sections)


def test_only_combinations_that_a_run_can_reach_are_checked():
    """The length 18 comes after the growth to 3 ranks, for which the first length of 16 would be wrong."""
    growth = [{"at_step": 4, "ffn_tokens": 96, "qkv_tokens": 48, "tensor_model_parallel_size": 3}]
    model = {"num_attention_heads": 6, "hidden_size": 48, "qkv_tokens": 36}
    model |= {"vocab_size": 90, "make_vocab_size_divisible_by": 6}
    configured([{"at_step": 4, "seq_length": 18}], growth=growth, model=model)
    with pytest.raises(ConfigError, match=r"growth\[0\]: training.seq_length \(16\) must be divisible"):
        configured([{"at_step": 5, "seq_length": 18}], growth=growth, model=model)
