"""Shards: system errors, files of another format, and damage are told apart; nothing is lost silently."""

import bz2
import errno
import gzip
import io
import json
import lzma
import random
import tarfile
import zlib
from functools import partial
from pathlib import Path

import pytest
from backports import zstd

from megatron_tf.data import documents
from megatron_tf.data.documents import BadLines, documents_of, read_batches
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.data.sources import LinesInput, inputs_of

DOCUMENTS = [f"document {i} " + "lorem ipsum " * (i % 7) for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()
CHECKED = {zstd.CompressionParameter.checksum_flag: True}
COMPRESS = {
    ".gz": partial(gzip.compress, mtime=0),
    ".zst": lambda data: zstd.compress(data, options=CHECKED),
    ".xz": lzma.compress,
    ".bz2": lambda data: bz2.compress(data, 1),  # in blocks of 100 kB, which are decompressed as a whole
}
ENDINGS = list(COMPRESS)
COMPRESSED = {"": LINES, **{ending: compress(LINES) for ending, compress in COMPRESS.items()}}


class FailingFile(io.FileIO):
    """A file whose disk fails at a position."""

    def __init__(self, path, position, code):
        super().__init__(path)
        self.position, self.code = position, code

    def read(self, size=-1):
        if self.tell() + size > self.position:
            raise OSError(self.code, "the disk says no")
        return super().read(size)


@pytest.mark.parametrize("ending", list(COMPRESSED))
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EINVAL, errno.ENOENT, errno.ETIMEDOUT])
@pytest.mark.parametrize("position", [0, 20_000])
def test_a_system_error_is_never_bad_input(tmp_path, monkeypatch, ending, code, position):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESSED[ending] * 3)
    monkeypatch.setattr(Path, "open", lambda self, mode: FailingFile(self, position, code))
    with pytest.raises(DataError, match=r"a\.jsonl.*run the same command again|a\.jsonl.* is missing"):
        list(read_batches(path, ["text"]))


def texts_of(path):
    bad = BadLines()
    return [document["text"] for document in documents_of(inputs_of([str(path)]), ["text"], bad)], bad


def whole_lines(text):
    return [json.loads(line)["text"] for line in text.split(b"\n")[:-1]]


@pytest.mark.parametrize("garbage", [b"garbage", bytes(512), b"\x1f\x8b", b"\x28\xb5\x2f\xfd\xff\xff\xff"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_text_before_garbage_is_kept_to_the_last_line(tmp_path, ending, garbage):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESSED[ending] + garbage)
    texts, bad = texts_of(path)
    assert texts == DOCUMENTS
    is_padding = ending in (".gz", ".xz") and not any(garbage)
    assert sum(bad.counts.values()) == (0 if is_padding else 1)
    assert sum(bad.bytes.values()) <= len(garbage)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("ending", ENDINGS)
def test_of_a_cut_file_all_lines_are_kept_that_the_library_can_decompress(tmp_path, ending, share):
    generator = random.Random(1)
    lines = b"".join(b'{"text": "%s"}\n' % generator.randbytes(40).hex().encode() for _ in range(9000))
    whole = COMPRESS[ending](lines)
    cut = whole[: int(share * len(whole))]
    decoder = {
        ".gz": zlib.decompressobj(wbits=31),
        ".zst": zstd.ZstdDecompressor(),
        ".xz": lzma.LZMADecompressor(),
        ".bz2": bz2.BZ2Decompressor(),
    }[ending]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(cut)
    texts, bad = texts_of(path)
    assert texts == whole_lines(decoder.decompress(cut))
    assert sum(bad.counts.values()) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flipped_byte_takes_nothing_that_is_before_it(tmp_path, ending):
    """Byte by byte to the damage: what one byte more makes unreadable is all that is lost."""
    generator = random.Random(2)
    lines = b"".join(b'{"text": "%s"}\n' % generator.randbytes(40).hex().encode() for _ in range(9000))
    whole = bytearray(COMPRESS[ending](lines))
    place = len(whole) * 2 // 3
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(whole[:place])
    before, _ = texts_of(path)
    whole[place : place + 40] = bytes(byte ^ 0xFF for byte in whole[place : place + 40])
    path.write_bytes(whole)
    texts, bad = texts_of(path)
    assert texts[: len(before)] == before
    assert len(before) > 1000
    assert any("damaged" in kind for kind in bad.counts)


def tar_of(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo("one.jsonl")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


OTHERS = [
    ("a.jsonl.gz", LINES, "is not gzip"),
    ("a.jsonl.zst", LINES, "is not zstd"),
    ("a.jsonl.zst", COMPRESSED[".gz"], "is gzip, not zstd.*name it .gz"),
    ("a.jsonl.gz", COMPRESSED[".zst"], "is zstd, not gzip.*name it .zst"),
    ("a.jsonl.xz", LINES, "is not xz"),
    ("a.jsonl.bz2", COMPRESSED[".xz"], "is xz, not bzip2.*name it .xz"),
    ("a.jsonl", COMPRESSED[".bz2"], "is bzip2, not JSON lines.*name it .bz2"),
    ("a.jsonl.xz", lzma.compress(COMPRESSED[".gz"]), "is gzip, not JSON lines: decompress it first"),
    ("a.jsonl.xz", COMPRESSED[".xz"][:30], "no document in .*damaged or truncated"),
    ("a.jsonl.bz2", COMPRESSED[".bz2"][:3000], "no document in .*damaged or truncated"),
    ("a.jsonl.bz2", b"", "no document in .*it is empty"),
    ("a.jsonl", COMPRESSED[".zst"], "is zstd, not JSON lines"),
    ("a.jsonl.gz", COMPRESS[".gz"](COMPRESSED[".gz"]), "is gzip, not JSON lines"),
    ("a.jsonl.zst", b"\xfd7zXZ\x00" + bytes(40), "is xz, not zstd"),
    ("a.jsonl", b"PK\x03\x04" + bytes(40), "is zip"),
    ("a.jsonl", b"PAR1" + bytes(40), "is Parquet"),
    ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is UTF-16"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ("a.jsonl.gz", COMPRESS[".gz"](tar_of(LINES)), "is tar, not JSON lines"),
    ("a.jsonl.tar.gz", COMPRESS[".gz"](tar_of(LINES)), "inputs end in"),
    ("a.jsonl", tar_of(LINES), "is tar"),
    ("a.jsonl", b"<html><body>404 not found</body></html>\n", "no document in .*1 x malformed JSON"),
    ("a.jsonl", b'{\n  "text": "pretty"\n}\n', "no document in"),
    ("a.jsonl", b'[{"text": "a list"}]\n', "no document in .*not a JSON object"),
    ("a.jsonl", b"", "no document in .*it is empty"),
    ("a.jsonl.zst", b"", "no document in .*it is empty"),
    ("a.jsonl", b"\n \n", "no document in .*it is empty"),
    ("a.jsonl.zst", COMPRESSED[".zst"][:30], "no document in .*damaged or truncated"),
]


@pytest.mark.parametrize("name, content, message", OTHERS)
def test_a_shard_that_is_something_else_is_an_error_whatever_others_hold(tmp_path, name, content, message):
    good, path = tmp_path / "good.jsonl", tmp_path / name
    good.write_bytes(LINES)
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(documents_of([LinesInput(path) for path in (good, path, good)], ["text"], BadLines()))
    assert str(path) in str(caught.value)


def test_losses_are_counted_in_bytes_and_shards(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b'{"text": "x"}\n' + b"{broken\n" * (2 if name != "c" else 0))
    bad = BadLines()
    list(documents_of(inputs_of([str(tmp_path / f"{name}.jsonl") for name in "abc"]), ["text"], bad))
    assert (bad.counts, bad.bytes, bad.shards) == ({"malformed JSON": 4}, {"malformed JSON": 28}, {"malformed JSON": 2})
    assert "28 bytes in 2 shards" in bad.summary()


def test_members_padding_and_large_expansion_are_read_whole(tmp_path):
    """Blocks far smaller than what they expand to, and members that end at every place of a block."""
    path, line = tmp_path / "a.jsonl.gz", b'{"text": "' + b"x" * 3_000_000 + b'"}\n'
    path.write_bytes(
        gzip.compress(line * 3) + bytes(1000) + b"".join(gzip.compress(line[:-4] + b'y"}\n') for _ in "ab")
    )
    texts, bad = texts_of(path)
    assert [len(text) for text in texts] == [3_000_000] * 5
    assert not bad.counts
    zst = tmp_path / "a.jsonl.zst"
    skippable = bytes([0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0]) + b"skip"
    zst.write_bytes(skippable + b"".join(zstd.compress(LINES[i : i + 999]) for i in range(0, len(LINES), 999)))
    assert texts_of(zst)[0] == DOCUMENTS


@pytest.mark.parametrize("ending", ENDINGS)
def test_files_of_several_members_are_read_whole(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(COMPRESS[ending](LINES[i : i + 9999]) for i in range(0, len(LINES), 9999)))
    texts, bad = texts_of(path)
    assert texts == DOCUMENTS
    assert not bad.counts


def test_the_last_batch_of_a_file_is_at_its_end(tmp_path, monkeypatch):
    """Even where the batch before took the last line."""
    monkeypatch.setattr(documents, "BATCH_BYTES", 1)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' * 3)
    batches = list(read_batches(tmp_path / "a.jsonl", ["text"]))
    assert [(batch.end_line, batch.end_byte) for batch in batches] == [(1, 42), (2, 42), (3, 42), (3, 42)]
