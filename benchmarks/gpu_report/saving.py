"""Measure building the small model, and saving and loading its checkpoint."""

import tempfile
import time
from pathlib import Path

import megatron_tf
from benchmarks.gpu_report.result import Result
from benchmarks.gpu_report.runs import random_batch, step_config
from benchmarks.gpu_report.scale import Scale
from benchmarks.gpu_report.timing import synchronize
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.run.checkpointing import new_record, save_state
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step


def saving(scale: Scale, result: Result) -> None:
    """Time building the model, saving its whole state and loading the model."""
    row = result.table(f"The {scale.small.name} model on this disk", "what", "seconds", "GB/s")
    config = step_config(scale.small, micro_batch=scale.micro_batch)
    start = time.perf_counter()
    state = build_state(config, Mesh(scale.device))
    synchronize(scale.device)
    row("building and initializing the model, its kernels built", f"{time.perf_counter() - start:.1f}", "")
    train_step(state, random_batch(config, 0), 1e-4)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "checkpoint"
        start = time.perf_counter()
        save_state(state, config, new_record(config, {}), root=root)
        seconds = time.perf_counter() - start
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        row(f"saving {size / 1e9:.1f} GB", f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}")
        start = time.perf_counter()
        model = megatron_tf.load(root, device=str(scale.device))
        synchronize(scale.device)
        seconds = time.perf_counter() - start
        size = sum(parameter.nbytes for parameter in model.parameters())
        row(f"loading the {size / 1e9:.1f} GB of the model", f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}")
