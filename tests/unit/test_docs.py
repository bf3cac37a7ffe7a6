"""The pages of docs that are programs."""

import re

import torch

from tests.support.docs import python_blocks
from tests.support.models import random_model, write_checkpoint
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "parameter_tokens.md"


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


def test_pictures_are_small():
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < 100_000, f"{picture} is large for a repository"
