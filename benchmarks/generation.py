"""Time to decode a token, against reading the model's weights once: python benchmarks/generation.py

The model has the shape of the published 150M model, or with --shape 2M one of 2.1 million parameters, and random
weights; a prompt of 32 tokens, or several (--texts, --prompt), is continued token by token. Reading is torch.sum over
the weights' own bytes as fp32 (other memory was up to 1.4 times as fast or slow), with the same threads. The two
alternate: times are the fastest, and the ratio is given both of these and as the median over all turns, which varies
less on a shared machine. With one thread it is CPU time, which excludes other processes, otherwise wall-clock time.
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

TURNS = 60
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


SHAPES = {
    "150M": ModelConfig(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=50277,
        qkv_tokens=768,
        proj_tokens=768,
        ffn_tokens=3072,
    ),
    "2M": ModelConfig(
        num_layers=6,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=4096,
        qkv_tokens=128,
        proj_tokens=128,
        ffn_tokens=512,
    ),
}


def random_model(shape: str, dtype: torch.dtype) -> LanguageModel:
    """Return a model of a shape with random weights."""
    config = SHAPES[shape]
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


def measure(precision: str, *, shape: str, texts: int, prompt: int) -> None:
    """Print a line of the table, in a separate process."""
    model = random_model(shape, DTYPES[precision])
    model.arrange_for_decoding()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    bytes_of = [torch.empty(0).set_(p.untyped_storage()) for p in model.parameters()]

    def read() -> None:
        for weights in bytes_of:
            weights.sum()

    generation = Generation(model, [list(range(prompt))] * texts, Sampling(temperature=0))
    generation.step()
    turns = [(seconds(read), seconds(generation.step)) for _ in range(TURNS)]
    reading, decoding = (1000 * min(times) for times in zip(*turns, strict=True))
    median = statistics.median(decode / read for read, decode in turns)
    figures = [f"{size / 1e6 / reading:.1f} GB/s", f"{reading:.2f} ms", f"{decoding:.2f} ms"]
    figures += [f"{decoding / reading:.2f}", f"{median:.2f}"]
    print(f"| {precision} | {torch.get_num_threads()} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    """Run each precision in a separate process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", choices=SHAPES, default="150M")
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32, help="tokens in the cache at the start")
    parser.add_argument("--run", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(args.threads[0])
        measure(args.run, shape=args.shape, texts=args.texts, prompt=args.prompt)
        return
    columns = ["", "threads", "reading", "weights once", "a token", "ratio", "median ratio"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for precision in DTYPES:
        for threads in args.threads:
            command = [sys.executable, __file__, "--threads", str(threads), "--run", precision, "--shape", args.shape]
            command += ["--texts", str(args.texts), "--prompt", str(args.prompt)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
