"""Kernels that real compilers can't build: one line under `compiled`, eager kernels under `auto`."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.support.commands import ENVIRONMENT, free_port, make_run
from tests.support.paths import ROOT
from tests.support.processes import PythonProcess

PRETRAIN = [sys.executable, "-m", "megatron_tf.pretrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_tf.pretrain"]
COMPILED = "--kernels.pattention=compiled"
LINE = (
    r"error: kernels\.pattention: compiled kernels can't be built on host \S+: .*{cause}.*: {remedy}, or choose eager\n"
)
NO_COMPILER = LINE.format(cause="No working C.. compiler found", remedy=r"install g\+\+ or set CXX")
NO_SPACE = LINE.format(cause="", remedy="move the Python environment to a path without spaces")
NO_CACHE = LINE.format(cause="{cause}", remedy="set TORCHINDUCTOR_CACHE_DIR to a writable directory with free space")
AUTO_IS_COMPILED = """
import sys
from megatron_tf import pretrain
from megatron_tf.kernels import dispatch
from megatron_tf.kernels.compiled import CompiledKernels

dispatch.choose_pattention = lambda choice, device, dtype: CompiledKernels()
sys.exit(pretrain.main(sys.argv[1:]))
"""


def without_compiler(folder):
    """CXX names nothing, and nothing is in the cache."""
    return {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


def torch_below_a_space(folder):
    """torch is imported from a path with a space: there it is a link, which Python does not resolve."""
    (folder / "with space").mkdir()
    (folder / "with space" / "torch").symlink_to(torch.__path__[0])
    return {"PYTHONPATH": str(folder / "with space"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


def read_only_cache(folder):
    """A cache directory that takes no files, except from root."""
    (folder / "cache").mkdir(mode=0o555)
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


def full_cache(folder):
    """A cache directory for `with_full_disk`."""
    (folder / "cache").mkdir()
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}


def with_full_disk(folder):
    """What starts a command that finds a full disk in `folder`/cache."""
    mount = 'mount -t tmpfs -o size=64k tmpfs "$0" && { cat /dev/zero >"$0"/all 2>/dev/null; exec "$@"; }'
    users = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *users, "--mount", "sh", "-c", mount, str(folder / "cache")]


BUG_ON_RANK_0 = """
import os, sys
from megatron_tf import pretrain
from megatron_tf.kernels.compiled import CompiledKernels

def forward(*arguments, **options):
    raise RuntimeError("a bug")

if os.environ["RANK"] == "0":
    CompiledKernels.forward = forward
sys.exit(pretrain.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("builds"), training={"train_iters": 1}) / "run.yaml"


def start(command, environment):
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.parametrize(("fault", "line"), [(without_compiler, NO_COMPILER), (torch_below_a_space, NO_SPACE)])
def test_a_choice_that_cannot_be_built_ends_the_run_with_one_line(config, tmp_path, fault, line):
    done = start([*PRETRAIN, config, COMPILED], fault(tmp_path))
    assert re.fullmatch(line, done.stderr), done.stderr
    assert done.returncode == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only directory")
def test_a_read_only_cache(config, tmp_path):
    done = start([*PRETRAIN, config, COMPILED], read_only_cache(tmp_path))
    assert re.fullmatch(NO_CACHE.format(cause="Permission denied"), done.stderr), done.stderr
    assert done.returncode == 1


def test_a_full_cache(config, tmp_path):
    environment, full = full_cache(tmp_path), with_full_disk(tmp_path)
    probe = start([*full, "true"], environment)
    if probe.returncode != 0:
        pytest.skip(f"no disk can be mounted: {probe.stderr.strip()}")
    done = start([*full, *PRETRAIN, config, COMPILED], environment)
    assert re.fullmatch(NO_CACHE.format(cause="No space left on device"), done.stderr), done.stderr
    assert done.returncode == 1


def test_a_cache_that_cannot_be_made(config, tmp_path):
    (tmp_path / "file").touch()
    done = start([*PRETRAIN, config], {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")})
    message = r"error: TORCHINDUCTOR_CACHE_DIR can't be created: .*: set it to .*\n"
    assert re.fullmatch(message, done.stderr), done.stderr
    assert done.returncode == 1


def test_every_rank_ends_with_the_line(config, tmp_path):
    options = [COMPILED, "--parallel.tensor_model_parallel_size=2"]
    done = start([*TORCHRUN, config, *options], without_compiler(tmp_path))
    assert done.returncode == 1
    for rank in (0, 1):
        assert re.search(rf"\[rank {rank}\] {NO_COMPILER}", done.stderr), done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert "ChildFailedError" in done.stderr


def test_auto_falls_back_to_eager_kernels(config, tmp_path):
    script = tmp_path / "auto.py"
    script.write_text(AUTO_IS_COMPILED)
    environment = {**without_compiler(tmp_path), "PYTHONPATH": str(ROOT)}
    done = start([sys.executable, script, config], environment)
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stdout.splitlines() if line.startswith("warning: "))
    line = NO_COMPILER.replace("error", "warning").replace(r", or choose eager\n", "; auto falls back to eager")
    assert re.fullmatch(line, warning)
    assert "kernels: auto selected pattention eager" in done.stdout
    assert "step      1/1" in done.stdout


def test_another_error_of_the_first_rank_ends_the_others_at_once(config, tmp_path):
    """Without a launcher that would end them."""
    script, places = (
        tmp_path / "bug.py",
        {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    )
    script.write_text(BUG_ON_RANK_0)
    command = [sys.executable, str(script), str(config), COMPILED, "--parallel.tensor_model_parallel_size=2"]
    ranks = [
        PythonProcess(command, environment={**ENVIRONMENT, **places, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
    ]
    assert "RuntimeError: a bug" in ranks[0].communicate(timeout=120)[1]
    start = time.monotonic()
    assert "[rank 1] error: " in ranks[1].communicate(timeout=120)[1]
    assert time.monotonic() - start < 20
    assert [rank.returncode for rank in ranks] == [1, 1]
