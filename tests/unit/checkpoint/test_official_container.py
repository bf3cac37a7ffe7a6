"""The zip of an official file: any valid one reads the same; damage, and what no storage can hold, is refused."""

import collections
import io
import pickle
import zipfile

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.convert.official.reading import read_official_tensors

WEIGHTS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.tensor([1.5, -2.0]),
    "c": torch.arange(6, dtype=torch.bfloat16),
    "d": torch.arange(4),
}


@pytest.fixture
def path(tmp_path):
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def values(path):
    return {name: tensor.read_rows(0, tensor.shape[0]) for name, tensor in read_official_tensors(path).items()}


def is_same(found):
    return found.keys() == WEIGHTS.keys() and all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def records_of(path):
    with zipfile.ZipFile(path) as source:
        return {name: source.read(name) for name in source.namelist()}


def write_zip(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as target:
        for name, content in records.items():
            target.writestr(name, content)


def reversed_order(path):
    write_zip(path, dict(reversed(records_of(path).items())))


def other_root(path):
    write_zip(path, {f"x/y/{name.partition('/')[2]}": content for name, content in records_of(path).items()})


def with_directories(path):
    write_zip(path, {"archive/": b"", **{f"archive/{n.partition('/')[2]}": c for n, c in records_of(path).items()}})


def deflated(path):
    write_zip(path, records_of(path), zipfile.ZIP_DEFLATED)


def prefixed(path):
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())


def with_a_comment(path):
    with zipfile.ZipFile(path, "a") as target:
        target.comment = b"any"


def big_endian(path):
    sizes = {f"data/{i}": tensor.itemsize for i, tensor in enumerate(WEIGHTS.values())}
    records = {}
    for name, content in records_of(path).items():
        size = sizes.get(name.partition("/")[2])
        if size is not None:
            content = b"".join(content[i : i + size][::-1] for i in range(0, len(content), size))
        records[name] = b"big" if name.endswith("byteorder") else content
    write_zip(path, records)


ZIPS = [reversed_order, other_root, with_directories, deflated, prefixed, with_a_comment, big_endian]


@pytest.mark.parametrize("change", ZIPS)
def test_any_valid_zip_of_the_same_records_reads_the_same(path, change):
    assert is_same(values(path))
    change(path)
    assert is_same(values(path))


def test_rows_are_read_in_any_order(path):
    deflated(path)
    tensor = read_official_tensors(path)["a"]
    for start, stop in ((1, 3), (0, 1), (2, 3), (0, 3)):
        assert torch.equal(tensor.read_rows(start, stop), WEIGHTS["a"][start:stop])


def test_views_into_one_storage_are_read(tmp_path):
    whole = torch.arange(20.0).view(5, 4)
    torch.save({"first": whole[:2], "last": whole[2:], "parameter": torch.nn.Parameter(whole)}, tmp_path / "x.bin")
    found = values(tmp_path / "x.bin")
    assert torch.equal(found["last"], whole[2:])
    assert torch.equal(found["parameter"], whole)


@pytest.mark.parametrize("record", ["data/0", "data/3", "data.pkl", "byteorder"])
def test_a_flipped_bit_in_any_record_is_found_by_its_checksum(path, record):
    with zipfile.ZipFile(path) as source:
        [info] = [info for info in source.infolist() if info.filename.partition("/")[2] == record]
    content = bytearray(path.read_bytes())
    name_length, extra_length = (
        int.from_bytes(content[info.header_offset + i : info.header_offset + i + 2], "little") for i in (26, 28)
    )
    content[info.header_offset + 30 + name_length + extra_length + 1] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged: Bad CRC-32"):
        values(path)


class Described:
    """Pickled as a tensor of a shape that its storage need not have."""

    def __init__(self, shape, offset=0, strides=None, count=8):
        self.shape, self.offset, self.count, self.strides = shape, offset, count, strides

    def __reduce__(self):
        step, strides = 1, []
        for size in reversed(self.shape):
            strides.insert(0, step)
            step *= size
        strides = self.strides or tuple(strides)
        arguments = (StorageOf(self.count), self.offset, self.shape, strides, False, collections.OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class StorageOf:
    def __init__(self, count):
        self.count = count


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", torch.FloatStorage, "0", "cpu", value.count) if isinstance(value, StorageOf) else None


def write_described(path, value):
    text = io.BytesIO()
    Pickler(text, protocol=2).dump({"x": value})
    write_zip(path, {"archive/data.pkl": text.getvalue(), "archive/data/0": bytes(32)})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Described((3, 3)), r"x is \[3, 3\] from 0 on, and its storage has 8 numbers"),
        (Described((8,), offset=1), r"x is \[8\] from 1 on"),
        (Described((2,), offset=-1), "that cannot be"),
        (Described((-2, 2)), "that cannot be"),
        (Described((2**70,)), "that cannot be"),
        (Described((2, 2), strides=(1, 2)), "x is not contiguous"),
        (Described((2, 2), strides=(0, 0)), "x is not contiguous"),
        (Described((4,), count=9), "stored in '0' of 36 bytes, which has 32"),
        (Described((4,), count=-8), "which is not a storage"),
    ],
)
def test_a_shape_beyond_its_storage_is_refused(tmp_path, tensor, message):
    write_described(tmp_path / "x.bin", tensor)
    with pytest.raises(CheckpointError, match=message):
        read_official_tensors(tmp_path / "x.bin")


def test_a_described_tensor_within_its_storage_is_read(tmp_path):
    write_described(tmp_path / "x.bin", Described((2, 4)))
    assert torch.equal(values(tmp_path / "x.bin")["x"], torch.zeros(2, 4))


def change_record(path, name, content):
    records = records_of(path)
    [full] = [full for full in records if full.partition("/")[2] == name]
    if content is None:
        records.pop(full)
    else:
        records[full] = content
    write_zip(path, records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data/0", None, "which is missing"),
        ("data/0", b"1234", "which has 4"),
        ("data.pkl", None, "it holds 0 files data.pkl"),
        ("data.pkl", b"", "is damaged|can't be read as plain tensors"),
        ("data.pkl", b"\x80\x02r\xff\xff\xff\x7f.", "it stores a value at 2147483647"),
        ("data.pkl", pickle.dumps([1]), "holds list, not tensors"),
        ("data.pkl", pickle.dumps({1: 2}), "holds more than tensors: 1 is int"),
        ("data.pkl", b"cbuiltins\neval\n.", "it names builtins.eval, which is not a tensor"),
        ("byteorder", b"middle", "its byte order is 'middle'"),
    ],
)
def test_records_that_are_not_as_they_should_be_are_named(path, name, content, message):
    change_record(path, name, content)
    with pytest.raises(CheckpointError, match=message):
        values(path)


def test_a_record_that_is_there_twice_is_refused(path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as target:
        target.writestr(target.namelist()[-1], b"")
    with pytest.raises(CheckpointError, match="twice"):
        read_official_tensors(path)


def test_a_truncated_zip_is_refused(path):
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        read_official_tensors(path)
