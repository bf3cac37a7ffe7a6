"""Streams the lines of Pile shards (.jsonl, plain or compressed); everything before a damaged part is kept.

Three kinds of errors are distinguished: a system error ends the read and names the file; a file whose format does not
match its name is rejected; damage within a file is yielded as an item that counts the lost bytes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_tf.data.decompression import READ_BYTES, DamageError, decompressed
from megatron_tf.data.formats import HEAD_BYTES, check_format, format_of
from megatron_tf.data.indexed_dataset import DataError

_DECOMPRESS = "decompress it first"
_NO_PIPE = "decompress it before the pipe, or give the path of the file"


class Line(NamedTuple):
    """One line, or the damage that ends the file."""

    number: int
    content: bytes | str
    """The line, or what is wrong with it."""
    size: int
    """Bytes of the line; for damage, the bytes from there to the end of the file."""
    is_ended: bool
    position: int
    """Bytes read from the (possibly compressed) file so far."""


def read_lines(path: Path, max_line_bytes: int) -> Iterator[Line]:
    """Yield the lines of a shard; damage is the last item. Lines over `max_line_bytes` are counted but not kept.

    Raises DataError if the system can't read the file, or if its format does not match its name.
    """
    number = 0
    try:
        with path.open("rb") as raw:
            try:
                for content, size, is_ended in _split_lines(_blocks(path, raw), max_line_bytes):
                    number += 1
                    yield Line(number, content, size=size, is_ended=is_ended, position=raw.tell())
            except DamageError as error:
                end = path.stat().st_size
                yield Line(
                    number + 1,
                    f"damaged or truncated file ({error})",
                    size=end - raw.tell(),
                    is_ended=False,
                    position=end,
                )
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path} can't be read ({reason}): make it readable and run the same command again") from error


def read_stream(raw: BinaryIO, name: str, max_line_bytes: int) -> Iterator[Line]:
    """Yield the lines of a stream that can only be read once, such as a pipe. Lines over `max_line_bytes` are counted
    but not kept.

    Raises DataError if the system can't read it, or if it is not JSON lines: it can't be decompressed, because damage
    is found by reading again.
    """
    position = 0

    def blocks() -> Iterator[bytes]:
        nonlocal position
        # no block is shorter than the magic of a format, unless the stream is
        while block := raw.read(READ_BYTES):
            if position == 0:
                check_format(name, block[:HEAD_BYTES], None, remedy=_NO_PIPE)
            position += len(block)
            yield block

    try:
        for number, (content, size, is_ended) in enumerate(_split_lines(blocks(), max_line_bytes), 1):
            yield Line(number, content, size=size, is_ended=is_ended, position=position)
    except OSError as error:
        raise DataError(f"{name} can't be read ({error.strerror}): run the same command again to resume") from error


def _blocks(path: Path, raw: BinaryIO) -> Iterator[bytes]:
    """Yield the decompressed file in blocks. Raises DataError if its format does not match its name."""
    named = format_of(path)
    head = raw.read(HEAD_BYTES)
    raw.seek(0)
    if head:
        check_format(path, head, named)
    if named is None:
        blocks: Iterator[bytes] = iter(lambda: raw.read(READ_BYTES), b"")
    else:
        blocks = decompressed(raw, named)
    is_first = True
    # the compressed contents may themselves be an archive
    for block in blocks:
        if is_first and block:
            is_first = False
            check_format(path, block, None, remedy=None if named is None else _DECOMPRESS)
        yield block


def _split_lines(blocks: Iterator[bytes], max_line_bytes: int) -> Iterator[tuple[bytes | str, int, bool]]:
    """Yield (line or what is wrong with it, its bytes, whether it ends with a newline) for each line."""
    parts: list[bytes] = []  # start of a line that continues in the next block
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
        # only the size of a line that is too long is kept: a damaged file may have no newline for gigabytes
        size += len(rest)
        if size <= max_line_bytes:
            parts.append(rest)
    if size:
        yield b"".join(parts) if size <= max_line_bytes else too_long, size, False
