"""The pages of docs that are programs."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.docs import python_blocks
from tests.support.models import random_model, write_checkpoint
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "parameter_tokens.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"


def test_the_page_on_parameter_tokens_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = random_model()
    root = write_checkpoint(tmp_path / "run", model)
    first, *others = python_blocks(PAGE)
    assert re.fullmatch(r'CHECKPOINT = ".*?".*\n', first)
    found = {"CHECKPOINT": str(root)}
    for number, block in enumerate(others, 1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), found)

    # what the page says of its tensors: y = P V at every position
    ids, name = found["encode"](found["CODE"]), "layers.1.attention.key"
    inputs = []
    pattention = model.transformer.pattentions()[name]
    hook = pattention.register_forward_hook(lambda module, given, out: inputs.append((given[0], out)))
    with torch.no_grad():
        logits = model(ids)
    ((x, y),) = inputs
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(ids), logits)
    weights = pattention.weights(x)
    assert torch.allclose(weights @ pattention.value_tokens, y, rtol=1e-4, atol=1e-4)
    assert torch.allclose(
        found["code"][name], (weights[:, 0, :, None] * pattention.value_tokens).norm(dim=-1), rtol=1e-4, atol=1e-4
    )
    assert (tmp_path / "parameter_tokens.png").stat().st_size > 10_000
    assert "of 64 tokens" in capsys.readouterr().out
    assert all(found["after"][text] != found["before"][text] for text in ("prose", "code"))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch, capfd):
    """Its own checks hold, and its commands say what the page says of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = {}
    for number, block in enumerate(python_blocks(TUTORIAL), 1):
        exec(compile(block, f"{TUTORIAL.name}, block {number}", "exec"), found)
    said = capfd.readouterr().out
    assert "41,024 -> 61,504 parameters, logits differ by 0.0" in said
    assert re.search(r"^step +20/20 .*^wrote .*grown/step_00000020$.*^step +40/40 ", said, re.MULTILINE | re.DOTALL)
    # the page's own Pattention is the models' one for every input, and tau from the new N is not
    x = torch.randn(50, found["D"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = found["layer"](x)
        grown = found["pattention"](x, found["grown_keys"], found["grown_values"], found["tau"])
    torch.testing.assert_close(grown, y)
    assert (found["moved"] - found["y"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["pattention", "mesh", "growth"])
def test_drawings_are_what_their_script_draws(name, tmp_path):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, ROOT / "docs" / "drawings.py", tmp_path], check=True, timeout=120)
    words = re.compile(r"<text[^>]*>([^<]*)</text>")
    drawn, kept = ((folder / f"{name}.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
    assert words.findall(drawn) == words.findall(kept) != []


def test_the_site_builds_without_a_warning(tmp_path):
    """Every link and anchor leads somewhere, every page is in the menu, and the API's names exist."""
    pytest.importorskip("zensical")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "megatron_tf").symlink_to(ROOT / "megatron_tf")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(f"- {page}.md\n" in menu for page in pages)
    names = re.findall(r"^::: (.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert all(f'id="{name}"' in api for name in names)
    assert len(names) > 5


def test_pictures_are_small():
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 100_000, f"{picture} is large for a repository"
