"""Check where the host waits for the GPU: in a micro-batch, in a step, and while a save copies tensors."""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.gpu_report.result import Result
from benchmarks.gpu_report.runs import random_batch, step_config
from benchmarks.gpu_report.scale import Scale
from megatron_tf.checkpoint.snapshot import HostCopies
from megatron_tf.data.batch import pin
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.state import TrainState, build_state
from megatron_tf.training.step.step import micro_batches, train_step

MOST_WAITS = 2
"""Waits of a step: for the loss, and for the norms of the gradients."""


def waits(scale: Scale, result: Result) -> None:
    """Count how often the host waits, and compare the copies of a save with their sources."""
    if scale.device.type != "cuda":
        result.skip("waiting for a GPU needs one")
        return
    config = step_config(scale.small, micro_batch=2)
    state, batch = build_state(config, Mesh(scale.device)), pin(random_batch(config, 0))
    train_step(state, batch, 1e-4)  # one-time work, such as creating the optimizer's state, is not counted
    with result.guarded("waits of a micro-batch"):
        batches = micro_batches(state, batch, is_bad=False)
        found = count_waits(lambda: state.runner.train(batches, float(batch.num_targets)))
        result.at_most("waits of a micro-batch's forward and backward", found, 0)
        state.model.zero_grad(set_to_none=True)
    with result.guarded("waits of a step"):
        result.at_most("waits of a step", count_waits(lambda: train_step(state, batch, 1e-4)), MOST_WAITS)
    with result.guarded("copies of a save"):
        _copies(state, result)


def count_waits(work: Callable[[], object]) -> int:
    """Count the operations of `work` that synchronize with the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [warning for warning in seen if "synchronizing CUDA operation" in str(warning.message)]
    for warning in found:
        print(f"  waits at {warning.filename}:{warning.lineno}", flush=True)
    return len(found)


@torch.no_grad()
def _copies(state: TrainState, result: Result) -> None:
    """Copy twice, into new and into reused memory, and change the parameters right after each call."""
    row = result.table("Copies in page-locked memory", "save", "GB", "seconds until the call returns", "GB/s")
    with ThreadPoolExecutor(1) as thread:
        host_copies = HostCopies(thread)
        for number in ("first", "second"):
            before = [shard.tensor.clone() for shard in state.shards]
            torch.cuda.synchronize()
            start = time.perf_counter()
            copies, wait = host_copies.take({"model": state.shards})
            returned = time.perf_counter() - start
            for shard in state.shards:
                shard.tensor.add_(1.0)
            thread.submit(wait).result()
            seconds = time.perf_counter() - start
            size = sum(shard.tensor.nbytes for shard in copies["model"]) / 1e9
            row(number, f"{size:.2f}", f"{returned:.4f}", f"{size / seconds:.1f}")
            same = all(torch.equal(a.cpu(), b.tensor) for a, b in zip(before, copies["model"], strict=True))
            result.is_true(f"copies of the {number} save are those of the call", same)
            result.is_true(f"copies of the {number} save are pinned", copies["model"][0].tensor.is_pinned())
        host_copies.close()
