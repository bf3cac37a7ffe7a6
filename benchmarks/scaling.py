"""Scaling in counts: what one of 1, 2, 4 and 8 ranks holds, exchanges and computes in a step, and when tokens grow.

Each row is the first rank's step of a small model, as a dry run does it; `tests/ranks/test_dry_run.py` compares what a
dry run counts with gloo ranks. The figures depend neither on the machine nor on its load:

    python benchmarks/scaling.py
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from megatron_tf.config import RunConfig, parse_config
from megatron_tf.training.dry_run.fake_world import fake_rank
from megatron_tf.training.dry_run.observed_step import held_tensors, observe_step
from megatron_tf.training.step.state import build_state

SIZES = (1, 2, 4, 8)
WIDTH = 64
_aten = torch.ops.aten
PRODUCTS = (_aten.mm, _aten.addmm, _aten.addmm_)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step on some ranks, all on one axis of the mesh."""

    axis: str
    """tp, cp, pp or dp."""
    ranks: int = 1
    tokens: int = 1
    """How many times as many parameter tokens as at first: 64 for each projection and 256 for the ffn."""
    layers: int = 8
    batch: int = 16
    """Samples of a step, on all ranks, in micro-batches of two."""
    length: int = 64
    """Tokens of each sample."""

    @property
    def ranks_on(self) -> dict[str, int]:
        """Return the ranks on each axis."""
        return {axis: self.ranks if axis == self.axis else 1 for axis in ("tp", "cp", "pp", "dp")}


@dataclass(frozen=True)
class Counts:
    """What the first rank does in one step."""

    messages: int
    """On the axis."""
    message_bytes: int
    """The larger side of each message: what an all-gather returns, what a reduce-scatter takes."""
    flops: int
    """Of matrix products outside attention."""
    held_bytes: int
    """Parameters and Adam moments."""
    peak_bytes: int


def cases() -> Iterator[tuple[str, list[Case]]]:
    """Yield a title and its cases: strong scaling, weak scaling and growth on two ranks, for each axis."""
    names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "dp": "data"}
    weak = {"tp": "tokens", "cp": "length", "pp": "layers", "dp": "batch"}
    for axis, name in names.items():
        base = Case(axis=axis, batch=2 if axis == "dp" else 16)
        whole = replace(base, batch=16)
        yield f"{name} parallel, strong", [replace(whole, ranks=ranks) for ranks in SIZES]
        key = weak[axis]
        more: list[Any] = [{key: getattr(base, key) * ranks} for ranks in SIZES]
        scaled = [replace(base, ranks=ranks, **keys) for ranks, keys in zip(SIZES, more, strict=True)]
        yield f"{name} parallel, weak: {key} in proportion to the ranks", scaled
        yield f"{name} parallel, growth on two ranks", [replace(whole, ranks=2, tokens=tokens) for tokens in SIZES]


def make_config(case: Case) -> RunConfig:
    """Configure the case, in bf16."""
    ranks = case.ranks_on
    tokens = {"qkv_tokens": WIDTH * case.tokens, "proj_tokens": WIDTH * case.tokens, "ffn_tokens": 256 * case.tokens}
    values = {
        "model": {
            "num_layers": case.layers,
            "hidden_size": WIDTH,
            "num_attention_heads": 8,
            "vocab_size": 256,
            "untie_embeddings_and_output_weights": True,
            **tokens,
        },
        "training": {
            "seq_length": case.length,
            "micro_batch_size": 2,
            "global_batch_size": case.batch,
            "train_iters": 1,
            "precision": "bf16",
        },
        "optimizer": {"lr": 1e-3},
        "data": {"data_path": ["unused"], "tokenizer_type": "NullTokenizer", "order": "counter"},
        "parallel": {
            "tensor_model_parallel_size": ranks["tp"],
            "context_parallel_size": ranks["cp"],
            "pipeline_model_parallel_size": ranks["pp"],
            "data_parallel_size": ranks["dp"],
            "sequence_parallel": ranks["tp"] > 1,
        },
        "kernels": {"pattention": "eager"},
    }
    return parse_config(RunConfig, values, "benchmark")


def count(case: Case) -> Counts:
    """Run a step of the first rank, and count what it does."""
    config, ranks = make_config(case), case.ranks_on
    with fake_rank(0, tensor=ranks["tp"], context=ranks["cp"], pipeline=ranks["pp"], data=ranks["dp"]) as mesh:
        state = build_state(config, mesh)
        held = sum(tensor.nbytes for tensor in held_tensors(state))
        # the flop counter knows no product that is added in place
        with FlopCounterMode(display=False, custom_mapping={_aten.addmm_: _added_flops}) as products:
            observation = observe_step(state, config)
    axes = (case.axis, "dp_cp") if case.axis == "cp" else (case.axis,)
    traffic = [each for each in observation.counter.traffic() if each.axis in axes]
    by_operation = products.get_flop_counts()["Global"]
    return Counts(
        messages=sum(each.calls for each in traffic),
        message_bytes=sum(each.bytes for each in traffic),
        flops=sum(flops for operation, flops in by_operation.items() if operation in PRODUCTS),
        held_bytes=held,
        peak_bytes=observation.meter.peak,
    )


def _added_flops(total: Any, a: Any, b: Any, **options: Any) -> int:
    """Return the FLOPs of total += a b, given the shapes."""
    return int(mm_flop(a, b))


def main() -> None:
    """Print a table for each way to scale."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for title, rows in cases():
        print(f"\n{title}\n")
        print("| ranks | tokens | layers | batch x length | messages | kB | MFLOP | held, kB | peak, kB |")
        print("|---|---|---|---|---|---|---|---|---|")
        for case in rows:
            counts = count(case)
            print(
                f"| {case.ranks} | x {case.tokens} | {case.layers} | {case.batch} x {case.length} "
                f"| {counts.messages:,} | {counts.message_bytes / 1e3:,.0f} | {counts.flops / 1e6:,.0f} "
                f"| {counts.held_bytes / 1e3:,.0f} | {counts.peak_bytes / 1e3:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
