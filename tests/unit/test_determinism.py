"""Deterministic algorithms: taken, and what has none is an error."""

import os

import pytest
import torch
import yaml

from megatron_tf import pretrain
from megatron_tf.config import ConfigError
from megatron_tf.config.load import to_dict
from megatron_tf.training.step import determinism
from tests.support.training import small_run


@pytest.fixture
def restored(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def put(values):
    """An operation of which torch has no deterministic kind."""
    return values.put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)


@pytest.mark.usefixtures("restored")
def test_what_cannot_repeat_its_bits_is_an_error():
    put(torch.zeros(3))
    determinism.use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        put(torch.zeros(3))


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_asks_for_them(tmp_path, monkeypatch, asked):
    calls = []
    monkeypatch.setattr(determinism, "use_deterministic_algorithms", lambda: calls.append(True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(small_run(training={"deterministic": asked}))))
    assert pretrain.main([str(tmp_path / "run.yaml")]) == 1, "there is no data"
    assert calls == [True] * asked


def test_attention_that_cannot_is_refused():
    with pytest.raises(ConfigError, match=r"training.deterministic needs kernels.attention sdpa, but it is flash_attn"):
        small_run(training={"deterministic": True}, kernels={"attention": "flash_attn"})
