"""Generate text with a trained model.

The continuation of a single --prompt is printed token by token. Several prompts, a prompt file or several samples give
one JSON line each, in the order of the prompts. Under torchrun the model is sharded over the ranks (tensor
parallelism).

Examples:
    megatron-tf generate runs/small --prompt "The quick brown" --temperature 0
    megatron-tf torchrun --nproc-per-node 2 -m megatron_tf.generate runs/small --prompt-file prompts.txt \\
        --output texts.jsonl
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from megatron_tf.commands.arguments import file_path, make_folder_of, make_parser, parse, read_text
from megatron_tf.commands.runner import command, import_late, say
from megatron_tf.errors import UserError

if TYPE_CHECKING:
    from megatron_tf.inference.text import Continuation
    from megatron_tf.parallel.mesh import Mesh

    ContinueBatch: TypeAlias = Callable[[Sequence[str], Sequence[int]], Iterator[tuple[int, str, Continuation]]]

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line."""

    checkpoint: Path
    prompt: list[str] | None
    prompt_file: Path | None
    output: Path | None
    num_samples: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: list[str]
    seed: int
    dtype: str
    tokenizer_model: Path | None


@command(
    interrupted="interrupted: the results written so far are kept",
    less_memory="lower --batch-size, choose --dtype bf16, or start more ranks",
)
def main(arguments: list[str] | None = None) -> int:
    """Generate continuations of the prompts."""
    generate(parse(_parser(), Options, arguments))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("generate", __doc__)
    add = parser.add_argument
    add("checkpoint", type=file_path, help="checkpoint, or directory of a run, whose newest one is used")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", help="text to continue")
    source.add_argument(
        "--prompt-file",
        type=file_path,
        help="text file with one prompt per line, of which empty ones are left out, or .jsonl file of objects with a "
        "key prompt, whose other keys are copied to the results (without this and --prompt, prompts are read from "
        "standard input, one per line)",
    )
    add("--output", type=file_path, help="write the results to this file as JSON lines")
    add("--batch-size", type=int, default=8, help="number of continuations that are generated together")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="type of weights and activations")
    add("--tokenizer-model", type=file_path, help="the tokenizer's file, if it has moved since training")
    _add_sampling_options(parser)
    return parser


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--num-samples", type=int, default=1, help="number of independent continuations of each prompt")
    add("--max-new-tokens", type=int, default=100, help="maximum number of new tokens per continuation")
    add("--temperature", type=float, default=1.0, help="sampling temperature; 0 always takes the most likely token")
    add("--top-k", type=int, default=0, help="sample from this many most likely tokens; 0 for all")
    add("--top-p", type=float, default=1.0, help="sample from the most likely tokens with this total probability")
    add("--stop", action="append", default=[], help="end the continuation where this text begins")
    add("--seed", type=int, default=0, help="random seed; the text of a prompt does not depend on the other prompts")


def generate(options: Options) -> None:
    """Read the prompts, generate their continuations and write them. Raises UserError for what a user can fix."""
    import_late("torch")  # imported here so that --help is fast
    from tqdm import tqdm

    from megatron_tf.inference.model import load_model
    from megatron_tf.inference.sampling import Sampling, seed_of_sample
    from megatron_tf.inference.text import Limits, continue_texts
    from megatron_tf.inference.tokenizer import load_tokenizer
    from megatron_tf.parallel.launch import number_of
    from megatron_tf.parallel.mesh import init_mesh
    from megatron_tf.tokenformer.dtypes import DTYPES

    # reject invalid options before loading the model, which takes minutes for a large one
    _check(options)
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    if options.num_samples > 1 and sampling.is_certain:
        raise UserError(
            f"--num-samples {options.num_samples} with --temperature {options.temperature:g} --top-k {options.top_k} "
            f"would give the same text {options.num_samples} times: choose a temperature above 0 and another top-k "
            f"than 1"
        )
    limits = Limits(options.max_new_tokens, options.stop)
    records = _read_records(options)
    mesh = init_mesh(tensor=number_of("WORLD_SIZE"), pipeline=1, data=1, timeout=TIMEOUT)
    # after initializing the process group: only the first rank has standard input, and sends it to the others
    records = records or [{"prompt": text} for text in _read_standard_input(mesh)]
    model = load_model(options.checkpoint, device=mesh.device, dtype=DTYPES[options.dtype], group=mesh.group("tp"))
    model.arrange_for_decoding()
    tokenizer = load_tokenizer(model, options.tokenizer_model)
    if mesh.is_first_rank:
        lengths = tokenizer.encode_batch([record["prompt"] for record in records]).lengths
        _warn_of_length(int(lengths.max()) + options.max_new_tokens, model.record.seq_length)

    def continue_batch(prompts: Sequence[str], numbers: Sequence[int]) -> Iterator[tuple[int, str, "Continuation"]]:
        # seeded by the sample's number, so that a text does not depend on the rest of its batch
        seeds = [seed_of_sample(options.seed, number) for number in numbers]
        return continue_texts(model, tokenizer, prompts, sampling=sampling, limits=limits, seed=seeds)

    # the other ranks do the same work, but print nothing
    with _opened(os.devnull if not mesh.is_first_rank else options.output) as out:
        if len(records) == options.num_samples == 1 and options.prompt_file is None and options.output is None:
            _stream(records[0]["prompt"], continue_batch, out)
        else:
            requests = _requests(records, options.num_samples)
            batches = [requests[i : i + options.batch_size] for i in range(0, len(requests), options.batch_size)]
            progress = tqdm(batches, unit="batch", disable=len(batches) == 1 or not mesh.is_first_rank)
            _write_lines(progress, continue_batch, out)


def _warn_of_length(longest: int, seq_length: int) -> None:
    if longest > seq_length:
        say(
            f"warning: a prompt and --max-new-tokens are up to {longest:,} tokens, but the model was trained on "
            f"sequences of {seq_length:,}: what it writes beyond them may make no sense"
        )


def _check(options: Options) -> None:
    """Raise UserError for invalid options, before anything is read."""
    from megatron_tf.checkpoint.destination import check_outside_checkpoints

    for name in ("batch_size", "num_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be 1 or more")
    if not -(2**63) <= options.seed < 2**63:
        raise UserError(f"--seed ({options.seed}) must be within 64 bits")
    if options.output is None and sys.stdout is None:
        raise UserError("the standard output is closed: give --output FILE")
    if options.output is not None:
        check_outside_checkpoints(options.output, "--output")
        make_folder_of(options.output)
        if options.prompt_file is not None and options.output.resolve() == options.prompt_file.resolve():
            raise UserError(f"--output {options.output} would replace --prompt-file: choose another file")


def _read_records(options: Options) -> list[dict[str, Any]]:
    """Read the prompts of --prompt-file or --prompt, if any. Raises UserError for one that is not text."""
    from megatron_tf.inference.text import check_text

    if options.prompt_file is not None:
        return _read_file(options.prompt_file)
    for number, text in enumerate(options.prompt or [], 1):
        check_text(text, f"--prompt, number {number}")
    return [{"prompt": text} for text in options.prompt or []]


def _stream(prompt: str, continue_batch: "ContinueBatch", out: TextIO) -> None:
    """Print the prompt and its continuation, token by token."""
    print(prompt, end="", file=out, flush=True)
    for _, piece, _ in continue_batch([prompt], [0]):
        print(piece, end="", file=out, flush=True)
    print(file=out)


def _requests(records: Sequence[dict[str, Any]], num_samples: int) -> list[tuple[dict[str, Any], int]]:
    """Return (record, sample number) for each continuation; with several samples, the record has the number too."""
    if num_samples == 1:
        return [(record, 0) for record in records]
    requests = []
    for record in records:
        requests += [(record | {"sample": number}, number) for number in range(num_samples)]
    return requests


def _write_lines(
    batches: Iterable[Sequence[tuple[dict[str, Any], int]]], continue_batch: "ContinueBatch", out: TextIO
) -> None:
    """Write a JSON line for each record, in order: its own keys, text, num_tokens and the reason why it ended."""
    for requests in batches:
        prompts = [record["prompt"] for record, _ in requests]
        numbers = [number for _, number in requests]
        texts = {i: text for i, _, text in continue_batch(prompts, numbers)}
        for i, (record, _) in enumerate(requests):
            found = {"text": texts[i].text, "num_tokens": texts[i].num_tokens, "finish_reason": texts[i].finish_reason}
            # flushed line by line, so that finished results are kept after an interruption
            print(json.dumps(record | found, ensure_ascii=False), file=out, flush=True)


def _read_file(path: Path) -> list[dict[str, Any]]:
    """Read records with a prompt each. Raises UserError naming the line without a valid one."""
    from megatron_tf.inference.text import check_text

    lines = read_text(path).split("\n")  # not splitlines: a prompt may contain U+2028 and other line separators
    if path.suffix != ".jsonl":
        return _not_empty([{"prompt": line} for line in lines if line], path)
    records = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise UserError(f'{path}, line {number} is not an object with a text as its "prompt"')
            # the whole record: its other keys are kept
            check_text(json.dumps(record, ensure_ascii=False), f"{path}, line {number}")
            records.append(record)
    return _not_empty(records, path)


def _not_empty(records: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    if not records:
        raise UserError(f"{path} holds no prompt")
    return records


def _read_standard_input(mesh: "Mesh") -> list[str]:
    """Return the non-empty lines of standard input, which the first rank reads. Raises UserError if there are none."""
    import torch
    import torch.distributed as dist

    lines = [_lines_of_standard_input() if mesh.is_first_rank else None]
    if mesh.world is not None:
        dist.broadcast_object_list(lines, 0, mesh.world, torch.device("cpu"))
    prompts = [line for line in lines[0] or [] if line]
    if not prompts:
        raise UserError("the standard input holds no prompt: give one there, with --prompt or with --prompt-file")
    return prompts


def _lines_of_standard_input() -> list[str]:
    """Return the lines of standard input; none if it is closed."""
    if sys.stdin is None:
        return []
    try:
        return sys.stdin.read().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"the standard input is not UTF-8 at byte {error.start:,}: {error.reason}") from None


def _opened(path: str | Path | None) -> AbstractContextManager[TextIO]:
    return nullcontext(sys.stdout) if path is None else Path(path).open("w", encoding="utf-8")
