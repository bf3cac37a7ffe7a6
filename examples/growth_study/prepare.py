"""Prepare the text of the study from Pile-format shards: hold out, train a tokenizer, preprocess.

    python examples/growth_study/prepare.py 'pile/*.jsonl.zst' --output runs/growth_study/data

The held-out documents have about the same number of bytes for each set (`meta.pile_set_name`), at most a tenth of it,
spread evenly over the shards. The same shards always give the same data; data.json is written last, with their hash.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_tf.commands.runner import command
from megatron_tf.data.documents import BadLines, Input, documents_of
from megatron_tf.data.sources import inputs_of
from megatron_tf.errors import UserError
from megatron_tf.files import write_json

_LARGEST_SHARE = 0.1
"""Most of a set that is held out."""
_LARGEST_DOCUMENT = 0.25
"""Most of a set's held-out text that is one document."""
_HASHED_BYTES = 1 << 20
Document = dict[str, Any]


@command()
def main(arguments: list[str] | None = None) -> int:
    """Write the datasets, the tokenizer and data.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="files or patterns, as for preprocess-data")
    parser.add_argument("--output", type=Path, default=Path("runs/growth_study/data"))
    parser.add_argument("--held-out-bytes", type=int, default=2_000_000, help="over all sets (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="default: %(default)s")
    options = parser.parse_args(arguments)
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if "-" in options.shards:
        raise UserError("the text is read twice, which standard input (-) does not allow: give files")
    shards = inputs_of(options.shards)
    names = split(shards, output, options.held_out_bytes)
    train, model = str(output / "train.jsonl"), str(output / "tokenizer.model")
    options_of_tokenizer = ["--vocab-size", str(options.vocab_size), "--output-prefix", str(output / "tokenizer")]
    run("megatron_tf", "train-tokenizer", "--input", train, *options_of_tokenizer)
    for name in ["train", *names]:
        encoding = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model, "--append-eod"]
        where = ["--input", str(output / f"{name}.jsonl"), "--output-prefix", str(output / name)]
        run("megatron_tf", "preprocess-data", *where, *encoding)
    data = {
        "data_path": ["train_text_document"],
        "valid_data_path": [f"{name}_text_document" for name in names],
        "split": "1,0,0",
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": "tokenizer.model",
    }
    files = [output / f"{prefix}.bin" for prefix in data["data_path"] + data["valid_data_path"]]
    write_json(output / "data.json", {"hash": hash_of([Path(model), *files]), "data": data})
    for name in ["train", *names]:
        (output / f"{name}.jsonl").unlink()
    print(f"{output / 'data.json'}: {len(names)} held-out sets")
    return 0


def split(shards: list[Input], output: Path, held_out_bytes: int) -> list[str]:
    """Write train.jsonl and a file for each held-out set; return the names of these. Raises UserError without any."""
    sizes: Counter[str] = Counter()
    for document in documents(shards):
        sizes[set_name(document)] += len(document["text"].encode())
    quota = {name: min(held_out_bytes / len(sizes), _LARGEST_SHARE * size) for name, size in sizes.items()}
    seen: Counter[str] = Counter()
    held: Counter[str] = Counter()
    with ExitStack() as stack:
        files = {name: stack.enter_context((output / f"{name}.jsonl").open("w")) for name in ["train", *sizes]}
        for document in documents(shards):
            name, size = set_name(document), len(document["text"].encode())
            seen[name] += size
            # held out whenever less than its share of the text so far is
            is_due = held[name] + size <= quota[name] * seen[name] / sizes[name]
            is_held = is_due and size <= _LARGEST_DOCUMENT * quota[name]
            held[name] += size if is_held else 0
            files[name if is_held else "train"].write(json.dumps(document) + "\n")
    for name in sorted(sizes):
        note = "" if held[name] else ": each of its documents is too large"
        print(f"{name}: {held[name]:,} of {sizes[name]:,} bytes held out{note}")
    for name in sizes:
        if not held[name]:
            (output / f"{name}.jsonl").unlink()
    if not any(held.values()):
        raise UserError("no document is small enough to be held out: give more text, or raise --held-out-bytes")
    return sorted(name for name in sizes if held[name])


def documents(shards: list[Input]) -> Iterator[Document]:
    """Yield the documents of the shards. Raises DataError for a bad line."""
    bad = BadLines()
    yield from documents_of(shards, ["text"], bad)
    bad.check(0.0)


def set_name(document: Document) -> str:
    """Return the name of a document's set as part of a file name."""
    name = (document.get("meta") or {}).get("pile_set_name") or "unnamed"
    return "heldout_" + re.sub(r"\W+", "_", str(name))


def run(module: str, *arguments: str) -> None:
    """Run a command of the package. Raises UserError if it fails; it has said why."""
    if subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode:
        raise UserError(f"{arguments[0]} failed")


def hash_of(paths: list[Path]) -> str:
    """Return a hash of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_HASHED_BYTES):
                digest.update(block)
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
