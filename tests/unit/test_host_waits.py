"""A step waits for the device where it has to know a number, and nowhere else; a micro-batch never does."""

import contextlib
from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.inference import generation as decoding
from megatron_tf.inference.sampling import Sampling
from megatron_tf.kernels.documents import AttendTogether
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.row_inspector import RowInspector
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import evaluation_loss, micro_batches, train_step
from megatron_tf.training.supervision.signals import SignalCatcher
from megatron_tf.training.supervision.stop_signal import StopSignal
from tests.support.host_waits import HostWaits
from tests.support.models import random_model
from tests.support.training import PLAIN, STRONG, random_batch, small_run

MESH = Mesh(torch.device("meta"))
NORMS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
RUNS = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "fp16": {"training": {"precision": "fp16"}},
    "full recomputation": {"training": {"precision": "bf16", "recompute_granularity": "full"}},
    "selective recomputation": {"training": {"precision": "bf16", "recompute_granularity": "selective"}},
    "masked loss": {"data": {"eod_mask_loss": True}},
    "untied": {"model": {"untie_embeddings_and_output_weights": True}},
    "transformer": {"model": PLAIN},
    "strong transformer": {"model": STRONG, "training": {"precision": "bf16"}},
    "dropout": {"training": {"precision": "bf16", "hidden_dropout": 0.1, "attention_dropout": 0.1}},
    "dropout, full recomputation": {"training": {"hidden_dropout": 0.1, "recompute_granularity": "full"}},
    "documents": {"data": {"reset_attention_mask": True}, "training": {"precision": "bf16"}},
    "documents, dropout": {"data": {"reset_attention_mask": True}, "training": {"attention_dropout": 0.1}},
    "fp8": {"training": {"precision": "fp8"}},
    **{norm: {"model": {"norm_activation": norm}} for norm in NORMS},
}

DOCUMENTS = small_run(
    data={"reset_attention_mask": True}, training={"micro_batch_size": 4}, kernels={"pattention": "eager"}
)


@pytest.fixture(params=RUNS.values(), ids=list(RUNS))
def run(request):
    """(state, batch of two micro-batches) of a run on a device that has no values."""
    sections = dict(request.param)
    training = {"micro_batch_size": 4} | sections.pop("training", {})
    config = small_run(training=training, kernels={"pattention": "eager"}, **sections)
    return build_state(config, MESH), random_batch(config, 0, MESH)


def test_a_micro_batch_neither_waits_nor_copies_from_the_host(run):
    state, batch = run
    batches = micro_batches(state, batch, is_bad=False, sample_numbers=batch.sample_numbers)
    with HostWaits(MESH.device) as seen:
        state.runner.train(batches, 64.0)
        state.runner.evaluate(batches, 64.0)
    assert (seen.reads, seen.copies) == ([], [])
    assert all(parameter.grad is not None for parameter in state.model.parameters())


def test_documents_attended_together_are_not_read_on_the_host():
    """As on a GPU in 16 bits; what computes attention there is not available here, and is replaced by a sum."""
    state, bounds = build_state(DOCUMENTS, MESH), []

    def varlen(q, k, v, begins, longest):
        bounds.append((begins.device, begins.dtype, longest))
        return q + k + v

    kernels = replace(state.kernels, attend_documents=AttendTogether(varlen))
    state.model.use(kernels)
    state = replace(state, kernels=kernels)
    batches = micro_batches(state, random_batch(DOCUMENTS, 0, MESH), is_bad=False)
    with HostWaits(MESH.device) as seen:
        state.runner.train(batches, 64.0)
    assert (seen.reads, seen.copies) == ([], [])
    assert bounds == [(MESH.device, torch.int32, DOCUMENTS.training.seq_length)] * 2 * DOCUMENTS.model.num_layers


def num_copies(state, batch):
    """Tensors of a batch that a step takes to the device; lengths of documents are read on the host here."""
    read = [batch.ids, batch.ignored, batch.document_starts, state.model.dropout and batch.sample_numbers]
    return sum(tensor is not None for tensor in read)


def test_a_step_reads_its_loss_and_its_norms_and_copies_its_batch(run):
    state, batch = run
    stop_signal = StopSignal(MESH, SignalCatcher(), None)
    with HostWaits(MESH.device) as seen:
        result = train_step(state, batch, 1e-3)
        stop_signal.agree()
    assert len(seen.reads) == 2
    assert len(seen.copies) == num_copies(state, batch)
    assert seen.blocking == []
    assert not result.nonfinite
    assert state.optimizer.num_steps == 1


def test_an_inspected_step_waits_once_more(run):
    state, batch = run
    declared = state.optimizer.declared
    generations = {name: [Run(each.shape[0], Generation(growth=1))] for name, each in declared.items()}
    state.optimizer.generations = Generations.of_runs(generations)
    inspector = RowInspector(state.optimizer)
    with HostWaits(MESH.device) as seen:
        result = train_step(state, batch, 1e-3, inspector)
    assert len(seen.reads) == 3
    assert len(seen.copies) == num_copies(state, batch)
    assert seen.blocking == []
    kinds = {parameter.kind for parameter in state.optimizer.declared.values() if parameter.layer is not None}
    assert len(result.rows) == len(kinds) * state.model.config.num_layers


def test_an_evaluation_reads_its_loss(run):
    state, batch = run
    with HostWaits(MESH.device) as seen:
        evaluation_loss(state, batch)
    assert len(seen.reads) == 1
    assert seen.blocking == []


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(0.8), Sampling(0.8, 20, 0.9)], ids=str)
@pytest.mark.parametrize("prompts", [[[5, 3]], [[5, 3], [7, 9]], [[5], [7, 9, 2]]], ids=str)
def test_a_decoding_step_reads_its_tokens_once_and_copies_only_random_numbers(prompts, sampling):
    model = random_model().to(MESH.device)
    model.arrange_for_decoding()
    generation = decoding.Generation(model, prompts, sampling)
    for step in range(3):
        with HostWaits(MESH.device) as seen:
            generation.step()
        # the first step copies the prompts, and the second the lengths of uneven ones
        if step == 2:
            assert len(seen.reads) == 1
            assert len(seen.copies) == (not sampling.is_greedy)
            assert seen.blocking == []


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: float(x.sum()), "reads"),
        (lambda x: x.tolist(), "reads"),
        (lambda x: x.cpu(), "reads"),
        (lambda x: torch.empty(3).copy_(x), "reads"),
        (lambda x: torch.equal(x, x), "reads"),
        (lambda x: x[x > 0], "reads"),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), "blocking"),
        (lambda x: torch.ones(3).to(x.device), "blocking"),
        (lambda x: x.copy_(torch.ones(3)), "blocking"),
    ],
)
def test_what_waits_is_seen(wait, name):
    x = torch.empty(3, device="meta")
    # what the meta device refuses has been seen by then
    with HostWaits(x.device) as seen, contextlib.suppress(NotImplementedError, RuntimeError):
        wait(x)
    assert getattr(seen, name)
