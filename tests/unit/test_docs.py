"""The pages of docs that are programs."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from megatron_tf.config import GrowthStage, parse_config
from tests.support.docs import python_blocks
from tests.support.models import random_model, write_checkpoint
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "parameter_tokens.md"
API = ROOT / "docs" / "api.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")])
FOLDERS = "tests|docs|examples|benchmarks|tools|megatron_tf|requirements|csrc"


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


def test_the_training_loop_of_the_api_page_runs(tmp_path, monkeypatch, capsys):
    """It learns, growth keeps the loss and the learning rate, and what it saves resumes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = {}
    for number, block in enumerate(python_blocks(API), 1):
        exec(compile(block, f"{API.name}, block {number}", "exec"), found)
    losses, model, optimizer = found["losses"], found["model"], found["optimizer"]
    assert "after the first growth" in capsys.readouterr().out
    assert losses[0] > 5
    assert losses[99] < 0.5 * losses[0]
    assert losses[149] < losses[99]
    for step in found["stages"]:
        assert abs(losses[step] - losses[step - 1]) < 0.1
    assert found["scheduler"].last_epoch == 150
    assert model.config.num_layers == 3
    assert optimizer.param_groups[0]["initial_lr"] == 2e-3
    assert optimizer.param_groups[0]["lr"] == 0.0
    ids, resumed = found["ids"], found["resumed"]
    assert torch.equal(model(ids), resumed(ids))
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    assert all(optimizer.runs(one) == found["resumed_optimizer"].runs(other) for one, other in pairs)
    assert found["y"].shape == (8, 32)
    x = torch.randn(8, 64)
    torch.testing.assert_close(found["larger"](x), found["layer"](x))


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch, capfd):
    """Its own checks hold, and its commands say what the page says of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = {}
    for number, block in enumerate(python_blocks(TUTORIAL), 1):
        exec(compile(block, f"{TUTORIAL.name}, block {number}", "exec"), found)
    said = capfd.readouterr().out
    assert "41,024 -> 61,504 parameters, logits differ by " in said
    assert re.search(r"^step +20/20 .*^wrote .*grown/step_00000020$.*^step +40/40 ", said, re.MULTILINE | re.DOTALL)
    # the page's own Pattention is the models' one for every input, and tau from the new N is not
    x = torch.randn(50, found["D"], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = found["layer"](x)
        grown = found["pattention"](x, found["grown_keys"], found["grown_values"], found["tau"])
    torch.testing.assert_close(grown, y)
    assert (found["moved"] - found["y"]).abs().max() > 0.1


def test_the_stage_that_the_growth_page_shows_is_one():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "growth.md").read_text(), re.DOTALL)
    (stage,) = yaml.safe_load(block)["growth"]
    assert parse_config(GrowthStage, stage, "growth.md").hidden_multiple == 2
    of_comments = re.findall(r"^ +# ([a-z_]+: [a-z0-9]+) ", block, re.MULTILINE)  # instead of the block `optimizer`
    del stage["optimizer"]
    parsed = parse_config(GrowthStage, stage | yaml.safe_load("\n".join(of_comments)), "growth.md")
    assert (parsed.rewarmup, parsed.rewarmup_iters) == ("new", 1430)


@pytest.mark.parametrize(
    ("script", "folder", "count"), [("drawings.py", ".", 3), ("growth_drawings.py", "growth", 11)], ids=lambda x: str(x)
)
def test_drawings_are_what_their_script_draws(script, folder, count, tmp_path):
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, ROOT / "docs" / script, tmp_path], check=True, timeout=120)
    words = re.compile(r"<text[^>]*>([^<]*)</text>")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in (ROOT / "docs" / folder).glob("*.svg"))
    assert len(names) == count
    for name in names:
        drawn, kept = ((place / name).read_text() for place in (tmp_path, ROOT / "docs" / folder))
        assert words.findall(drawn) == words.findall(kept) != []


def test_the_site_builds_without_a_warning(tmp_path):
    """Every link and anchor leads somewhere, every page is in the menu, lists are lists, and the API's names exist."""
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
    for page in pages:
        folder = tmp_path / "site" / ("" if page == "index" else page)
        article = re.search("<article.*</article", (folder / "index.html").read_text(), re.DOTALL)
        source = (ROOT / "docs" / f"{page}.md").read_text()
        assert article[0].count("<li>") == list_items(source), f"a list of {page}.md is not one on the site"
    names = re.findall(r"^::: (.*)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert all(f'id="{name}"' in api for name in names)
    assert len(names) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_that_a_page_names_exist(page):
    """Links to files, and paths of the repository between backticks, also those of tests named without their folder."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(rf"`(?:python |bash |sbatch )?((?:{FOLDERS})/[\w./*-]+)", text)
    assert [path for path in paths if not list(ROOT.glob(path))] == []
    tests = re.findall(r"`(test_\w+\.py)`", text)
    assert [name for name in tests if not list((ROOT / "tests").rglob(name))] == []


def list_items(source):
    """Count the items of a page's lists that are not nested."""
    prose = re.sub(r"^```.*?^```", "", source, flags=re.MULTILINE | re.DOTALL)
    return len(re.findall(r"^(?:- |\d+\. )", prose, re.MULTILINE))


def test_pictures_are_small():
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 100_000, f"{picture} is large for a repository"


def test_every_promise_names_a_test_that_exists():
    page = (ROOT / "docs" / "proofs.md").read_text()
    promises = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    for promise in promises:
        assert "`tests/" in promise, promise
        assert set(re.findall(r"test_\w+\.py", promise)) <= files, promise
    readme = (ROOT / "README.md").read_text()
    assert f"has {len(promises)} of them" in readme
    for line in re.findall(r"^\| .*`tests/.*$", readme, re.MULTILINE):
        assert line.replace("](docs/", "](") in promises, line
