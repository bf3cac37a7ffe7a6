"""Formats of input files: recognized by their first bytes, and compared with what a file's name says."""

from pathlib import Path

from megatron_tf.data.indexed_dataset import DataError

PARQUET = "Parquet"
ARROW = "Arrow"

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + i, 0x2A, 0x4D, 0x18]): "zstd" for i in range(16)},  # skippable frames
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7-zip",
    b"PAR1": PARQUET,
    b"PARE": "encrypted Parquet",
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,  # of a stream, which has no magic: the marker that every message starts with
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"version https://git-lfs": "a Git LFS pointer",
}
_TAR = (257, b"ustar")  # offset and value of a tar archive's magic
HEAD_BYTES = 512  # enough for every magic; that of a tar archive is not at the start

_FORMATS = {
    ".jsonl": None,
    ".gz": "gzip",
    ".zst": "zstd",
    ".xz": "xz",
    ".bz2": "bzip2",
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
_REMEDIES = {
    "a Git LFS pointer": "run git lfs pull",
    **{named: f"name it {ending}" for ending, named in _FORMATS.items() if named is not None},
}
_ENDINGS = ".jsonl, .jsonl.gz, .jsonl.zst, .jsonl.xz, .jsonl.bz2, .parquet or .arrow"


def format_of(path: Path) -> str | None:
    """Return the format that a file's name says; None means JSON lines. Raises DataError for an unknown ending."""
    for ending, named in _FORMATS.items():
        if path.name.endswith(ending) and ".tar." not in path.name:
            return named
    raise DataError(f"{path}: inputs end in {_ENDINGS}")


def check_format(name: object, head: bytes, expected: str | None, *, remedy: str | None = None) -> None:
    """Raise DataError unless an input that starts with `head` has the `expected` format; None means JSON lines.

    `remedy` replaces the advice to rename the file, where that would not help.
    """
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if head[_TAR[0] :].startswith(_TAR[1]):
        found = "tar"
    if found == expected:
        return
    if found is None:
        raise DataError(f"{name} is not {expected}, as its name says: name it .jsonl, or download it again")
    advice = (remedy if found in _FORMATS.values() else None) or _REMEDIES.get(found, "convert it to JSON lines")
    said = "" if remedy else " as its name says"
    raise DataError(f"{name} is {found}, not {expected or 'JSON lines'}{said}: {advice}")
