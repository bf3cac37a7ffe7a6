"""Whatever happens to a checkpoint's files is found, and the message names the file. Nothing is ever unpickled."""

import json
import os
import pickle
import random
import re
import shutil

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.format import MANIFEST, METADATA, read_manifest
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.commands import inspect_checkpoint, reshard_checkpoint
from tests.support.damage import change_manifest, embedding, replace_file
from tests.support.toy import random_tensors, read_all, record, same, save

SOME_FILE = "exp_avg-pp00-tp01-dp00.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A root with checkpoints of steps 100 and 200; only copies of it are touched."""
    root = tmp_path_factory.mktemp("sound")
    for step in (100, 200):
        save(root, random_tensors(step), (2, 1, 1), step=step)
    return root


@pytest.fixture
def root(sound, tmp_path):
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "run")


def flip_bit(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def use(path):
    """What a run does: read every tensor."""
    return read_all(path)


@pytest.mark.parametrize("name", [SOME_FILE, METADATA, MANIFEST])
@pytest.mark.parametrize("offset", [3, 40, -3])
def test_a_flipped_bit_is_named(root, name, offset):
    path = root / "step_00000200" / name
    flip_bit(path, offset)
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as caught:
        use(root)
    sound_one = root / "step_00000100"
    assert f"the newest intact checkpoint is {sound_one}" in str(caught.value)
    assert CheckpointReader(sound_one).step == 100


def test_a_manifest_that_would_still_make_sense_is_found_too(root):
    path = root / "step_00000200" / MANIFEST
    path.write_text(path.read_text().replace('"exp_avg_sq": {', '"exp_avg_xx": {'))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: its checksum does not match"):
        CheckpointReader(root)


def test_verify_finds_damage_that_nothing_reads(root):
    flip_bit(root / "step_00000200" / SOME_FILE, -1)
    reader = CheckpointReader(root)
    reader.read_rows("model", "embedding.weight", start=0, stop=24)
    with pytest.raises(
        CheckpointError, match=f"{SOME_FILE} is damaged: its checksum does not match; the newest intact"
    ):
        reader.verify()


@pytest.mark.parametrize("name", [SOME_FILE, METADATA, MANIFEST])
def test_a_truncated_file_is_named(root, name):
    path = root / "step_00000200" / name
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} is damaged")):
        CheckpointReader(root)


def test_a_missing_file_is_named(root):
    (root / "step_00000200" / SOME_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{SOME_FILE} is missing; the newest intact checkpoint"):
        CheckpointReader(root)


def test_a_foreign_file_is_named(root):
    (root / "step_00000200" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt does not belong to the checkpoint: remove it"):
        CheckpointReader(root)


def test_no_sound_one_is_said_too(root):
    for step in ("step_00000100", "step_00000200"):
        flip_bit(root / step / SOME_FILE, -1)
    with pytest.raises(CheckpointError, match="there is no other intact checkpoint"):
        CheckpointReader(root).verify()


def test_a_directory_without_a_manifest_is_not_a_checkpoint(root):
    (root / "step_00000200" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000200 is not a complete checkpoint: it has no manifest\.json"):
        CheckpointReader(root)


@pytest.mark.parametrize("name", ["../../etc", "", "step_00000200/../..", "\udcff", "/"])
def test_latest_names_a_step_or_is_damaged(root, name):
    (root / "latest").write_bytes(name.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"latest is damaged: .* write the name of a step_"):
        CheckpointReader(root)


def test_where_there_is_nothing_to_read(root, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "nowhere")
    (root / "latest").unlink()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: .* such as .*step_00000200"):
        CheckpointReader(root)


HOSTILE = {
    "version": (lambda body: body.update(format_version=99), "has format version 99; this program supports 1"),
    "path": (
        lambda body: body["files"].update({"../x.safetensors": {"bytes": 1, "xxh3_128": ""}}),
        "'../x.safetensors'",
    ),
    "absolute": (lambda body: body["files"].update({"/x.safetensors": {"bytes": 1, "xxh3_128": ""}}), "'/x.safetens"),
    "pickle": (
        lambda body: body["files"].update({"model.pt": {"bytes": 1, "xxh3_128": ""}}),
        "'model.pt', which is no",
    ),
    "dots": (
        lambda body: body["files"].update({"..": {"bytes": 1, "xxh3_128": ""}}),
        "names '..', which is not a valid file name",
    ),
    "no metadata": (lambda body: body["files"].pop(METADATA), "does not list metadata.json"),
    "unknown file": (
        lambda body: embedding(body)["pieces"][0].update(file="y"),
        "is stored in 'y', which is missing from the list of files",
    ),
    "gap": (lambda body: embedding(body)["pieces"].pop(0), "embedding.weight: expected a piece from row 0"),
    "overlap": (lambda body: embedding(body)["pieces"][1].update(start=3), "expected a piece from row 12, found [3,"),
    "short": (lambda body: embedding(body)["pieces"].pop(), "pieces end at row 12 of 24"),
    "negative": (lambda body: embedding(body).update(shape=[24, -6]), "has shape [24, -6]"),
    "scalar": (lambda body: embedding(body).update(shape=[]), "has shape []"),
    "words": (lambda body: embedding(body).update(shape=["24", 6]), "has shape ['24', 6]"),
    "type": (lambda body: embedding(body).update(dtype="object"), "has type 'object'; known are F64"),
    "no groups": (lambda body: body.pop("groups"), "groups is missing, expected an object"),
    "no list": (lambda body: embedding(body).update(pieces={}), "embedding.weight.pieces is dict, expected a list"),
    "negative row": (lambda body: embedding(body)["pieces"][0].update(start=-1), "pieces[0].start is -1, expected a"),
    "negative size": (lambda body: body["files"][SOME_FILE].update(bytes=-1), ".bytes is -1, expected a whole number"),
    "no checksum": (lambda body: body["files"][SOME_FILE].update(xxh3_128=7), ".xxh3_128 is 7, expected a string"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_refused(root, change, message):
    directory = root / "step_00000200"
    change_manifest(directory, change)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        CheckpointReader(directory)
    assert str(directory / MANIFEST) in str(caught.value)


def test_keys_of_a_manifest_that_are_not_known_are_ignored(root):
    directory = root / "step_00000200"

    def add_keys(body):
        for values in (body, body["files"][SOME_FILE], embedding(body), embedding(body)["pieces"][0]):
            values["of_a_later_version"] = {"compression": None}

    before = CheckpointReader(directory).manifest
    change_manifest(directory, add_keys)
    assert CheckpointReader(directory).manifest == before
    use(directory)


MISSING = {
    "files": lambda body: body,
    "files.metadata.json.bytes": lambda body: body["files"][METADATA],
    "files.metadata.json.xxh3_128": lambda body: body["files"][METADATA],
    "groups.model.embedding.weight.dtype": lambda body: embedding(body),
    "groups.model.embedding.weight.shape": lambda body: embedding(body),
    "groups.model.embedding.weight.pieces": lambda body: embedding(body),
    "groups.model.embedding.weight.pieces[1].file": lambda body: embedding(body)["pieces"][1],
    "groups.model.embedding.weight.pieces[1].start": lambda body: embedding(body)["pieces"][1],
    "groups.model.embedding.weight.pieces[1].stop": lambda body: embedding(body)["pieces"][1],
}


@pytest.mark.parametrize(("key", "holder"), MISSING.items(), ids=MISSING.keys())
def test_a_missing_key_of_a_manifest_is_named_with_its_file(root, key, holder):
    directory = root / "step_00000200"
    change_manifest(directory, lambda body: holder(body).pop(key.rpartition(".")[2]))
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(directory)
    message = str(caught.value)
    assert message.startswith(f"{directory / MANIFEST}: {key} is missing, expected a")
    assert "\n" not in message


def test_a_file_that_is_not_what_the_manifest_says_is_refused(root):
    directory = root / "step_00000200"
    good = (directory / SOME_FILE).read_bytes()
    for content, message in {
        b"": "is not a safetensors file",
        b"\xff" * 100: "is not a safetensors file",
        good.replace(b'"shape":[12,6]', b'"shape":[6,12]'): r"is \[6, 12\] torch.float32 in the file, \[12, 6\]",
        good.replace(b'"dtype":"F32"', b'"dtype":"I32"'): "does not hold embedding.weight",
        good[:-8]: r"layers\.2\.ffn\.value_tokens ends early",
    }.items():
        replace_file(directory, SOME_FILE, content)
        with pytest.raises(CheckpointError, match=f"{SOME_FILE}.*{message}"):
            use(directory)


@pytest.mark.parametrize("text", ["[]", "{}", "not json", '{"training": {}}', "[" * 100_000])
def test_metadata_that_is_none_is_refused(root, text):
    directory = root / "step_00000200"
    replace_file(directory, METADATA, text.encode())
    with pytest.raises(CheckpointError, match=r"metadata\.json does not say training\.step"):
        CheckpointReader(directory)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled(root, tmp_path):
    payload = pickle.dumps(Planted(tmp_path / "executed"))
    directory = root / "step_00000200"
    for name in (SOME_FILE, METADATA):
        replace_file(directory, name, payload)
        with pytest.raises(CheckpointError):
            use(directory)
    (directory / MANIFEST).write_bytes(payload)
    (root / "step_00000100" / "model.pt").write_bytes(payload)
    for path in (root, directory, root / "step_00000100"):
        with pytest.raises(CheckpointError):
            use(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(payload)
    assert (tmp_path / "executed").exists()  # the payload would have worked


def test_swapped_files_are_named(root):
    """Of the same size and with the same names in them: only their checksums tell."""
    one = root / "step_00000200" / SOME_FILE
    other = one.with_name(SOME_FILE.replace("exp_avg", "exp_avg_sq"))
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1])
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    with pytest.raises(CheckpointError, match=re.escape(str(one))):
        use(root)


@pytest.mark.slow
def test_any_flipped_bit_is_found_by_reader_inspection_and_tool(sound, tmp_path, capsys):
    """200 places drawn over all files; the tool leaves nothing behind."""
    chance = random.Random(0)
    root = shutil.copytree(sound, tmp_path / "run")
    files = [root / "latest", *sorted((root / "step_00000200").iterdir())]
    for _ in range(200):
        path = chance.choice(files)
        content = path.read_bytes()
        place = chance.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as caught:
            CheckpointReader(root).verify()
        assert str(root) in str(caught.value)
        assert path.name in str(caught.value) or path.name == "latest"
        assert inspect_checkpoint.main([str(root), "--verify"]) == 1
        assert reshard_checkpoint.main(["--load", str(root), "--save", str(tmp_path / "new")]) == 1
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert all(path.name in error or path.name == "latest" for error in errors)
        assert not (tmp_path / "new").exists() or list((tmp_path / "new").iterdir()) == []
        path.write_bytes(content)
    CheckpointReader(root).verify()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_change_of_a_byte_goes_unseen(sound, tmp_path_factory, data):
    directory = shutil.copytree(sound / "step_00000200", tmp_path_factory.mktemp("fuzz") / "step_00000200")
    path = data.draw(st.sampled_from(sorted(directory.iterdir())))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        found = CheckpointReader(directory)
        found.verify()
    except CheckpointError:
        return
    # white space in the manifest is not covered by its checksum, and changes nothing
    assert path.name == MANIFEST
    assert same(read_all(directory), random_tensors(200))
    assert found.record == record(200)


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_a_manifest_of_anything_is_an_error_not_a_crash(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("any")
    (directory / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        read_manifest(directory)
