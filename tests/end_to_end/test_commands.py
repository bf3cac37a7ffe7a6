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


def test_the_command_lists_them_and_refuses_others(tmp_path):
    for arguments, code in (["--help"], 0), ([], 0), (["preproces-data"], 2):
        done = run_installed(tmp_path, *arguments)
        assert done.returncode == code
        assert all(f"  {name} " in done.stdout + done.stderr for name in COMMANDS)
    assert "no command 'preproces-data'" in done.stderr


def test_what_is_not_installed_is_named(tmp_path):
    program = (
        "import sys\nsys.modules['matplotlib.axes'] = None\nfrom megatron_tf.__main__ import main\nsys.exit(main())"
    )
    done = run_installed(tmp_path, "plot-run", "--help", program=program)
    assert done.returncode == 1
    assert done.stderr == "error: megatron-tf plot-run needs matplotlib.axes, which is not installed\n"


def test_lm_eval_finds_the_model_class():
    """As releases after 0.4.13 do, by the entry point, and as `register` has it."""
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
    assert (folder / "_index.pyi").is_file()
    assert importlib.metadata.version("megatron_tf") == megatron_tf.__version__


def test_extras_are_those_of_the_documentation():
    extras = importlib.metadata.metadata("megatron_tf").get_all("Provides-Extra")
    assert set(extras) == {"bench", "dev", "eval", "gpu", "hf", "mpi", "plot", "wandb"}
    documented = (ROOT / "docs" / "installation.md").read_text()
    assert all(f"`{extra}`" in documented for extra in extras)
