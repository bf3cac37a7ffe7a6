"""How well `megatron-tf plan --calibrate` predicts this machine: memory, step times, and which layout is the fastest.

    python benchmarks/planner.py                  # all three, on an idle machine with two cores: about half an hour
    python benchmarks/planner.py --only memory    # or time, or choice

Each run is one or two processes of its own with one thread each. The growth of a process's peak memory is that from
right before the model is built, after a step of a tiny one, to the end of a few steps: once with a malloc of glibc that
returns large blocks at once, and once with its usual one, which keeps some of them in its heap. The parts of each
model, the optimizer and gloo are measured as the command does it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_tf.config import RunConfig, parse_config
from megatron_tf.data.batch import Batch
from megatron_tf.parallel.mesh import Mesh, build_mesh
from megatron_tf.planning.calibrate import CPU, MeasuredMachine
from megatron_tf.planning.candidates import find_candidates
from megatron_tf.planning.counts import PartCounter
from megatron_tf.planning.layout import PlannedLayout
from megatron_tf.planning.memory import peak_memory
from megatron_tf.planning.network import measure_network
from megatron_tf.planning.time import step_time
from megatron_tf.training.dry_run.dry_run import layout_of
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step

STEPS = 5
TIME_ROUNDS = 3
"""Calibrations that step times are compared with."""
FINALISTS, ROUNDS = 4, 5
"""Of the comparison of layouts: how many are measured again, and how often."""
MALLOC_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""Environment variable of glibc: bytes of the smallest block that malloc returns to the system once it is freed."""
WIDE = {"num_layers": 8, "hidden_size": 1024, "qkv_tokens": 1024, "proj_tokens": 1024, "ffn_tokens": 4096}
DEEP = {"num_layers": 8, "hidden_size": 256, "qkv_tokens": 256, "proj_tokens": 256, "ffn_tokens": 1024}
SMALL = DEEP | {"num_layers": 4}
PLAIN = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
SHORT = {"seq_length": 128, "micro_batch_size": 1, "global_batch_size": 1}
LONG = {"seq_length": 1024, "micro_batch_size": 8, "global_batch_size": 8}
MEDIUM = {"seq_length": 256, "micro_batch_size": 4, "global_batch_size": 8}
TENSOR = {"tensor_model_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2, "pipeline_schedule": "1f1b"}


@dataclass(frozen=True)
class Case:
    """A run on one or two ranks."""

    name: str
    model: dict[str, Any]
    training: dict[str, Any]
    parallel: dict[str, Any] | None = None
    """None for one rank; {} for two data-parallel ones."""

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return 1 if self.parallel is None else 2

    @property
    def config(self) -> RunConfig:
        """Return its configuration."""
        values = {
            "model": {"num_attention_heads": 8, "vocab_size": 8192, **self.model},
            "training": {"train_iters": 1000, **self.training},
            "optimizer": {"lr": 1e-3},
            "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer"},
            "parallel": self.parallel or {},
        }
        return parse_config(RunConfig, values, self.name)


MEMORY = [
    Case("parameters", WIDE, SHORT),
    Case("parameters, bf16", WIDE, SHORT | {"precision": "bf16"}),
    Case("parameters, transformer", WIDE | PLAIN, SHORT),
    Case("vocabulary, untied", DEEP | {"vocab_size": 131072, "untie_embeddings_and_output_weights": True}, SHORT),
    Case("activations", DEEP, LONG),
    Case("activations, bf16", DEEP | {"num_layers": 12}, LONG | {"precision": "bf16"}),
    Case("activations, selective", DEEP | {"num_layers": 16}, LONG | {"recompute_granularity": "selective"}),
    Case("tensor parallel", WIDE, SHORT, TENSOR),
    Case("pipeline parallel", WIDE, SHORT | {"global_batch_size": 2}, PIPELINE),
    Case("data parallel", WIDE, SHORT | {"global_batch_size": 2}, {}),
]
"""Each needs at least 1 GB on a rank."""
TIME = [
    Case("small", SMALL, MEDIUM),
    Case("small, bf16", SMALL, MEDIUM | {"precision": "bf16"}),
    Case("small, one sample", SMALL, MEDIUM | {"micro_batch_size": 1}),
    Case("deep, recomputed", DEEP, MEDIUM | {"recompute_granularity": "full"}),
    Case("wide", WIDE | {"num_layers": 2}, MEDIUM | {"micro_batch_size": 2, "global_batch_size": 2}),
    Case("small, tensor parallel", SMALL, MEDIUM, TENSOR),
    Case("deep, tensor and sequence parallel", DEEP, MEDIUM, TENSOR | {"sequence_parallel": True}),
    Case("small, data parallel", SMALL, MEDIUM, {}),
    Case("deep, data parallel", DEEP, MEDIUM | {"global_batch_size": 16}, {}),
    Case("deep, pipeline parallel", DEEP, MEDIUM | {"global_batch_size": 16}, PIPELINE),
]
CHOICE = Case("choice", SMALL, {"seq_length": 256, "micro_batch_size": 1, "global_batch_size": 8})


@dataclass(frozen=True)
class Measured:
    """What the ranks of a run did."""

    seconds: float
    """Median of the steps, of the slowest rank."""
    peak_bytes: int
    """Growth of the peak memory of the fullest rank."""


def measure(config: RunConfig, ranks: int) -> Measured:
    """Train a few steps on `ranks` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_train, args=(config, ranks, folder), nprocs=ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return Measured(max(each["seconds"] for each in found), max(each["bytes"] for each in found))


def _train(rank: int, config: RunConfig, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    mesh = Mesh(CPU)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
        layout = layout_of(config, ranks)
        mesh = build_mesh(
            CPU,
            tensor=layout.tensor,
            pipeline=layout.pipeline,
            data=layout.data,
            context=layout.context,
            shard_size=layout.shard_size,
        )
    _run(_tiny(config), mesh, steps=1)  # imports what is imported on first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    times = _run(config, mesh, steps=STEPS + 1)
    found = {"seconds": statistics.median(times[1:]), "bytes": _status("VmHWM") - before}
    torch.save(found, Path(folder) / f"{rank}.pt")
    if ranks > 1:
        dist.destroy_process_group()


def _tiny(config: RunConfig) -> RunConfig:
    """Return the same run with a tiny model."""
    tokens: Any = {f"{kind}_tokens": 8 for kind in config.model.token_kinds}
    return replace(config, model=replace(config.model, hidden_size=128, vocab_size=128, **tokens))


def _run(config: RunConfig, mesh: Mesh, *, steps: int) -> list[float]:
    """Train, and return the time of each step."""
    state, times = build_state(config, mesh), []
    for _ in range(steps):
        batch = _batch(config, mesh)
        if mesh.world is not None:
            dist.barrier()
        start = time.perf_counter()
        train_step(state, batch, config.optimizer.lr)
        times.append(time.perf_counter() - start)
    return times


def _status(key: str) -> int:
    """Return a number of bytes of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _batch(config: RunConfig, mesh: Mesh) -> Batch:
    training = config.training
    count = training.global_batch_size // (training.micro_batch_size * mesh.size("dp"))
    ids = torch.randint(config.model.vocab_size, (count, training.micro_batch_size, training.seq_length + 1))
    numbers = torch.arange(count * training.micro_batch_size).view(count, training.micro_batch_size)
    return Batch(ids, numbers, numbers.numel() * training.seq_length)


class Planner:
    """Predicts step times with one calibration."""

    def __init__(self) -> None:
        self.counter = PartCounter(CPU)
        self.machines = {1: MeasuredMachine(None), 2: MeasuredMachine(measure_network())}

    def seconds(self, planned: PlannedLayout) -> float:
        """Predict the time of a step."""
        return step_time(planned, self.machines[planned.world_size], self.counter).total


def compare_memory() -> None:
    """Print predicted and measured peaks in MB."""
    counter = PartCounter(CPU)
    for malloc, environment in {"returns large blocks": {MALLOC_THRESHOLD: "65536"}, "keeps some": {}}.items():
        os.environ.update(environment)
        print("\n| run | ranks | predicted | measured | error |\n|---|---|---|---|---|")
        errors = []
        for case in MEMORY:
            predicted = peak_memory(PlannedLayout(case.config, case.ranks), counter).bytes
            measured = measure(case.config, case.ranks).peak_bytes
            errors.append(predicted / measured - 1)
            numbers = f"{predicted / 1e6:,.0f} | {measured / 1e6:,.0f} | {errors[-1]:+.1%}"
            print(f"| {case.name} | {case.ranks} | {numbers} |", flush=True)
        os.environ.pop(MALLOC_THRESHOLD, None)
        print(f"\nlargest error of the peak if malloc {malloc}: {max(map(abs, errors)):.1%}")


def compare_times() -> None:
    """Print predicted and measured step times in milliseconds: medians over the rounds, and the error of each round."""
    rounds = [_round_of_times() for _ in range(TIME_ROUNDS)]
    print("\n| run | ranks | predicted | measured | error | in each round |\n|---|---|---|---|---|---|")
    errors = []
    for case, found in zip(TIME, zip(*rounds, strict=True), strict=True):
        predicted, measured = (statistics.median(times) for times in zip(*found, strict=True))
        errors.append(predicted / measured - 1)
        each = ", ".join(f"{one / other - 1:+.1%}" for one, other in found)
        numbers = f"{predicted * 1e3:,.0f} | {measured * 1e3:,.0f} | {errors[-1]:+.1%} | {each}"
        print(f"| {case.name} | {case.ranks} | {numbers} |")
    medians = [statistics.median(abs(one / other - 1) for one, other in found) for found in rounds]
    print(f"\nmedian error of the time: {statistics.median(map(abs, errors)):.1%}; of one calibration: ", end="")
    print(*(f"{median:.1%}" for median in medians), sep=", ")


def _round_of_times() -> list[tuple[float, float]]:
    """Calibrate, and return the predicted and the measured seconds of each case."""
    start = time.perf_counter()
    planner = Planner()
    print(f"gloo measured in {time.perf_counter() - start:.0f} s", flush=True)
    found = []
    for case in TIME:
        predicted = planner.seconds(PlannedLayout(case.config, case.ranks))
        found.append((predicted, measure(case.config, case.ranks).seconds))
    return found


def compare_choice() -> None:
    """Measure every layout of one and two ranks, and print where the predicted best one is among them.

    It and the fastest ones are then measured again in turns: one measurement of each would choose the luckiest.
    """
    found = sorted(_choices(Planner()), key=lambda each: each[1])
    print("\n| layout | predicted s | measured s |\n|---|---|---|")
    once = []
    for planned, predicted in found:
        once.append(measure(planned.config, planned.world_size).seconds)
        print(f"| {_describe(planned)} | {predicted:.3f} | {once[-1]:.3f} |", flush=True)
    fastest = sorted(range(len(found)), key=once.__getitem__)[:FINALISTS]
    finalists = [found[number][0] for number in sorted({0, *fastest})]
    rounds = [[measure(each.config, each.world_size).seconds for each in finalists] for _ in range(ROUNDS)]
    times = [statistics.median(each) for each in zip(*rounds, strict=True)]
    print(
        f"\n| the predicted best and the {FINALISTS} fastest, again | median s | lowest | highest |\n|---|---|---|---|"
    )
    for planned, median, each in zip(finalists, times, zip(*rounds, strict=True), strict=True):
        print(f"| {_describe(planned)} | {median:.3f} | {min(each):.3f} | {max(each):.3f} |")
    print(f"\nthe predicted best layout takes {times[0] / min(times):.3f} times the time of the best of {len(found)}")


def _choices(planner: Planner) -> Iterator[tuple[PlannedLayout, float]]:
    for ranks in (1, 2):
        for planned in find_candidates(CHOICE.config, world_size=ranks, ranks_per_node=2).layouts:
            yield planned, planner.seconds(planned)


def _describe(planned: PlannedLayout) -> str:
    layout, training = planned.layout, planned.config.training
    mesh = f"tp {layout.tensor} pp {layout.pipeline} dp {layout.data}/{layout.shard_size}"
    schedule = f" {planned.config.parallel.pipeline_schedule}" if layout.pipeline > 1 else ""
    return f"{mesh}{schedule}, micro-batch {training.micro_batch_size}, {training.recompute_granularity}"


PARTS = {"memory": compare_memory, "time": compare_times, "choice": compare_choice}


def main() -> int:
    """Run the chosen comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PARTS], help="one of the comparisons (default: all)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in [options.only] if options.only else PARTS:
        PARTS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
