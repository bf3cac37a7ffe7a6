"""What an installation offers: commands, types, and the model class for lm-eval."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_tf
from megatron_tf.commands.registry import COMMANDS
from tests.support.paths import ROOT


def installed(group, name):
    """What an entry point of the installed package names."""
    (found,) = importlib.metadata.entry_points(group=group, name=name)
    return found.load()


def run_installed(folder, *arguments, program=None):
    """The finished command `megatron-tf ARGUMENTS`, or `program` with them, in `folder`."""
    start = [Path(sys.executable).with_name("megatron-tf")] if program is None else [sys.executable, "-c", program]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*start, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command, tmp_path):
    done = run_installed(tmp_path, command, "--help")
    assert done.returncode == 0, done.stderr
    assert re.match(r"usage: (megatron|lm-eval|torchrun)", done.stdout)


def test_every_tool_is_a_command():
    modules = {entry.module for entry in COMMANDS.values() if entry.is_tool}
    assert modules == {path.stem for path in (ROOT / "tools").glob("*.py")}


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.stem)
def test_a_tool_only_calls_its_command(path):
    names = {entry.module: name for name, entry in COMMANDS.items()}
    _, program = path.read_text().split('"""\n\n')
    assert program == (
        "from megatron_tf.commands.runner import run_script\n\n"
        f'if __name__ == "__main__":\n    raise SystemExit(run_script("{names[path.stem]}"))\n'
    )


def test_no_module_has_two_names():
    assert importlib.util.find_spec("megatron_tf.tools") is None
    assert not (ROOT / "tools" / "__init__.py").exists()
    shared = {f"megatron_tf.{entry.module}" for entry in COMMANDS.values() if not entry.is_tool}
    for name in shared:
        assert importlib.import_module(name).main.__module__ == name.replace("megatron_tf.", "megatron_tf.commands.")


def test_the_command_lists_them_and_refuses_others(tmp_path):
    for arguments, code in (["--help"], 0), ([], 0), (["preproces-data"], 2):
        done = run_installed(tmp_path, *arguments)
        assert done.returncode == code
        assert code or all(f"  {name} " in done.stdout for name in COMMANDS)
    assert "no command 'preproces-data'" in done.stderr


def test_the_version_is_that_of_the_package(tmp_path):
    done = run_installed(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"megatron_tf {megatron_tf.__version__}\n")


@pytest.mark.parametrize("name", ["preprocess_data", "preprocess-data"])
def test_a_command_has_two_spellings(name, tmp_path):
    done = run_installed(tmp_path, name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: megatron-tf preprocess-data ")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("preproces-data", "preprocess-data"), ("Reshard_checkpoint", "reshard-checkpoint"), ("pretran", "pretrain")],
)
def test_the_nearest_command_is_suggested_to_a_typo(typo, meant, tmp_path):
    done = run_installed(tmp_path, typo)
    assert done.returncode == 2
    assert done.stderr == f"error: megatron-tf has no command {typo!r}; did you mean {meant!r}?\n"


def test_a_name_like_no_command_is_given_no_suggestion(tmp_path):
    done = run_installed(tmp_path, "xyz")
    assert done.stderr == "error: megatron-tf has no command 'xyz'; megatron-tf --help lists them\n"


def without(package):
    """A program that runs `megatron-tf` where a package is not installed."""
    return f"import sys\nsys.modules[{package!r}] = None\nfrom megatron_tf.__main__ import main\nsys.exit(main())"


def test_a_missing_package_is_named_with_what_installs_it(tmp_path):
    done = run_installed(tmp_path, "plot-run", "a.jsonl", "--output", "a.png", program=without("matplotlib"))
    assert done.returncode == 1
    assert done.stderr == (
        "error: megatron-tf plot-run needs matplotlib, which is not installed: pip install '.[plot]' in a clone of "
        "megatron_tf\n"
    )


def test_a_command_explains_itself_without_what_it_needs(tmp_path):
    done = run_installed(tmp_path, "plot-run", "--help", program=without("matplotlib"))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_package_that_every_command_needs_is_named(tmp_path):
    done = run_installed(tmp_path, "pretrain", "--help", program=without("pydantic"))
    assert done.returncode == 1
    assert done.stderr == (
        "error: megatron-tf pretrain needs pydantic, which is not installed: pip install . in a clone of megatron_tf\n"
    )


def test_lm_eval_finds_the_model_class():
    """As releases after 0.4.13 do, by the entry point, and as `register` has it."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    from megatron_tf.lm_eval import register

    register()
    register()
    found = installed("lm_eval.models", "megatron_tf")
    assert issubclass(found, LM)
    assert get_model("megatron_tf") is found


def test_types_and_version_come_with_the_package():
    folder = Path(megatron_tf.__file__).parent
    assert (folder / "py.typed").is_file()
    assert (folder / "data" / "_index.pyi").is_file()
    assert (folder / "kernels" / "_native.pyi").is_file()
    assert importlib.metadata.version("megatron_tf") == megatron_tf.__version__


def test_extras_are_those_of_the_documentation():
    extras = importlib.metadata.metadata("megatron_tf").get_all("Provides-Extra")
    expected = "arrow bench datasets dev docs eval gpu hf kubernetes mpi plot wandb"
    assert set(extras) == set(expected.split())
    documented = (ROOT / "docs" / "installation.md").read_text()
    assert all(f"`{extra}`" in documented for extra in extras)
