"""The error policy of commands: one line for a user, a traceback for a bug, and what torchrun reads of both."""

import errno
import gc
import io
import json
import signal
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.lock import LockedError
from megatron_tf.commands import build_index, lm_eval
from megatron_tf.commands.resharding import VerificationError
from megatron_tf.commands.runner import command, import_late, is_of_user
from megatron_tf.config import ConfigError
from megatron_tf.data.indexed_dataset import DataError
from megatron_tf.errors import UserError
from megatron_tf.extras import needed_by
from megatron_tf.parallel.launch import LaunchError
from megatron_tf.parallel.mesh import LayoutError
from megatron_tf.training.run.recovery import DivergedError
from megatron_tf.training.supervision.watchdog import LostRankError


def failing(error):
    """The `main` of a command that raises `error`."""

    @command(interrupted="interrupted: as it likes")
    def main(arguments=None):
        raise error

    return main


@pytest.mark.parametrize(
    "kind",
    [
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        LaunchError,
        LayoutError,
        LockedError,
        LostRankError,
        UserError,
    ],
)
def test_what_a_user_can_fix_is_one_line_and_exit_code_1(kind, capsys):
    assert failing(kind("write it otherwise"))([]) == 1
    assert capsys.readouterr().err == "error: write it otherwise\n"


def test_an_error_may_have_an_exit_code_of_its_own(capsys):
    assert failing(VerificationError("differs"))([]) == 3
    assert capsys.readouterr().err == "error: differs\n"


@pytest.mark.parametrize("bug", [ValueError("cannot reshape"), KeyError("tau"), ArithmeticError(), OverflowError()])
def test_a_bug_keeps_its_traceback(bug, capsys):
    with pytest.raises(type(bug)):
        failing(bug)([])
    assert capsys.readouterr().err == ""


def test_a_bug_in_a_command_is_not_told_as_an_error_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setattr("megatron_tf.config.load_config", lambda *_: [][7])
    with pytest.raises(IndexError):
        build_index.main([str(tmp_path / "run.yaml")])


def test_what_the_operating_system_says_is_for_the_user():
    assert is_of_user(FileNotFoundError(errno.ENOENT, "No such file", "a"))
    assert is_of_user(OSError(errno.ENOSPC, "No space left on device"))  # of write(), which knows no name
    assert not is_of_user(OSError(errno.EBADF, "Bad file descriptor"))
    assert not is_of_user(io.UnsupportedOperation("not writable"))


def test_a_terminal_that_can_not_show_a_text_is_for_the_user():
    assert is_of_user(UnicodeEncodeError("ascii", "\u00e9", 0, 1, "ordinal not in range(128)"))
    assert not is_of_user(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"))


def test_an_error_without_a_message_says_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert failing(LostRankError(""))([]) == 1
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "error.json").exists()


def test_an_interrupt_is_the_line_of_the_command(capsys):
    assert failing(KeyboardInterrupt())([]) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted: as it likes\n"


def test_ranks_are_named(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    failing(UserError("one\ntwo"))([])
    assert capsys.readouterr().err == "[rank 3] error: one\ntwo\n"


def in_table(path):
    """What torchrun says of a rank that left an error file."""
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    return str(ChildFailedError("pretrain", {0: failure}))


def test_torchrun_reads_the_message_of_a_user(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    failing(UserError("unknown key 'hidden_sise'"))([])
    assert json.loads(path.read_text())["message"]["message"] == "unknown key 'hidden_sise'"
    assert "  traceback : error: unknown key 'hidden_sise'\n" in in_table(path)
    assert "Traceback" not in in_table(path)


def test_torchrun_reads_the_traceback_of_a_bug(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError("a bug"))([])
    assert json.loads(path.read_text())["message"]["message"] == "ZeroDivisionError: a bug"
    assert "Traceback (most recent call last)" in in_table(path)
    assert "raise error" in in_table(path)


def test_an_error_file_that_can_not_be_written_costs_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "nowhere" / "error.json"))
    assert failing(UserError("said"))([]) == 1
    assert capsys.readouterr().err == "error: said\n"


def test_a_missing_package_is_named_with_what_brings_it():
    with (
        pytest.raises(UserError, match=r"^a plot needs matplotlib.*: pip install '\.\[plot\]' in a clone "),
        needed_by("a plot"),
    ):
        raise ModuleNotFoundError("no", name="matplotlib.figure")
    with pytest.raises(ModuleNotFoundError), needed_by("a bug of ours"):
        import_late("megatron_tf.no_such_module")


def test_imports_are_not_collected_and_what_they_hold_is_never_looked_at_again(tmp_path, monkeypatch):
    (tmp_path / "slow_module.py").write_text("import gc\n\nwas_enabled, held = gc.isenabled(), [[]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_late("slow_module")
    module = sys.modules.pop("slow_module")
    assert not module.was_enabled
    assert gc.isenabled()
    assert all(one is not module.held for one in gc.get_objects())
    with pytest.raises(ModuleNotFoundError):
        import_late("no_such_module")
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("module", "is_ours"),
    [("lm_eval.tasks", False), ("megatron_tf.inference.lm_eval_model", True)],
)
def test_what_lm_eval_refuses_is_one_line_and_a_bug_of_our_model_is_not(module, is_ours, monkeypatch, capsys):
    namespace = {"__name__": module}
    exec("def fail():\n    raise ValueError('no such task')", namespace)
    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    monkeypatch.setattr(lm_eval, "import_late", lambda module: None)
    monkeypatch.setattr(lm_eval, "register", namespace["fail"])
    if is_ours:
        with pytest.raises(ValueError, match="no such task"):
            lm_eval.main([])
    else:
        assert lm_eval.main([]) == 1
        assert capsys.readouterr().err == "error: no such task\n"
