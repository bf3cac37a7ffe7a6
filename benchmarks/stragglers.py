"""What comparing the ranks costs: steps with and without, taken in pairs on two ranks, and the rule for 1,024 ranks.

A comparison happens every LoggingConfig.log_interval steps, so its time is divided by that; the result fails beyond
0.5% of a step: python benchmarks/stragglers.py
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tf.config import LoggingConfig, RunConfig, parse_config
from megatron_tf.data.batch import Batch
from megatron_tf.parallel.mesh import build_mesh
from megatron_tf.training.observability.stragglers import PHASES, StragglerDetector, slowest_rank
from megatron_tf.training.step.state import build_state
from megatron_tf.training.step.step import train_step

MOST = 0.005
"""The part of a step that the comparison may take, averaged over steps."""
RANKS = 2


def make_config() -> RunConfig:
    """Configure a small model on tensor-parallel ranks."""
    model = {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1024}
    values = {
        "model": model | {"qkv_tokens": 128, "proj_tokens": 128, "ffn_tokens": 512},
        "training": {"seq_length": 128, "micro_batch_size": 4, "global_batch_size": 4, "train_iters": 1000},
        "optimizer": {"lr": 1e-3},
        "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer"},
        "parallel": {"tensor_model_parallel_size": RANKS},
    }
    return parse_config(RunConfig, values, "benchmark")


def measure(rank: int, store: str, pairs: int, results: "Queue[tuple[list[float], list[float]]]") -> None:
    """Put the seconds of steps without and with a comparison, as measured by the first rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = build_mesh(torch.device("cpu"), tensor=RANKS, pipeline=1, data=1)
    config = make_config()
    state, detector = build_state(config, mesh), StragglerDetector(mesh)
    size = 1, config.training.micro_batch_size, config.training.seq_length + 1
    ids = torch.randint(1024, size, generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.arange(size[1])[None], size[1] * config.training.seq_length)
    times: tuple[list[float], list[float]] = [], []
    for pair in range(pairs + 3):
        for is_compared in (False, True) if pair % 2 else (True, False):
            dist.barrier()
            start = time.perf_counter()
            train_step(state, batch, 1e-3)
            if is_compared:
                detector.on_profile(1.0, 0.5)
                detector.find_slowest({"data": 0.1, "report": 0.1}, 10)
            if pair >= 3:  # the first ones warm up
                times[is_compared].append(time.perf_counter() - start)
    if rank == 0:
        results.put(times)
    dist.destroy_process_group()


def main() -> int:
    """Print the medians; return 1 if the part of a step is above MOST."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [context.Process(target=measure, args=(i, store, args.pairs, results)) for i in range(RANKS)]
        for process in ranks:
            process.start()
        plain, compared = results.get()
        for process in ranks:
            process.join()
    step, more = statistics.median(plain), statistics.median(b - a for a, b in zip(plain, compared, strict=True))
    interval = LoggingConfig().log_interval
    part = more / interval / step
    print(f"a step {1e3 * step:.1f} ms, a comparison {1e3 * more:+.2f} ms on {RANKS} ranks")
    print(f"at one in {interval} steps: {part:.3%} of a step (limit {MOST:.1%})")
    everyone = torch.rand(8, 128, len(PHASES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    for _ in range(100):
        slowest_rank(everyone)
    print(f"the rule for 1,024 ranks in 8 stages: {10 * (time.perf_counter() - start):.2f} ms")
    return int(part > MOST)


if __name__ == "__main__":
    sys.exit(main())
