"""What a layer waits for on a tensor-parallel rank, with its messages on their way during products and without.

One rank of a world that exchanges nothing computes a layer on this machine, and its messages take as long as they would
on a link of a given rate, one after the other. So it shows what the code overlaps, with no other rank on these cores:

    python benchmarks/overlap.py --gigabytes-per-second 2 1 0.5 0.25 --chunks 1 2 4
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.config import ModelConfig, parse_config
from megatron_tf.layers import token_chunks
from megatron_tf.layers.pattention import Pattention
from megatron_tf.layers.rotary import rotary_tables
from megatron_tf.model.block import Block
from megatron_tf.parallel import collectives
from megatron_tf.parallel.collectives import Pending
from megatron_tf.training.dry_run.fake_world import fake_rank

WIDTH, LENGTH, SAMPLES, RANKS, ROUNDS = 512, 1024, 2, 2, 7
MODEL = {
    "num_layers": 1,
    "hidden_size": WIDTH,
    "num_attention_heads": 8,
    "qkv_tokens": WIDTH,
    "proj_tokens": WIDTH,
    "ffn_tokens": 4 * WIDTH,
    "vocab_size": 64,
}


class Link:
    """A link that carries one message after the other, without using a core."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self.free_at = self.waited = 0.0

    def send(self, size: float) -> "Message":
        """Start a message of `size` bytes."""
        self.free_at = max(self.free_at, time.perf_counter()) + size / self.bytes_per_second
        return Message(self, self.free_at)


class Message:
    """A message on its way, which takes the place of a `dist.Work`."""

    def __init__(self, link: Link, arrives_at: float) -> None:
        self.link = link
        self.arrives_at = arrives_at

    def wait(self) -> None:
        """Sleep until it has arrived."""
        left = max(0.0, self.arrives_at - time.perf_counter())
        time.sleep(left)
        self.link.waited += left


@contextmanager
def messages_over(link: Link, *, overlap: bool) -> Iterator[None]:
    """Let collectives take their time on the link; without `overlap`, wait for each of them at once."""

    def timed(collective: Callable[..., Any], sends_of: Callable[..., float]) -> Callable[..., Any]:
        def run(*tensors: Tensor, async_op: bool = False, **options: Any) -> Message | None:
            collective(*tensors, **options)
            message = link.send(sends_of(*tensors))
            if not async_op:
                message.wait()
            return message if async_op else None

        return run

    share = (RANKS - 1) / RANKS
    gather = timed(collectives._all_gather_single, lambda out, _: share * out.nbytes)
    scatter = timed(collectives._reduce_scatter_single, lambda _, sent: share * sent.nbytes)
    with ExitStack() as stack:
        stack.enter_context(patch.object(collectives, "_all_gather_single", gather))
        stack.enter_context(patch.object(collectives, "_reduce_scatter_single", scatter))
        stack.enter_context(patch.object(dist, "all_reduce", timed(dist.all_reduce, lambda x: 2 * share * x.nbytes)))
        for name in ("start_all_gather", "start_all_reduce", "start_reduce_scatter") if not overlap else ():
            stack.enter_context(patch.object(token_chunks, name, _at_once(getattr(token_chunks, name))))
        yield


def _at_once(start: Callable[..., Pending]) -> Callable[..., Pending]:
    return lambda *arguments, is_asynchronous, **options: start(*arguments, is_asynchronous=False, **options)


@dataclass(frozen=True)
class Way:
    """A way to send the messages of a layer."""

    name: str
    chunks: int = 1
    overlap: bool = True
    sends: bool = True


Times = tuple[float, float]
"""Seconds of a pass, and how many of them it waits."""


def measure(ways: Sequence[Way], *, sequence_parallel: bool, bytes_per_second: float) -> list[tuple[Times, Times]]:
    """Return the median times of forward and of backward, for each way."""
    found: list[list[tuple[Times, Times]]] = [[] for _ in ways]
    with fake_rank(0, tensor=RANKS, pipeline=1, data=1, device=torch.device("cpu")) as mesh:
        config = parse_config(ModelConfig, MODEL, "benchmark")
        block = Block(config, 0, group=mesh.group("tp"), sequence_parallel=sequence_parallel)
        pattentions = [module for module in block.modules() if isinstance(module, Pattention)]
        rows = LENGTH // RANKS if sequence_parallel else LENGTH
        x = torch.randn(rows, SAMPLES, WIDTH, requires_grad=True)
        rotary = rotary_tables(torch.arange(LENGTH)[:, None], 16, 10000.0, dtype=torch.float32)
        for _ in range(ROUNDS + 1):
            for way, times in zip(ways, found, strict=True):
                for pattention in pattentions:
                    pattention.message_chunks = way.chunks
                link = Link(bytes_per_second if way.sends else float("inf"))
                with messages_over(link, overlap=way.overlap):
                    start = time.perf_counter()
                    y = block(x, rotary)
                    forward = time.perf_counter() - start, link.waited
                    link.waited, start = 0.0, time.perf_counter()
                    y.backward(torch.ones_like(y))
                    times.append((forward, (time.perf_counter() - start, link.waited)))
    # the first round allocates
    return [(_medians(each[0] for each in times[1:]), _medians(each[1] for each in times[1:])) for times in found]


def _medians(found: Iterable[Times]) -> Times:
    seconds, waited = zip(*found, strict=True)
    return statistics.median(seconds), statistics.median(waited)


def main() -> None:
    """Print a table for each pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes-per-second", type=float, nargs="+", default=[2.0, 1.0, 0.5, 0.25])
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4], help="of parallel.tp_comm_overlap_chunks")
    arguments = parser.parse_args()
    ways = [Way("none", sends=False), Way("waited for at once", overlap=False)]
    ways += [Way(f"{chunks} chunk(s)", chunks) for chunks in arguments.chunks]
    cases = list(itertools.product((False, True), arguments.gigabytes_per_second))
    found = [measure(ways, sequence_parallel=case[0], bytes_per_second=case[1] * 1e9) for case in cases]
    for number, name in enumerate(("Forward", "Backward")):
        print(f"\n{name} of a layer, milliseconds; in brackets those that it waits for messages\n")
        print(f"| messages | GB/s | {' | '.join(way.name for way in ways)} |\n|{'---|' * (2 + len(ways))}")
        for (sequence_parallel, rate), passes in zip(cases, found, strict=True):
            cells = [
                f"{1000 * seconds:.0f} ({1000 * waited:.0f})" for seconds, waited in (each[number] for each in passes)
            ]
            print("|", " | ".join(["`sequence_parallel`" if sequence_parallel else "whole", f"{rate:g}", *cells]), "|")


if __name__ == "__main__":
    main()
