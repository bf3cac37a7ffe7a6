"""The wheel, with what `pip install .` brings and nothing else, does the three jobs from an empty folder."""

import base64
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution

import pytest

pytest.importorskip("packaging", reason="packaging is not installed")

import yaml
from packaging.requirements import Requirement

from megatron_tf.config.load import to_dict
from tests.support.data import write_tokenizer
from tests.support.paths import EXAMPLES, ROOT
from tests.support.training import small_run

NOT_SOURCES = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "runs", "tests", "docs")
SHARD = EXAMPLES / "data" / "pile_sample_heldout.jsonl.zst"


def required(name, extras=("",)):
    """The installed distributions that a package needs, directly or not, by name and extras."""
    found, waiting = {}, [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        for requirement in map(Requirement, distribution(name).requires or []):
            key = requirement.name, *sorted(requirement.extras)
            marker = requirement.marker
            if key not in found and (marker is None or any(marker.evaluate({"extra": extra}) for extra in extras)):
                found[key] = distribution(requirement.name)
                waiting.append((requirement.name, ("", *requirement.extras)))
    return found.values()


def link_files(packages, site):
    """Their files in another site-packages, as links."""
    for package in packages:
        for file in package.files:
            target = site / file
            if ".." not in file.parts and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.locate())


def build_wheel(folder):
    """The wheel of a copy of the sources, so that nothing that was built before gets in."""
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*command, folder, folder / "source"], check=True, capture_output=True)
    (wheel,) = folder.glob("megatron_tf-*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a virtual environment with the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder / "venv", symlinks=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    link_files(required("megatron_tf"), site)
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(site)
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def call(python, tmp_path_factory):
    """Run `python -m ARGUMENTS` in an empty folder: what it prints, or what it says when it fails."""
    folder = tmp_path_factory.mktemp("empty")
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}

    def run(*arguments, code=0):
        done = subprocess.run(
            [python, "-m", *map(str, arguments)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    run.folder = folder
    return run


def preprocess(call, kind, file):
    options = ["--tokenizer-type", kind, "--tokenizer-model", file, "--append-eod", "--output-prefix", kind]
    call("megatron_tf", "preprocess-data", "--input", SHARD, *options)


def write_config(path, model=None, **sections):
    data = {
        "data_path": ["SentencePieceTokenizer_text_document"],
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": "tokenizer.model",
    }
    path.write_text(
        yaml.safe_dump(to_dict(small_run(model={"vocab_size": 512, **(model or {})}, data=data, **sections)))
    )


def test_the_extras_are_not_there(call):
    for package in ("transformers", "lm_eval", "matplotlib", "mpi4py", "pytest", "triton", "safetensors"):
        assert f"No module named {package}" in call(package, code=1)


def test_the_three_jobs(call):
    call("megatron_tf", "train-tokenizer", "--input", SHARD, "--vocab-size", "512", "--output-prefix", "tokenizer")
    preprocess(call, "SentencePieceTokenizer", "tokenizer.model")
    ranks = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_tf.pretrain"]
    write_config(
        call.folder / "base.yaml",
        training={"train_iters": 4},
        parallel={"tensor_model_parallel_size": 2},
        checkpoint={"save": "base"},
    )
    call(*ranks, "base.yaml")
    grow = ["--grow", "ffn=96", "--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "2"]
    call("megatron_tf", "reshard-checkpoint", "--load", "base", "--save", "grown", *grow, "--verify")
    write_config(
        call.folder / "grown.yaml",
        model={"ffn_tokens": 96},
        training={"train_iters": 6},
        parallel={"pipeline_model_parallel_size": 2},
        checkpoint={"load": "grown", "save": "grown", "allow_changes": ["training.train_iters"]},
    )
    assert "at step 4" in call(*ranks, "grown.yaml")
    assert "The" in call("megatron_tf", "generate", "grown", "--prompt", "The", "--max-new-tokens", "4")


def test_the_other_tokenizers(call):
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (call.folder / "r50k_base.tiktoken").write_bytes(ranks)
    preprocess(call, "TikTokenizer", "r50k_base.tiktoken")
    preprocess(call, "HFTokenizer", write_tokenizer(call.folder / "tokenizer.json", 60))


def test_a_command_without_its_extra_says_so(call):
    error = call("megatron_tf", "plot-run", "x.jsonl", "--output", "x.png", code=1)
    assert error.endswith("needs matplotlib, which is not installed: pip install '.[plot]' in a clone of megatron_tf\n")
    assert "pip install '.[eval]'" in call("megatron_tf", "lm-eval", "run", code=1)
