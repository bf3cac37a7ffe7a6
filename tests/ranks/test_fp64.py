"""training.precision fp64 on ranks: layouts equal one process to 1e-12, and checkpoints keep every bit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.training.run.checkpointing import save_state
from megatron_tf.training.run.resume import Resume
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, train_step
from tests.support.layouts import layout_config, whole_model
from tests.support.training import PLAIN, STRONG, random_batch, training_run

TOKENIZER = {"type": "none"}
STEPS = 3
TOLERANCE = 1e-12
CASES = [
    *(
        (layout, sequence_parallel, untied, {})
        for layout, sequence_parallel in (((2, 2, 1), False), ((1, 1, 2), False), ((2, 1, 1), True), ((2, 2, 2), True))
        for untied in (False, True)
    ),
    *(
        ((2, 2, 1), True, untied, model)
        for untied, model in ((True, {"norm_activation": "softmax"}), (False, {"norm_activation": "gelu_l2_norm"}))
    ),
    ((2, 2, 1), True, True, PLAIN),
    *((layout, layout[0] > 1, False, STRONG) for layout in ((2, 1, 2), (1, 2, 1))),
    *(
        (layout, sequence_parallel, True, STRONG)
        for layout, sequence_parallel in (((4, 1, 1), False), ((2, 2, 2), True))
    ),
]
"""(layout, sequence parallel, untied, keys of the model)."""

ZERO_BUBBLE = {"pipeline_schedule": "interleaved_zero_bubble", "num_virtual_stages_per_pipeline_rank": 1}
CHUNKS = [
    *(
        (layout, chunks, recompute, {})
        for layout, chunks in (((2, 1, 1), 3), ((2, 2, 1), 5), ((4, 1, 2), 1000))
        for recompute in ("none", "selective", "full")
    ),
    ((2, 2, 1), 3, "none", ZERO_BUBBLE),
    ((2, 2, 1), 3, "full", ZERO_BUBBLE),
]
"""(layout, chunks: uneven ones, or as many as there are tokens, what is recomputed, keys of `parallel`)."""


def fp64_config(layout, sequence_parallel=False, untied=False, precision="fp64", **sections):
    return layout_config(layout, sequence_parallel, untied, training={"precision": precision}, **sections)


@pytest.fixture(scope="module")
def alone(rank_pool):
    """(untied, layer) -> (losses and gradient norms, gradients of the first step) of one process, run once each."""
    known = {}

    def run(untied, model):
        key = untied, str(model)
        if key not in known:
            config = fp64_config((1, 1, 1), untied=untied, model=dict(model))
            known[key] = rank_pool.run(training_run, 1, 1, 1, config, STEPS)[0]
        return known[key]

    return run


@pytest.mark.parametrize(("layout", "sequence_parallel", "untied", "model"), CASES, ids=str)
def test_a_layout_equals_one_process_to_rounding_in_fp64(rank_pool, alone, layout, sequence_parallel, untied, model):
    curve, expected = alone(untied, model)
    config = fp64_config(layout, sequence_parallel, untied, model=dict(model))
    answers = rank_pool.run(training_run, *layout, config, STEPS)
    for found, _ in answers:
        np.testing.assert_allclose(found, curve, rtol=TOLERANCE)
    gradients = whole_model(layout, untied, [gradients for _, gradients in answers])
    assert gradients.keys() == expected.keys()
    # under softmax, keys start with gradients of 1e-7, which are differences of much larger terms
    least = 1e-6 * max(map(np.linalg.norm, expected.values()))
    for name, gradient in gradients.items():
        assert gradient.dtype == np.float64
        size = max(np.linalg.norm(expected[name]), least)
        assert np.linalg.norm(gradient - expected[name]) < TOLERANCE * size, name


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize(("layout", "chunks", "recompute", "parallel"), CHUNKS, ids=str)
def test_messages_in_chunks_equal_one_process(rank_pool, alone, layout, chunks, recompute, parallel, sequence_parallel):
    curve, expected = alone(True, {})
    training = {"precision": "fp64", "recompute_granularity": recompute}
    parallel = {"tp_comm_overlap_chunks": chunks} | parallel
    config = layout_config(layout, sequence_parallel, True, training=training, parallel=parallel)
    answers = rank_pool.run(training_run, *layout, config, STEPS)
    for found, _ in answers:
        np.testing.assert_allclose(found, curve, rtol=TOLERANCE)
    gradients = whole_model(layout, True, [gradients for _, gradients in answers])
    for name, gradient in gradients.items():
        assert np.linalg.norm(gradient - expected[name]) < TOLERANCE * np.linalg.norm(expected[name]), name


def train_and_save(mesh, config, steps, root):
    """Train from the newest checkpoint until `steps`, evaluate, and save; returns losses, and what the run says."""
    run = Resume(config, mesh, tokenizer=TOKENIZER, build=lambda staged: build_state(staged, mesh)).restore()
    state, record, losses = run.state, run.record, []
    while record.training.step < steps:
        losses.append(train_step(state, random_batch(config, record.training.step, mesh), 1e-3).loss)
        record = record.after_step(8, 8 * 16, 0.0)
    losses.append(evaluation_loss(state, random_batch(config, steps, mesh)))
    save_state(state, config, record, root=Path(root))
    return losses, (run.changes, run.warning)


def tensors_of(root):
    """Every tensor of the newest checkpoint under `root`."""
    reader = CheckpointReader(root).complete()
    return {
        (group, name): reader.read_rows(group, name, start=0, stop=reader.shape(group, name)[0])
        for group in reader.groups()
        for name in reader.names(group)
    }


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), (1, 1, 2)], ids=str)
def test_a_run_resumes_bit_for_bit(rank_pool, tmp_path, layout):
    config = fp64_config(layout)
    straight, _ = rank_pool.run(train_and_save, *layout, config, 6, tmp_path / "straight")[0]
    config = fp64_config(layout, checkpoint={"save": tmp_path / "saved"})
    first, _ = rank_pool.run(train_and_save, *layout, config, 3, tmp_path / "saved")[0]
    second, said = rank_pool.run(train_and_save, *layout, config, 6, tmp_path / "saved")[0]
    assert first[:3] + second == straight
    assert said == ("", "")
    found, expected = tensors_of(tmp_path / "saved"), tensors_of(tmp_path / "straight")
    assert found.keys() == expected.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())
    assert any((tensor.float().double() != tensor).any() for tensor in found.values()), "fp32 could hold it"


def test_another_layout_continues_to_rounding_in_fp64(rank_pool, tmp_path):
    straight, _ = rank_pool.run(train_and_save, 1, 1, 1, fp64_config((1, 1, 1)), 6, tmp_path / "straight")[0]
    for layout, steps in (((2, 2, 1), 3), ((1, 1, 2), 6)):
        config = fp64_config(layout, checkpoint={"save": tmp_path / "saved"})
        losses, _ = rank_pool.run(train_and_save, *layout, config, steps, tmp_path / "saved")[0]
    np.testing.assert_allclose(losses, straight[3:], rtol=TOLERANCE)


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_an_fp32_checkpoint_is_widened_exactly(rank_pool, tmp_path, layout):
    narrow = fp64_config((2, 1, 1), precision="fp32", checkpoint={"save": tmp_path / "narrow"})
    rank_pool.run(train_and_save, 2, 1, 1, narrow, 2, tmp_path / "narrow")
    config = fp64_config(layout, checkpoint={"load": tmp_path / "narrow"})
    _, (changes, warning) = rank_pool.run(train_and_save, *layout, config, 2, tmp_path / "wide")[0]
    assert "training.precision 'fp32' -> 'fp64'" in changes
    assert not warning
    saved, widened = tensors_of(tmp_path / "narrow"), tensors_of(tmp_path / "wide")
    assert saved.keys() == widened.keys()
    for key, tensor in saved.items():
        assert (tensor.dtype, widened[key].dtype) == (torch.float32, torch.float64)
        assert torch.equal(tensor.double(), widened[key]), key


def test_an_fp64_checkpoint_is_rounded_in_an_fp32_run_which_says_so(rank_pool, tmp_path):
    wide = fp64_config((1, 1, 1), checkpoint={"save": tmp_path / "wide"})
    rank_pool.run(train_and_save, 1, 1, 1, wide, 2, tmp_path / "wide")
    config = fp64_config((2, 1, 1), precision="bf16", checkpoint={"load": tmp_path / "wide"})
    _, (changes, warning) = rank_pool.run(train_and_save, 2, 1, 1, config, 2, tmp_path / "narrow")[0]
    assert "training.precision 'fp64' -> 'bf16'" in changes
    assert warning == f"{tmp_path / 'wide'} is in fp64: training.precision=bf16 rounds its tensors to fp32"
    saved, rounded = tensors_of(tmp_path / "wide"), tensors_of(tmp_path / "narrow")
    assert all(torch.equal(tensor.float(), rounded[key]) for key, tensor in saved.items())
    config = fp64_config((2, 1, 1), precision="bf16", checkpoint={"load": tmp_path / "narrow"})
    _, (_, warning) = rank_pool.run(train_and_save, 2, 1, 1, config, 2, tmp_path / "again")[0]
    assert not warning, "the rounded checkpoint is in fp32"
