"""Lines of Pile shards: .jsonl, .jsonl.gz and .jsonl.zst, streamed; all that comes before a damage is kept.

Three things are kept apart: a system error ends the read and names the file, a file of another format than its name
says is refused, and damage within a file is yielded as an item, with the bytes that are lost to it.
"""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from backports import zstd

from megatron_tf.data.indexed_dataset import DataError

_READ_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16  # of a compressed file: what is read byte by byte once more where it holds a damage
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}  # the Pile's frames have long windows
_DAMAGE = (zstd.ZstdError, zlib.error)

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([0x50 + i, 0x2A, 0x4D, 0x18]): "zstd" for i in range(16)},  # skippable frames
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7-zip",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"version https://git-lfs": "a Git LFS pointer",
}
_FORMATS = {".jsonl": None, ".gz": "gzip", ".zst": "zstd"}
_REMEDIES = {"a Git LFS pointer": "run git lfs pull", "gzip": "name it .gz", "zstd": "name it .zst"}
_TAR = (257, b"ustar")  # place and text of a tar archive's magic


class Line(NamedTuple):
    """One line, or a damage that ends the file."""

    number: int
    content: bytes | str
    """The line, or what is wrong with it."""
    size: int
    """Bytes of the line; for a damage, those from there to the end of the file."""
    is_ended: bool
    position: int
    """Bytes of the file read so far, compressed as it is."""


class _Decoder(Protocol):
    """Of one gzip member or zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """At most so many bytes of text."""


class _DamageError(Exception):
    """What is wrong with a compressed file, after all before it has been yielded."""


def read_lines(path: Path, max_line_bytes: int) -> Iterator[Line]:
    """The lines of a shard, the last item a damage where there is one. Longer lines are not kept, only counted.

    Raises DataError where the system can't read the file, and where its format is not what its name says.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            try:
                for content, size, is_ended in _split_lines(_blocks(path, raw), max_line_bytes):
                    number += 1
                    yield Line(number, content, size, is_ended, raw.tell())
            except _DamageError as error:
                end = path.stat().st_size
                yield Line(number + 1, f"damaged or truncated file ({error})", end - raw.tell(), False, end)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} can't be read ({reason}): make it readable and run the same command again") from error


def _blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """The text of a file in blocks. Raises DataError where it is of another format than its name says."""
    named = _named_format(path)
    # enough for the magic of a tar archive, which is not at its beginning
    head = raw.read(512)
    raw.seek(0)
    if head:
        _check_format(path, head, named)
    if named is None:
        blocks: Iterator[bytes] = iter(lambda: raw.read(_READ_BYTES), b"")
    else:
        blocks = _decompressed(raw, _GzipDecoder if named == "gzip" else _zstd_decoder)
    is_first = True
    # what was compressed may itself be an archive
    for block in blocks:
        if is_first and block:
            is_first = False
            _check_format(path, block, None)
        yield block


def _named_format(path: Path) -> str | None:
    for ending, named in _FORMATS.items():
        if path.name.endswith(ending) and ".tar." not in path.name:
            return named
    raise DataError(f"{path}: inputs end in .jsonl, .jsonl.gz or .jsonl.zst")


def _check_format(path: Path, head: bytes, expected: str | None) -> None:
    """Raise DataError where what begins with `head` is not what is expected, None for JSON lines."""
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if head[_TAR[0] :].startswith(_TAR[1]):
        found = "tar"
    if found == expected:
        return
    if found is None:
        raise DataError(f"{path} is not {expected}, as its name says: name it .jsonl, or download it again")
    remedy = _REMEDIES.get(found, "convert it to JSON lines")
    raise DataError(f"{path} is {found}, not {expected or 'JSON lines'} as its name says: {remedy}")


def _split_lines(blocks: Iterator[bytes], max_line_bytes: int) -> Iterator[tuple[bytes | str, int, bool]]:
    """(line or what is wrong with it, its bytes, whether it has its end) of each line."""
    parts: list[bytes] = []  # of a line that reaches beyond a block
    size = 0
    too_long = f"longer than {max_line_bytes >> 20} MiB"
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for end in ended:
            parts.append(end)
            size += len(end)
            yield b"".join(parts) if size <= max_line_bytes else too_long, size, True
            parts = []
            size = 0
        # of a line that is too long only the size is kept: a damaged file may have no line end for gigabytes
        size += len(rest)
        if size <= max_line_bytes:
            parts.append(rest)
    if size:
        yield b"".join(parts) if size <= max_line_bytes else too_long, size, False


class _GzipDecoder:
    """A gzip member behind the interface of zstd's decoder."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data.lstrip(b"\0")  # members may be padded

    def decompress(self, data: bytes, max_length: int) -> bytes:
        block = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        # a full block may have left text inside zlib, even where it took all of the input
        self.needs_input = not self._member.unconsumed_tail and len(block) < max_length
        return block


def _zstd_decoder() -> _Decoder:
    decoder: _Decoder = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
    return decoder


def _decompressed(raw: BinaryIO, new_decoder: Callable[[], _Decoder]) -> Iterator[bytes]:
    """The text of all members. Raises _DamageError after all that comes before a damage."""
    data = raw.read(_CHUNK_BYTES)
    while data:
        start = last_chunk = raw.tell() - len(data)  # of this member, and of what its decoder was given last
        decoder = new_decoder()
        made = 0
        while not decoder.eof:
            if decoder.needs_input and not data:
                last_chunk = raw.tell()
                data = raw.read(_CHUNK_BYTES)
                if not data:
                    raise _DamageError("it ends within a compressed block; how much is lost is unknown")
            try:
                block = decoder.decompress(data, _READ_BYTES)
            except _DAMAGE as error:
                yield from _salvaged(raw, new_decoder(), start=start, last_chunk=last_chunk, made=made)
                raise _DamageError(str(error)) from None
            data = b""
            made += len(block)
            yield block
        # a file may be of many members: what a decoder did not take begins the next
        data = decoder.unused_data or _next_chunk(raw, is_padded=isinstance(decoder, _GzipDecoder))


def _next_chunk(raw: BinaryIO, is_padded: bool) -> bytes:
    while data := raw.read(_CHUNK_BYTES):
        data = data.lstrip(b"\0") if is_padded else data
        if data:
            break
    return data


def _salvaged(raw: BinaryIO, decoder: _Decoder, *, start: int, last_chunk: int, made: int) -> Iterator[bytes]:
    """The text of a damaged member from byte `made` on: a decoder that fails keeps back what it made in that call.

    From the chunk that holds the damage on, it is given one byte at a time, so that nothing before the damage is lost.
    """
    raw.seek(start)
    try:
        while not decoder.eof:
            piece = b""
            if decoder.needs_input:
                piece = raw.read(min(_CHUNK_BYTES, max(1, last_chunk - raw.tell())))
                if not piece:
                    return
            block = decoder.decompress(piece, _READ_BYTES)
            yield block[made:]
            made = max(0, made - len(block))
    except _DAMAGE:
        return
