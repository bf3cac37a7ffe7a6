"""Speed of tools/preprocess_data.py: seconds = fixed + bytes / rate, next to its engine alone and Megatron-LM's tools.

    python benchmarks/data/preprocess.py TOKENIZER SHARD.jsonl.zst ... [--megatron CHECKOUT] [--workers N]

Every contestant runs as a process of its own on the first 1, 2, 5, ... shards, as one file, all of them in turn in each
round. The least wall time and the least CPU time of the rounds are fitted by a line. The engine alone encodes the same
batches of texts from memory, and only that is timed. Megatron-LM's tools read the same text as .jsonl; the fast one
must write the same ids. preprocess_data.py is slow and reads the first 500 and 1,000 lines. package_text.py makes text
that does not repeat; repetitive text favors an engine that caches words.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from backports import zstd

from megatron_tf.data.bpe_engine import Engine, is_settled
from megatron_tf.data.documents import read_batches
from megatron_tf.data.indexed_dataset import IndexedDataset

ROOT = Path(__file__).parents[2]
FEW_LINES = (500, 1_000)  # for Megatron-LM's preprocess_data.py
SHIM = "import sys, typing, typing_extensions as t; typing.override = t.override; sys.argv = sys.argv[1:]; "
SHIM += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"  # it needs Python 3.12


class Run(NamedTuple):
    """What a process used."""

    megabytes: float
    """Of text."""
    wall: float
    cpu: float


Contestant = Callable[[int], Run]
"""Runs once on the first n shards."""


class Setting(NamedTuple):
    """What all contestants share."""

    tokenizer: Path
    shards: list[Path]
    workers: int
    folder: Path
    megatron: Path | None

    def environment(self, root: Path) -> dict[str, str]:
        """Return the environment of a contestant."""
        return {**os.environ, "PYTHONPATH": str(root), "RAYON_NUM_THREADS": str(self.workers)}


def timed(command: list[str], directory: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Run a process; return its wall and CPU seconds, those of its children included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, cwd=directory, env=environment, capture_output=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(setting: Setting, count: int) -> Run:
    """Run our tool on compressed shards."""
    prefix = setting.folder / "ours"
    for file in setting.folder.glob("ours*"):
        file.unlink()
    source = setting.folder / "input.jsonl.zst"
    with source.open("wb") as file:  # frames of zstd can be put end to end
        file.writelines(shard.read_bytes() for shard in setting.shards[:count])
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(source)]
    command += ["--output-prefix", str(prefix), "--tokenizer-type", "HFTokenizer", "--append-eod"]
    command += ["--tokenizer-model", str(setting.tokenizer), "--workers", str(setting.workers)]
    wall, cpu = timed(command, ROOT, setting.environment(ROOT))
    report = json.loads(Path(f"{prefix}_text_document.json").read_text())
    return Run(report["text_bytes"] / 1e6, wall, cpu)


def engine_alone(setting: Setting, count: int) -> Run:
    """Encode the texts from memory in a new process."""
    command = [sys.executable, __file__, str(setting.tokenizer), *map(str, setting.shards[:count]), "--engine"]
    done = subprocess.run(command, check=True, cwd=ROOT, env=setting.environment(ROOT), capture_output=True)
    return Run(*json.loads(done.stdout))


def encode_from_memory(tokenizer: Path, shards: list[Path]) -> None:
    """Print the megabytes of text and the seconds of encoding them."""
    import gigatoken

    texts = [[d["text"] for d in batch.documents] for shard in shards for batch in read_batches(shard, ["text"])]
    engine = Engine(gigatoken.Tokenizer.from_json(tokenizer.read_bytes()), few_characters=0)
    engine.encode([""])  # the first call imports what the others need
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in texts:
        engine.encode(batch)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps([sum(len(text.encode()) for batch in texts for text in batch) / 1e6, wall, cpu]))


def lines_of(shards: list[Path]) -> Iterator[bytes]:
    """Yield the lines of compressed shards."""
    for shard in shards:
        with zstd.open(shard, "rb") as file:
            yield from file


def megatron_run(setting: Setting, tool: str, lines: Iterator[bytes], options: list[str]) -> Run:
    """Run a tool of Megatron-LM on lines."""
    assert setting.megatron is not None
    source, prefix = setting.folder / "lines.jsonl", setting.folder / tool
    with source.open("wb") as file:
        file.writelines(lines)
    command = [sys.executable, "-c", SHIM, f"tools/{tool}.py", "--input", str(source), "--output-prefix", str(prefix)]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(setting.folder / "tokenizer")]
    wall, cpu = timed([*command, "--append-eod", *options], setting.megatron, setting.environment(setting.megatron))
    with source.open("rb") as file:
        return Run(sum(len(json.loads(line)["text"].encode()) for line in file) / 1e6, wall, cpu)


def megatron_fast(setting: Setting, count: int) -> Run:
    """Run Megatron-LM's preprocess_data_fast.py.

    Raises ValueError if it does not write our ids, texts aside that ours has another library encode.
    """
    run = megatron_run(
        setting, "preprocess_data_fast", lines=lines_of(setting.shards[:count]), options=["--use-gigatoken"]
    )
    names = ("ours", "preprocess_data_fast")
    sets = [IndexedDataset(setting.folder / f"{name}_text_document") for name in names]
    for number, line in enumerate(lines_of(setting.shards[:count])):
        ids = [each.document(number) for each in sets]
        if not np.array_equal(*ids) and is_settled(json.loads(line)["text"]):
            raise ValueError(f"document {number}: the tools wrote different ids")
    return run


def megatron_plain(setting: Setting, count: int) -> Run:
    """Run Megatron-LM's preprocess_data.py on a few lines; `count` is their number."""
    lines = itertools.islice(lines_of(setting.shards), count)
    return megatron_run(setting, "preprocess_data", lines=lines, options=["--workers", str(setting.workers)])


def fitted(runs: dict[int, list[Run]], what: str) -> tuple[float, float]:
    """Return (fixed seconds, MB per second) of the line through the least times."""
    megabytes = [rounds[0].megabytes for rounds in runs.values()]
    seconds = [min(getattr(run, what) for run in rounds) for rounds in runs.values()]
    slope, fixed = np.polyfit(megabytes, seconds, 1)
    return float(fixed), float(1 / slope)


def prepare_tokenizer(setting: Setting) -> None:
    """Write the directory that Megatron-LM's tools read the tokenizer from."""
    directory = setting.folder / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.json").write_bytes(setting.tokenizer.read_bytes())
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def main() -> None:
    """Print all runs, then fixed costs and rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 5, 10, 20], help="numbers of shards")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    tokenizer, shards = args.tokenizer.resolve(), [shard.resolve() for shard in args.shards]
    if args.engine:
        encode_from_memory(tokenizer, shards)
        return
    sizes = [size for size in args.sizes if size <= len(shards)]
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            tokenizer=tokenizer, shards=shards, workers=args.workers, folder=Path(folder), megatron=args.megatron
        )
        prepare_tokenizer(setting)
        contestants = {ours: sizes, engine_alone: sizes}
        if args.megatron:
            contestants |= {megatron_fast: sizes, megatron_plain: list(FEW_LINES)}
        runs = {contestant: {size: [] for size in its_sizes} for contestant, its_sizes in contestants.items()}
        for turn, place in itertools.product(range(args.rounds), range(len(sizes))):
            for contestant, its_sizes in contestants.items():
                if place < len(its_sizes):
                    run = contestant(setting, its_sizes[place])
                    runs[contestant][its_sizes[place]].append(run)
                    name = contestant.__name__
                    print(
                        f"{turn} {name:16} {run.megabytes:8.1f} MB  {run.wall:7.2f} s  CPU {run.cpu:7.2f} s", flush=True
                    )
    for contestant, its_runs in runs.items():
        for what in ("wall", "cpu"):
            fixed, rate = fitted(its_runs, what)
            print(f"{contestant.__name__:16} {what:4}  fixed {fixed:6.2f} s, then {rate:7.1f} MB/s")


if __name__ == "__main__":
    main()
