"""What measuring old and new rows costs: steps with and without, taken in pairs in one process.

The model has grown twice. A measured step happens every LoggingConfig.log_interval steps, so its extra time is divided
by that; the result fails beyond 2% of a step: python benchmarks/row_metrics.py
"""

import argparse
import statistics
import sys
import time

import torch

from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.config import LoggingConfig, RunConfig, parse_config
from megatron_tf.data.batch import Batch
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.parameters import model_parameters
from megatron_tf.training.step.row_inspector import RowInspector
from megatron_tf.training.step.state import TrainState, build_state
from megatron_tf.training.step.step import train_step

MOST = 0.02
"""The part of a step that the metrics may take, averaged over steps."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {"cpu": (256, 6, 2048, 256, 4), "cuda": (768, 12, 32768, 1024, 16)}
"""Device -> width, layers, vocabulary, sequence length, samples of a micro-batch."""


def build(precision: str) -> tuple[RunConfig, TrainState]:
    """Build a model of which a third of the tokens are old and a third are of each growth."""
    width, layers, vocabulary, seq_length, batch = SIZES[DEVICE.type]
    training = {"seq_length": seq_length, "micro_batch_size": batch, "global_batch_size": batch, "train_iters": 1000}
    model = {"num_layers": layers, "hidden_size": width, "num_attention_heads": 8, "vocab_size": vocabulary}
    tokens = {"qkv_tokens": 3 * width // 2, "proj_tokens": 3 * width // 2, "ffn_tokens": 6 * width}
    values = {
        "model": model | tokens,
        "training": training | {"precision": precision},
        "optimizer": {"lr": 1e-3},
        "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer"},
    }
    config = parse_config(RunConfig, values, "benchmark")
    state = build_state(config, Mesh(DEVICE))
    runs = {}
    for name, parameter in model_parameters(config.model).items():
        parts = [parameter.shape[0]] if not parameter.has_units else [parameter.shape[0] // 3] * 3
        runs[name] = [Run(count, Generation(growth=growth)) for growth, count in enumerate(parts)]
    state.optimizer.generations = Generations.of_runs(runs)
    return config, state


def seconds(state: TrainState, batch: Batch, inspector: RowInspector | None) -> float:
    """Measure one step, including synchronization with the device."""
    start = time.perf_counter()
    train_step(state, batch, lr=1e-3, inspector=inspector)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    """Print the medians of a step and of the extra time of a measured one; return 1 if the part is above MOST."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    config, state = build(args.precision)
    inspector = RowInspector(state.optimizer)
    training, vocabulary = config.training, config.model.vocab_size
    size = 1, training.micro_batch_size, training.seq_length + 1
    ids = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.arange(size[1])[None], size[1] * training.seq_length)
    plain, extra = [], []
    for pair in range(args.pairs + 1):
        order = (None, inspector) if pair % 2 else (inspector, None)
        times = {each is not None: seconds(state, batch, each) for each in order}
        if pair:  # the first pair warms up
            plain.append(times[False])
            extra.append(times[True] - times[False])
    step, more = statistics.median(plain), statistics.median(extra)
    interval = LoggingConfig().log_interval
    part = more / interval / step
    print(f"{DEVICE.type}, {args.precision}: a step {1e3 * step:.1f} ms, a measured one {1e3 * more:+.1f} ms")
    print(f"at one in {interval} steps: {part:.2%} of a step (limit {MOST:.0%})")
    return int(part > MOST)


if __name__ == "__main__":
    sys.exit(main())
