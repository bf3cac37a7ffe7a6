"""Batches for a GPU are in page-locked memory, which the loader's thread takes for that GPU; others are not."""

import threading

import numpy as np
import pytest
import torch

from megatron_tf.data.batch import DocumentMasking
from megatron_tf.data.loader import BatchLoader
from megatron_tf.data.sample import Sample


class Samples:
    """Sample i is i, i + 1, i + 2."""

    has_loss_mask = False

    def read(self, sample):
        return Sample(np.arange(sample, sample + 3))

    def prefetch(self, sample):
        pass


def first_batch(device):
    masking = DocumentMasking(1, mask_loss=True, reset_attention=True)
    with BatchLoader(
        Samples(),
        batch_size=lambda _: 4,
        micro_batch_size=2,
        replica=0,
        replicas=1,
        consumed_samples=0,
        masking=masking,
        device=device,
    ) as loader:
        return next(loader)


@pytest.fixture
def calls(monkeypatch):
    """[(function, argument, name of the thread)] of what would need a GPU."""
    seen = []

    def pin_memory(tensor):
        seen.append(("pin", tensor.dtype, threading.current_thread().name))
        return tensor.clone()

    def set_device(device):
        seen.append(("device", device, threading.current_thread().name))

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return seen


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_reads_them(calls):
    device = torch.device("cuda", 3)
    batch = first_batch(device)
    (kind, chosen, first), *pinned = calls
    assert (kind, chosen) == ("device", device)
    assert first.startswith("batch-loader")
    assert {name for _, _, name in pinned} == {first}
    # a second batch is read ahead, of which some are pinned or all
    assert [dtype for _, dtype, _ in pinned[:5]] == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int32]
    plain = first_batch(None)
    assert batch.num_targets == plain.num_targets
    for name in ("ids", "sample_numbers", "ignored", "document_starts", "document_lengths"):
        assert torch.equal(getattr(batch, name), getattr(plain, name))


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_other_batches_are_not(calls, device):
    first_batch(device)
    assert calls == []
