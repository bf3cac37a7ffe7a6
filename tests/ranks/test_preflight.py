"""What is found before the first step."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_tf.config import ConfigError
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.training.supervision import preflight
from tests.support.training import small_run

ALONE = Mesh(torch.device("cpu"))


def test_a_sound_run_has_nothing_to_warn_of(tmp_path):
    config = small_run(checkpoint={"save": tmp_path / "new" / "run"}, logging={"metrics_file": tmp_path / "m.jsonl"})
    assert preflight.preflight(config, ALONE) == []
    assert list((tmp_path / "new" / "run").iterdir()) == []


@pytest.mark.parametrize(
    "section, key, below",
    [("checkpoint", "save", ""), ("logging", "metrics_file", "m.jsonl"), ("logging", "tensorboard_dir", "")],
)
def test_what_cannot_be_written_is_named(tmp_path, section, key, below):
    (tmp_path / "file").write_text("in the way")
    config = small_run(**{section: {key: tmp_path / "file" / "folder" / below}})
    with pytest.raises(ConfigError, match=rf"rank 0 \(host .*\): {section}.{key} can't be written: .*file/folder"):
        preflight.preflight(config, ALONE)


def test_a_metrics_file_that_can_be_written_needs_no_directory_that_can(tmp_path):
    """Nobody can make a file in /proc/self/fd, root included; its entries are links."""
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        config = small_run(logging={"metrics_file": Path(f"/proc/self/fd/{file.fileno()}")})
        assert preflight.preflight(config, ALONE) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert preflight.preflight(small_run(logging={"metrics_file": Path("/dev/full")}), ALONE) == []


def test_a_metrics_file_is_kept_and_a_directory_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "link").symlink_to(tmp_path / "metrics.jsonl")
    assert preflight.preflight(small_run(logging={"metrics_file": tmp_path / "link"}), ALONE) == []
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    with pytest.raises(ConfigError, match=r"logging\.metrics_file can't be written: .*Is a directory"):
        preflight.preflight(small_run(logging={"metrics_file": tmp_path}), ALONE)


@pytest.mark.parametrize(("precision", "parameter_bytes"), [("fp32", 12), ("bf16", 12), ("fp64", 24)])
def test_a_disk_too_small_for_two_checkpoints_is_warned_of(tmp_path, monkeypatch, precision, parameter_bytes):
    config = small_run(checkpoint={"save": tmp_path / "run"}, training={"precision": precision})
    needed = 2 * parameter_bytes * (3 * 2 * 32 * (3 * 32 + 24 + 64) + 104 * 32 + 2 * 32)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed))
    assert preflight.preflight(config, ALONE) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(needed - 1))
    (warning,) = preflight.preflight(config, ALONE)
    assert "the next 2 checkpoints take" in warning


def on_ranks(mesh, fault):
    """The outcome on this rank, where rank 1 has a fault."""
    here = preflight
    saved = here._versions, here.time.time, here.dist.all_reduce
    if mesh.world.rank() == 1:
        if fault == "version":
            here._versions = lambda: saved[0]() | {"torch": "0.4.1"}
        elif fault == "clock":
            here.time.time = lambda: saved[1]() - 3600
        elif fault == "sum":
            here.dist.all_reduce = lambda tensor, group: (saved[2](tensor, group=group), tensor.add_(1))
    try:
        return preflight.preflight(small_run(), mesh)
    except ConfigError as error:
        return str(error)
    finally:
        here._versions, here.time.time, here.dist.all_reduce = saved


@pytest.mark.parametrize(
    "fault, said",
    [
        ("none", "[]"),
        ("version", "torch is 0.4.1, but"),
        ("clock", "clocks differ by 3600 s between rank 0"),
        ("sum", "an all-reduce over the 2 ranks of tp gives [3.0, 2.0]"),
    ],
)
def test_ranks_that_differ_are_named_on_every_rank(rank_pool, fault, said):
    answers = rank_pool.run(on_ranks, 2, 1, 1, fault)
    assert answers[0] == answers[1]
    assert said in str(answers[0])
    assert fault == "none" or "rank 1" in str(answers[0])
