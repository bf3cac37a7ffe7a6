"""The commands as a user runs them, with one NCCL rank per GPU: train, stop, resume, grow, and load on a CPU."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import yaml

import megatron_tf
from benchmarks.gpu_report.result import Result
from benchmarks.gpu_report.runs import random_batch, small_config, step_config
from benchmarks.gpu_report.scale import Scale
from benchmarks.gpu_report.timing import milliseconds
from megatron_tf.config import to_dict
from megatron_tf.data.indexed_dataset import blocks_of_documents, write_index
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.step.determinism import use_deterministic_algorithms
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 6
TIMEOUT = 240


def program(scale: Scale, result: Result) -> None:
    """Train on all GPUs with NCCL, resume, grow exactly, and load the checkpoint on a CPU."""
    ranks = torch.cuda.device_count() if scale.device.type == "cuda" else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _prepare(folder, scale, ranks)
        with result.guarded("training"):
            start = time.perf_counter()
            _train(config, ranks, f"--training.train_iters={STEPS // 2}")
            result.figures["seconds from launch to the end of 3 steps"] = time.perf_counter() - start
            longer = [f"--training.train_iters={STEPS}", "--checkpoint.allow_changes=[training.train_iters]"]
            _train(config, ranks, *longer)
            stopped = _losses(folder)
            once = _prepare(folder / "once", scale, ranks)
            _train(once, ranks, f"--training.train_iters={STEPS}")
            whole = _losses(folder / "once")
            result.is_true(f"{ranks} NCCL rank(s): {STEPS} steps", len(stopped) == STEPS, f"losses {stopped}")
            same = stopped == whole
            result.is_true(
                "stopped after 3 steps and resumed: the same losses", same, "same bits" if same else f"{whole}"
            )
        with result.guarded("growth"):
            _check_growth(folder, scale, result)


def _prepare(folder: Path, scale: Scale, ranks: int) -> Path:
    folder.mkdir(exist_ok=True)
    prefix = folder / "data"
    np.random.default_rng(0).integers(0, 100, 1 << 16).astype(np.uint16).tofile(f"{prefix}.bin")
    lengths = np.full(1 << 8, 1 << 8, dtype=np.int32)
    write_index(Path(f"{prefix}.idx"), np.dtype(np.uint16), blocks_of_documents(lengths))
    small = small_config()
    model = {key: value for key, value in to_dict(small.model).items() if value is not None}
    tensor = 2 if ranks % 2 == 0 else 1
    values = {
        "model": model | {"vocab_size": 257},
        "training": {
            "seq_length": 64,
            "micro_batch_size": 2,
            "global_batch_size": 4 * ranks,
            "train_iters": STEPS,
            "precision": "bf16" if scale.device.type == "cuda" else "fp32",
            "deterministic": True,
        },
        "optimizer": {"lr": 1e-3, "lr_decay_style": "constant"},  # a schedule depends on train_iters
        "parallel": {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1},
        "data": {"data_path": [str(prefix)], "tokenizer_type": "NullTokenizer", "split": "1,0,0"},
        "checkpoint": {"save": str(folder / "checkpoint")},
        "logging": {"metrics_file": str(folder / "metrics.jsonl"), "log_interval": 1},
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    return config


def _train(config: Path, ranks: int, *overrides: str) -> None:
    # without an address torchrun looks up the host's name, and waits where there is no name server
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launcher += ["--nproc-per-node", str(ranks), "-m"]
    _run([*launcher, "megatron_tf.pretrain", str(config), *overrides])


def _run(arguments: list[str]) -> None:
    """Run a command. Raises RuntimeError with its last error line if it fails."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "4"}
    job = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    if job.returncode:
        print(job.stdout[-4000:], flush=True)
        errors = [line for line in job.stdout.splitlines() if "rror" in line]
        raise RuntimeError(f"{arguments[-2:]} ended with code {job.returncode}: {errors[-1] if errors else ''}")


def _losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def _check_growth(folder: Path, scale: Scale, result: Result) -> None:
    """Append zero keys: no logit may change on the device, and a CPU must be able to load the checkpoint."""
    checkpoint, grown = folder / "checkpoint", folder / "grown"
    tool = ["-m", "megatron_tf", "reshard-checkpoint", "--load", str(checkpoint), "--save", str(grown)]
    _run([*tool, "--grow", "qkv=96", "--grow", "ffn=400"])
    ids = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(0))
    before, after = (_logits(path, ids, scale.device) for path in (checkpoint, grown))
    on_cpu = _logits(checkpoint, ids, torch.device("cpu"))
    size = float(before.abs().max())
    result.at_most(
        "grown by zero keys: largest change of a logit / largest logit",
        float((after - before).abs().max()) / size,
        1e-6,
    )
    result.at_most(
        "read on a CPU: largest difference of a logit / largest logit",
        float((on_cpu - before).abs().max()) / size,
        1e-5,
    )


def _logits(path: Path, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        return megatron_tf.load(path, device=str(device))(ids.to(device)).cpu()


def determinism(scale: Scale, result: Result) -> None:
    """Check that steps of the small model repeat bit for bit, and measure the cost of determinism."""
    found = {}
    for deterministic in (False, True):
        command = [sys.executable, str(REPOSITORY / "benchmarks/gpu.py"), "--repeat-steps"]
        command += ["--device", scale.device.type] + (["--deterministic"] if deterministic else [])
        job = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if job.returncode:
            error = (job.stderr.strip().splitlines() or ["no output"])[-1]
            result.is_true(f"steps with deterministic={deterministic}", False, error)
            return
        found[deterministic] = json.loads(job.stdout.splitlines()[-1])
    same = found[True]["first"] == found[True]["second"]
    result.is_true("training.deterministic: two runs give the same bits", same)
    usual = found[False]["first"] == found[False]["second"]
    cost = found[True]["ms"] / found[False]["ms"]
    row = result.table("Determinism", "what", "found")
    row("the same bits without training.deterministic", "yes" if usual else "no")
    row("time of a deterministic step over a usual one", f"{cost:.3f}")
    result.figures["deterministic / usual"] = cost


def repeat_steps(scale: Scale, *, deterministic: bool) -> None:
    """Train twice from the same start, and print a hash of each result and the time per step. Needs its own process."""
    if deterministic:
        use_deterministic_algorithms()
    config = step_config(scale.small, micro_batch=scale.micro_batch, deterministic=deterministic)
    found: dict[str, object] = {}
    for name in ("first", "second"):
        state = build_state(config, Mesh(scale.device))
        for step in range(3):
            train_step(state, random_batch(config, step), 1e-3)
        found[name] = [int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in state.model.parameters()]
    batch = random_batch(config, 0)
    found["ms"] = milliseconds(lambda: train_step(state, batch, 1e-4), scale.device, turns=8)
    print(json.dumps(found))
