"""CPU time and memory of tools/preprocess_data.py on the same documents in every format that it reads.

    python benchmarks/data/inputs.py TOKENIZER SHARD.jsonl.zst ... [--rounds K]

Needs the extras `arrow` and `datasets`. Each reading is a process of its own with one worker, all formats in turn in
each round; every format has to give the same bytes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd

ROOT = Path(__file__).parents[2]
ROWS = 1_000  # in a row group, or a record batch


def tables_of(shard: Path) -> Iterator[pa.Table]:
    """Yield the documents of a shard, some at a time."""
    rows = []
    with zstd.open(shard, "rb") as file:
        for line in file:
            rows.append(json.loads(line))
            if len(rows) == ROWS:
                yield pa.Table.from_pylist(rows)
                rows = []
    if rows:
        yield pa.Table.from_pylist(rows)


def convert(shard: Path, folder: Path) -> None:
    """Write a shard as Parquet and as Arrow."""
    name = shard.name.removesuffix(".jsonl.zst")
    tables = tables_of(shard)
    first = next(tables)
    with (
        pq.ParquetWriter(folder / f"{name}.parquet", first.schema) as parquet,
        pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, first.schema) as arrow,
    ):
        parquet.write_table(first)
        arrow.write_table(first)
        for table in tables:
            parquet.write_table(table.cast(first.schema))
            arrow.write_table(table.cast(first.schema))


def preprocess(tokenizer: Path, inputs: list[str], folder: Path) -> tuple[float, float, str]:
    """Run the tool; return its CPU seconds, its peak memory in MiB, and the digest of what it wrote."""
    for file in folder.glob("out*"):
        file.unlink()
    command = [sys.executable, "tools/preprocess_data.py", *inputs, "--output-prefix", str(folder / "out")]
    command += ["--tokenizer-type", "HFTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod"]
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "HF_HOME": str(folder / "hub")}
    process = subprocess.Popen([*command, "--workers", "1"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    digest = hashlib.sha256((folder / "out_text_document.bin").read_bytes()).hexdigest()
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, digest


def main() -> None:
    """Print a line for each reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    tokenizer = args.tokenizer.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shard in args.shards:
            convert(shard, folder)
        inputs = {
            ".jsonl.zst": ["--input", *(str(shard.resolve()) for shard in args.shards)],
            ".parquet": ["--input", f"{folder}/*.parquet"],
            ".arrow": ["--input", f"{folder}/*.arrow"],
            "--hf-dataset": ["--hf-dataset", str(folder / "hf"), "--hf-split", "train"],
        }
        (folder / "hf").mkdir()
        for file in folder.glob("*.parquet"):
            (folder / "hf" / f"train-{file.name}").hardlink_to(file)
        digests = set()
        for _ in range(args.rounds):
            for kind, options in inputs.items():
                cpu, mib, digest = preprocess(tokenizer, options, folder)
                digests.add(digest)
                print(f"{kind:14} CPU {cpu:6.2f} s  {mib:6.0f} MiB", flush=True)
    if len(digests) > 1:
        sys.exit("the formats gave different bytes")


if __name__ == "__main__":
    main()
