"""Decompresses gzip, zstd, xz and bzip2; everything before a damaged part is kept."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from backports import zstd

READ_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 16  # of a compressed file; a damaged one is decoded again by bytes
# the Pile's zstd frames have long windows
_ZSTD_OPTIONS: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
_PADDED = ("gzip", "xz")  # formats whose members may be followed by zeros


class DamageError(Exception):
    """Raised for a damaged compressed file, after everything before the damage has been yielded."""


class _Decoder(Protocol):
    """Decoder of one member of a compressed file: a gzip member, a zstd frame, a stream of xz or bzip2."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Decompress at most `max_length` bytes."""


class _GzipDecoder:
    """Decoder of a gzip member with the interface of zstd's decoder."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        block = self._member.decompress(self._member.unconsumed_tail + data, max_length)
        # after a full block, zlib may still hold output even if it has consumed all input
        self.needs_input = not self._member.unconsumed_tail and len(block) < max_length
        return block


class _Bzip2Error(Exception):
    """Raised for damaged bzip2 data."""


class _Bzip2Decoder:
    """Decoder of a bzip2 stream; the library's own error for damage is an OSError, as if the disk had failed."""

    def __init__(self) -> None:
        self._stream = bz2.BZ2Decompressor()

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return self._stream.needs_input

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._stream.decompress(data, max_length)
        except OSError as error:
            raise _Bzip2Error(str(error)) from None


def _zstd_decoder() -> _Decoder:
    decoder: _Decoder = zstd.ZstdDecompressor(options=_ZSTD_OPTIONS)
    return decoder


def _xz_decoder() -> _Decoder:
    decoder: _Decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ)
    return decoder


_DECODERS: dict[str, Callable[[], _Decoder]] = {
    "gzip": _GzipDecoder,
    "zstd": _zstd_decoder,
    "xz": _xz_decoder,
    "bzip2": _Bzip2Decoder,
}
_DAMAGE = (zstd.ZstdError, zlib.error, lzma.LZMAError, _Bzip2Error)


def decompressed(raw: BinaryIO, named: str) -> Iterator[bytes]:
    """Yield the decompressed data of all members of a file, in blocks of at most READ_BYTES.

    `named` is its format, a key of the decoders. Raises DamageError after everything before the damage.
    """
    new_decoder, is_padded = _DECODERS[named], named in _PADDED
    data = raw.read(_CHUNK_BYTES)
    while data:
        start = last_chunk = raw.tell() - len(data)  # bytes of this member so far, and the latest input
        decoder = new_decoder()
        made = 0
        while not decoder.eof:
            if decoder.needs_input and not data:
                last_chunk = raw.tell()
                data = raw.read(_CHUNK_BYTES)
                if not data:
                    raise DamageError("it ends within a compressed block; how much is lost is unknown")
            try:
                block = decoder.decompress(data, READ_BYTES)
            except _DAMAGE as error:
                yield from _salvaged(raw, new_decoder(), start=start, last_chunk=last_chunk, made=made)
                raise DamageError(str(error)) from None
            data = b""
            made += len(block)
            yield block
        # a file may have several members: input that a decoder did not consume starts the next one
        unused = decoder.unused_data
        data = (unused.lstrip(b"\0") if is_padded else unused) or _next_chunk(raw, is_padded)


def _next_chunk(raw: BinaryIO, is_padded: bool) -> bytes:
    while data := raw.read(_CHUNK_BYTES):
        data = data.lstrip(b"\0") if is_padded else data
        if data:
            break
    return data


def _salvaged(raw: BinaryIO, decoder: _Decoder, *, start: int, last_chunk: int, made: int) -> Iterator[bytes]:
    """Yield the output of a damaged member from byte `made` on, which the failing decoder call did not return.

    The chunk that contains the damage is decoded one byte at a time, so that nothing before the damage is lost.
    """
    raw.seek(start)
    try:
        while not decoder.eof:
            piece = b""
            if decoder.needs_input:
                piece = raw.read(min(_CHUNK_BYTES, max(1, last_chunk - raw.tell())))
                if not piece:
                    return
            block = decoder.decompress(piece, READ_BYTES)
            yield block[made:]
            made = max(0, made - len(block))
    except _DAMAGE:
        return
