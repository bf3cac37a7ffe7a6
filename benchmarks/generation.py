"""Time to decode a token, against reading the model's weights once: python benchmarks/generation.py

The model has the shape of the published 150M model, and random weights; a prompt of 32 tokens is continued token by
token. Reading is torch.sum over the weights' own bytes as fp32 (other memory was up to 1.4 times as fast or slow), with
the same threads. The two alternate: times are the fastest, and the ratio is given both of these and as the median over
all turns, which varies less on a shared machine. With one thread it is CPU time, which excludes other processes,
otherwise wall-clock time.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.model import LanguageModel
from megatron_tf.inference.sampling import Sampling
from megatron_tf.model.tokenformer import TokenFormer

PROMPT, TURNS = 32, 60
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_150m(dtype: torch.dtype) -> LanguageModel:
    """Return a model of the published 150M shape with random weights."""
    tokens = {"qkv_tokens": 768, "proj_tokens": 768, "ffn_tokens": 3072}
    config = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, vocab_size=50277, **tokens)
    transformer = TokenFormer(config, dtype=dtype).to(dtype)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.normal_(0.0, 0.02)
    return LanguageModel(transformer, RunRecord(model=config, config={}, tau={}, tokenizer={})).eval()


def seconds(act: Callable[[], object]) -> float:
    """Measure one call, in seconds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    act()
    return clock() - start


def measure(precision: str) -> None:
    """Print a line of the table, in a separate process."""
    model = random_150m(DTYPES[precision])
    model.arrange_for_decoding()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    bytes_of = [torch.empty(0).set_(p.untyped_storage()) for p in model.parameters()]

    def read() -> None:
        for weights in bytes_of:
            weights.sum()

    generation = Generation(model, [list(range(PROMPT))], Sampling(temperature=0))
    generation.step()
    turns = [(seconds(read), seconds(generation.step)) for _ in range(TURNS)]
    reading, decoding = (1000 * min(times) for times in zip(*turns, strict=True))
    median = statistics.median(decode / read for read, decode in turns)
    figures = [f"{size / 1e6 / reading:.1f} GB/s", f"{reading:.1f} ms", f"{decoding:.1f} ms"]
    figures += [f"{decoding / reading:.2f}", f"{median:.2f}"]
    print(f"| {precision} | {torch.get_num_threads()} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    """Run each precision in a separate process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--run", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(args.threads[0])
        measure(args.run)
        return
    columns = ["", "threads", "reading", "weights once", "a token", "ratio", "median ratio"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for precision in DTYPES:
        for threads in args.threads:
            command = [sys.executable, __file__, "--threads", str(threads), "--run", precision]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
