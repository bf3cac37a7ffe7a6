"""Files written past the page cache: the bytes, what a full disk says, and file systems without O_DIRECT."""

import errno
import os
import random

import pytest

from megatron_tf.checkpoint import sequential_file
from megatron_tf.checkpoint.sequential_file import BLOCK_BYTES, SequentialFile


class Device:
    """The raw file of a SequentialFile; each write does what `before` does, and at most `most` bytes."""

    def __init__(self, file, *, most=None, before=lambda data: None):
        self.file, self.most, self.before = file, most, before
        self.lengths = []

    def write(self, data):
        self.before(data)
        self.lengths.append(len(data))
        return self.file.write(data[: self.most])

    def __getattr__(self, name):
        return getattr(self.file, name)


def write(path, content, sizes, **harm):
    file = SequentialFile(path)
    file.file = Device(file.file, **harm)
    position = 0
    for size in sizes:
        file.append(memoryview(content)[position : position + size])
        position += size
    file.append(content[position:])
    file.finish()
    return file


@pytest.mark.parametrize(
    "total", [0, 1, 4095, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 4097]
)
def test_the_bytes_are_those_appended_in_pieces_of_any_size(tmp_path, total):
    content = random.Random(total).randbytes(total)
    for number, size in enumerate((1 << 30, BLOCK_BYTES, 777_777)):
        path = tmp_path / str(number)
        file = write(path, content, [size] * (total // size))
        assert path.read_bytes() == content
        assert file.bytes == total
        assert file.is_closed


def test_blocks_go_past_the_page_cache_where_the_file_system_allows_it(tmp_path):
    plain = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    finally:
        os.close(plain)
    flags = []
    content = bytes(2 * BLOCK_BYTES + 5)
    file = SequentialFile(tmp_path / "file")
    raw = file.file
    file.file = Device(raw, before=lambda data: flags.append(sequential_file.fcntl.fcntl(raw, 3) & os.O_DIRECT != 0))
    file.append(content)
    file.finish()
    assert flags == [True, True, False]
    assert (tmp_path / "file").read_bytes() == content


def test_small_files_go_through_it_in_one_write(tmp_path):
    file = write(tmp_path / "file", b"abc" * 1000, [10] * 100)
    assert file.file.lengths == [3000]


def test_partial_writes_are_continued(tmp_path):
    content = random.Random(1).randbytes(2 * BLOCK_BYTES + 12345)
    write(tmp_path / "file", content, [], most=4096 * 100)
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_system_that_refuses_the_flag(tmp_path, monkeypatch):
    control = sequential_file.fcntl.fcntl

    def refuse(file, command, argument=0):
        if argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(file, command, argument)

    monkeypatch.setattr(sequential_file.fcntl, "fcntl", refuse)
    content = random.Random(2).randbytes(2 * BLOCK_BYTES + 1)
    write(tmp_path / "file", content, [])
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_system_that_accepts_the_flag_but_not_the_write(tmp_path):
    refused = []

    def refuse_direct(data):
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")

    content = random.Random(3).randbytes(2 * BLOCK_BYTES + 1)
    write(tmp_path / "file", content, [], before=refuse_direct)
    assert refused == [BLOCK_BYTES]
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_other_errors_are_raised_once_the_flag_is_off(tmp_path, code):
    def fail(data):
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        write(tmp_path / "file", bytes(BLOCK_BYTES), [], before=fail)
    assert raised.value.errno == code


def test_an_existing_file_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        SequentialFile(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
