"""Speed of tools/preprocess_data.py, as a whole process, against its engine alone and against a plain implementation.

Pass a tokenizer.json and shards: python benchmarks/data/preprocess.py TOKENIZER SHARD.jsonl.zst ... The plain
implementation is json, the tokenizers library and numpy over the first part of the text, as in Megatron-LM's tool, on
all cores; both must give the same bytes. Repetitive input favors an engine that caches words.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers

from megatron_tf.data.documents import read_batches
from megatron_tf.data.tokenizer import HFTokenizer

PLAIN_BYTES = 40 << 20
ROOT = Path(__file__).parents[2]


def batches(shards: list[Path]) -> Iterator[list[str]]:
    """Yield the texts of all shards."""
    for shard in shards:
        for batch in read_batches(shard, ["text"]):
            yield [document["text"] for document in batch.documents]


def whole_process(tokenizer: Path, shards: list[Path], prefix: str) -> float:
    """Run the whole tool; return the seconds."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", *shards, "--output-prefix", prefix,
               "--tokenizer-type", "HFTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    subprocess.run([*map(str, command)], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def plain_rate(tokenizer: Path, texts: list[list[str]], eod: int, prefix: str) -> tuple[float, bool]:
    """Return bytes of text per second of the plain implementation, and whether its output matches the tool's."""
    reference = tokenizers.Tokenizer.from_file(str(tokenizer))
    digest, size, done, start = hashlib.sha256(), 0, 0, time.perf_counter()
    for batch in texts:
        for encoding in reference.encode_batch(batch, add_special_tokens=False):
            ids = np.array([*encoding.ids, eod] if encoding.ids else [], dtype=np.uint16)
            digest.update(ids.tobytes())
            size += ids.nbytes
        done += sum(len(text.encode()) for text in batch)
        if done >= PLAIN_BYTES:
            break
    seconds = time.perf_counter() - start
    with Path(f"{prefix}_text_document.bin").open("rb") as file:
        is_same = hashlib.sha256(file.read(size)).digest() == digest.digest()
    return done / seconds, is_same


def main() -> None:
    """Print the rates in MB of text per second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("shards", nargs="+", type=Path)
    args = parser.parse_args()
    tokenizer, shards = args.tokenizer.resolve(), [shard.resolve() for shard in args.shards]
    with tempfile.TemporaryDirectory() as folder:
        seconds = min(whole_process(tokenizer, shards, f"{folder}/{turn}") for turn in range(3))
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        report = json.loads(Path(f"{folder}/0_text_document.json").read_text())
        texts = list(batches(shards))
        engine = HFTokenizer(tokenizer)
        start = time.perf_counter()
        for batch in texts:
            engine.encode_batch(batch)
        engine_rate = report["text_bytes"] / (time.perf_counter() - start)
        plain, is_same = plain_rate(tokenizer, texts, engine.eod, f"{folder}/0")
    rate = report["text_bytes"] / seconds
    print(f"{report['documents']:,} documents, {report['text_bytes'] / 1e6:,.0f} MB of text, {os.cpu_count()} cores")
    print(f"whole process      {rate / 1e6:8.1f} MB/s, peak {peak:,.0f} MiB")
    print(f"the engine alone   {engine_rate / 1e6:8.1f} MB/s ({rate / engine_rate:.0%} of it is reached)")
    print(f"plain code         {plain / 1e6:8.1f} MB/s ({rate / plain:.0f} times slower); same bytes: {is_same}")


if __name__ == "__main__":
    main()
