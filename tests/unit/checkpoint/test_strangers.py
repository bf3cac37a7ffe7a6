"""Checkpoints from strangers, whose checksums hold: one line names what is wrong, soon and in little memory."""

import json
import os
import re
from pathlib import Path

import pytest

from megatron_tf.checkpoint.errors import CheckpointError, DamagedCheckpointError
from megatron_tf.checkpoint.files import file_size
from megatron_tf.checkpoint.format import LATEST, MANIFEST, METADATA
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import convert_checkpoint, inspect_checkpoint, reshard_checkpoint
from tests.support.damage import FILE, change_manifest, change_metadata, embedding, make_fifo, replace_file
from tests.support.toy import random_tensors, read_all, save


@pytest.fixture
def directory(tmp_path):
    """A checkpoint to change; an intact one is next to it."""
    save(tmp_path / "run", random_tensors(1), step=100)
    return save(tmp_path / "run", random_tensors(2), step=200)


@pytest.mark.parametrize("name", [FILE, METADATA, MANIFEST])
def test_a_fifo_is_refused_without_waiting_for_its_other_end(directory, name):
    make_fifo(directory / name)
    if name != MANIFEST:
        change_manifest(directory, lambda body: body["files"][name].update(bytes=0))
    with pytest.raises(DamagedCheckpointError, match=f"{name} must be a regular file: it is a FIFO") as caught:
        CheckpointReader(directory.parent)
    assert "the newest intact checkpoint is" in str(caught.value)


def test_latest_that_is_a_fifo_is_refused(directory):
    make_fifo(directory.parent / LATEST)
    with pytest.raises(CheckpointError, match="latest must be a regular file: it is a FIFO"):
        CheckpointReader(directory.parent)


@pytest.mark.parametrize(("target", "message"), [("/dev/zero", "out of its"), ("nowhere", "to a file")])
@pytest.mark.parametrize("name", [FILE, METADATA, MANIFEST])
def test_a_link_out_of_the_directory_is_refused(directory, name, target, message):
    (directory / name).unlink()
    (directory / name).symlink_to(target)
    with pytest.raises(CheckpointError, match=re.escape(str(directory / name)) + f" is a link {message}"):
        CheckpointReader(directory)


def test_a_device_is_no_file():
    with pytest.raises(CheckpointError, match="/dev/zero must be a regular file: it is a device"):
        file_size(Path("/dev/zero"))


def test_a_file_of_absurd_size_is_not_read(directory):
    os.truncate(directory / MANIFEST, 1 << 40)  # sparse
    with pytest.raises(CheckpointError, match=r"manifest\.json has 1,099,511,627,776 bytes, more than"):
        CheckpointReader(directory)


IMPOSSIBLE = {
    "negative step": (lambda m: m["training"].update(step=-7), "training.step is -7"),
    "infinite step": (lambda m: m["training"].update(step=float("inf")), "training.step is inf"),
    "step of a word": (lambda m: m["training"].update(step="7"), "training.step is '7'"),
    "true step": (lambda m: m["training"].update(step=True), "training.step is True"),
    "huge step": (lambda m: m["training"].update(step=10**300), "training.step is 1000"),
    "negative samples": (lambda m: m["training"].update(samples=-1), "training.samples is -1"),
    "no tau": (lambda m: m.pop("tau"), "tau is missing, expected an object"),
    "list of tau": (lambda m: m.update(tau=[1]), "tau is list"),
    "NaN in tau": (lambda m: m["tau"].update({"layers.0.ffn": float("nan")}), "tau of layers.0.ffn is nan"),
    "no lineage": (lambda m: m.pop("lineage"), "lineage is missing"),
    "lineage of words": (lambda m: m.update(lineage=["x"]), "lineage[0] is str, expected an object"),
    "no seed": (lambda m: m["config"]["training"].pop("seed"), "config.training.seed is missing"),
    "seq_length": (lambda m: m["config"]["training"].update(seq_length=0), "config.training.seq_length is 0"),
    "after growth": (lambda m: m.update(after_growth={}), "after_growth.step is missing"),
    "model of a number": (lambda m: m.update(model=3), "model is int, expected an object"),
    "tokenizer": (lambda m: m.update(tokenizer=None), "tokenizer is missing"),
}


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_impossible_metadata_is_named(directory, change, message):
    change_metadata(directory, change)
    with pytest.raises(DamagedCheckpointError, match=re.escape(f"metadata.json: {message}")):
        CheckpointReader(directory)


NO_MODEL = {
    "a lacking tensor": (
        lambda d: change_manifest(d, lambda b: b["groups"]["model"].pop("layers.1.ffn.key_tokens")),
        "its 'model' lacks layers.1.ffn.key_tokens",
    ),
    "a lacking moment": (
        lambda d: change_manifest(d, lambda b: b["groups"]["exp_avg"].pop("final_norm.bias")),
        "its 'exp_avg' lacks final_norm.bias",
    ),
    "a stranger": (
        lambda d: change_manifest(d, lambda b: b["groups"]["model"].update(extra=embedding(b))),
        "its 'model' also has extra",
    ),
    "no group": (lambda d: change_manifest(d, lambda b: b["groups"].clear()), "it holds 0 tensors"),
    "layers": (lambda d: change_metadata(d, lambda m: m["model"].update(num_layers=99_999)), "num_layers is 99,999"),
    "tokens": (lambda d: change_metadata(d, lambda m: m["model"].update(ffn_tokens=37)), "expected [37, 6]"),
    "columns": (
        lambda d: change_manifest(d, lambda b: embedding(b).update(shape=[24, 10**15])),
        "is [24, 1000000000000000] torch.float32, expected [24, 6]",
    ),
    "type": (lambda d: change_manifest(d, lambda b: embedding(b).update(dtype="I64")), "is [24, 6] torch.int64"),
    "tau": (lambda d: change_metadata(d, lambda m: m["tau"].pop("layers.2.ffn")), "tau of layers.2.ffn is missing"),
    "configuration": (lambda d: change_metadata(d, lambda m: m["model"].update(hidden_size=-1)), "hidden_size"),
}


@pytest.mark.parametrize(("change", "message"), NO_MODEL.values(), ids=NO_MODEL.keys())
def test_every_tool_refuses_what_is_not_a_complete_model(directory, tmp_path, change, message, capsys):
    change(directory)
    load, out = ["--load", str(directory)], ["--save", str(tmp_path / "out")]
    for tool, arguments in (
        (inspect_checkpoint, [str(directory), "--verify"]),
        (inspect_checkpoint, [str(directory)]),
        (reshard_checkpoint, [*load, *out]),
        (reshard_checkpoint, [*load, *out, "--grow", "ffn=48"]),
        (convert_checkpoint, ["--from", "megatron_tf", "--to", "official", *load, *out]),
        (convert_checkpoint, ["--from", "megatron_tf", "--to", "hf", "--skip-check", *load, *out]),
    ):
        assert tool.main(arguments) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ([24, 2**62], "F32", "which is too large for any file"),
        ([24, 6], ["F32"], "dtype is ['F32'], expected a string"),
    ],
)
def test_numbers_that_cannot_be_are_refused(directory, shape, dtype, message):
    change_manifest(directory, lambda body: embedding(body).update(shape=shape, dtype=dtype))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        CheckpointReader(directory)


def test_memory_is_not_taken_for_rows_that_a_file_has_not(directory):
    change_manifest(directory, lambda body: embedding(body).update(shape=[24, 10**15]))
    with pytest.raises(CheckpointError, match=r"is \[24, 6\] torch\.float32 in the file"):
        CheckpointReader(directory).read_rows("model", "embedding.weight", start=0, stop=24)


def change_offsets(directory, change):
    content = (directory / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    replace_file(directory, FILE, len(text).to_bytes(8, "little") + text + content[8 + length :])


LAYOUTS = {
    "shared bytes": lambda h: h["layers.0.ffn.key_tokens"].update(
        data_offsets=h["layers.0.ffn.value_tokens"]["data_offsets"]
    ),
    "a gap": lambda h: h.pop("layers.0.ffn.key_tokens"),
    "backwards": lambda h: h["embedding.weight"].update(data_offsets=[576, 0]),
    "bytes of none": lambda h: h.pop("final_norm.bias"),
    "no offsets": lambda h: h["embedding.weight"].pop("data_offsets"),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_file_that_safetensors_refuses_is_refused(directory, change):
    change_offsets(directory, change)
    with pytest.raises(CheckpointError, match=re.escape(FILE)):
        read_all(directory)
