"""Build a corpus for benchmarks from the files of packages: Pile-format shards without repeated documents.

    python benchmarks/data/package_text.py OUT --megabytes 1000 DIRECTORY_OR_SHARD ...

Every file under a directory that is UTF-8 text, and every document of a shard, becomes one document; those with the
same content count once. Documents come in the order of their hashes, so that every shard has the same mixture.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from backports import zstd

from megatron_tf.data.documents import read_batches

MIN_BYTES, MAX_BYTES = 256, 8 << 20
SHARD_BYTES = 50_000_000  # of text


def texts(source: Path) -> Iterator[str]:
    """Yield the texts of a shard, or of the files under a directory."""
    if source.is_file():
        for batch in read_batches(source, ["text"]):
            yield from (document["text"] for document in batch.documents)
        return
    for path in sorted(source.rglob("*")):
        if path.is_file() and not path.is_symlink() and MIN_BYTES <= path.stat().st_size <= MAX_BYTES:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if "\0" not in text:
                yield text


def main() -> None:
    """Write the shards OUT/text-NN.jsonl.zst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--megabytes", type=int, default=1000)
    args = parser.parse_args()
    unique = {hashlib.blake2b(text.encode(), digest_size=16).digest(): text for s in args.sources for text in texts(s)}
    args.out.mkdir(parents=True, exist_ok=True)
    written = 0
    for _, text in sorted(unique.items()):
        shard = args.out / f"text-{written // SHARD_BYTES:02d}.jsonl"
        with shard.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"text": text, "meta": {"pile_set_name": "packages"}}) + "\n")
        written += len(text.encode())
        if written >= args.megabytes * 1_000_000:
            break
    for shard in sorted(args.out.glob("text-*.jsonl")):
        shard.with_suffix(".jsonl.zst").write_bytes(zstd.compress(shard.read_bytes()))
        shard.unlink()
    print(f"{len(unique):,} documents found, {written / 1e6:,.0f} MB written")


if __name__ == "__main__":
    main()
