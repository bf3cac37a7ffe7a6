"""Pattention and TokenFormer as modules of other people's programs."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

import megatron_tf
from megatron_tf.config import ConfigError, ModelConfig
from megatron_tf.errors import UserError
from megatron_tf.inference.model import LanguageModel
from megatron_tf.parallel.mesh import Mesh
from megatron_tf.tokenformer.normalization import NORMALIZATIONS
from megatron_tf.training.step.state import build_state
from tests.support.models import random_model, write_checkpoint
from tests.support.modules import MODEL, draw_ids
from tests.support.training import small_run


def new_model():
    return megatron_tf.TokenFormer(MODEL, seed=3)


@pytest.mark.parametrize("norm", NORMALIZATIONS)
def test_outputs_of_a_new_pattention_have_about_the_variance_of_its_inputs(norm):
    torch.manual_seed(0)
    layer = megatron_tf.Pattention(128, 96, num_tokens=512, norm_activation=norm)
    variance = float(layer(torch.randn(64, 128)).var().detach())
    assert 0.3 < variance < 1.5
    assert layer(torch.randn(2, 5, 128)).shape == (2, 5, 96)


def test_a_pattention_takes_the_place_of_a_linear_layer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(megatron_tf.Pattention(4, 16, num_tokens=32), torch.nn.GELU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(128, 4)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(x)[:, 0], x.prod(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_pattention_computes_in_the_type_of_its_input(dtype):
    torch.manual_seed(0)
    layer = megatron_tf.Pattention(8, 6, num_tokens=32)
    x = torch.randn(5, 8)
    exact = layer.double()(x.double())
    for module in (layer.float(), copy.deepcopy(layer).to(dtype)):
        y = module(x.to(dtype))
        y.sum().backward()
        assert y.dtype == dtype
        assert all(p.grad.dtype == p.dtype for p in module.parameters())
        torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


def test_a_state_dict_restores_the_temperature(tmp_path):
    """It holds only tensors, which other formats require."""
    layer = megatron_tf.Pattention(4, 4, num_tokens=16)
    layer.tau = 3.1234567890123
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = megatron_tf.Pattention(4, 4, num_tokens=16)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    assert other.tau == layer.tau
    assert torch.equal(other.key_tokens, layer.key_tokens)
    other.reset_parameters()
    assert other.tau == 4.0
    assert not torch.equal(other.key_tokens, layer.key_tokens)


def test_an_unknown_normalization_is_one_line():
    with pytest.raises(UserError, match=r"norm_activation is 'relu': known are l2_norm_gelu, gelu_l2_norm, softmax$"):
        megatron_tf.Pattention(4, 4, num_tokens=16, norm_activation="relu")


@pytest.mark.parametrize("norm", NORMALIZATIONS)
def test_a_new_model_has_the_initial_values_of_a_run_and_draws_nothing_from_torch(norm):
    config = small_run(model={"norm_activation": norm}, training={"seed": 11})
    torch.manual_seed(0)
    state = build_state(config, Mesh(torch.device("cpu")))
    model = megatron_tf.TokenFormer(config.model, seed=11)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), drawn)
    for (name, one), (other, two) in zip(
        state.model.named_parameters(), model.transformer.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two), name
    for path, pattention in state.model.pattentions().items():
        assert model.transformer.pattentions()[path].tau == pattention.tau == model.record.tau[path]


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_the_cross_entropy_of_the_logits(untied, dtype):
    model = megatron_tf.TokenFormer({**MODEL, "untie_embeddings_and_output_weights": untied}, dtype=dtype)
    ids = draw_ids()
    targets = ids[:, 1:].clone()
    targets[0, 2:5], targets[1, 0] = -100, -1
    logits = model(ids[:, :-1])
    assert logits.shape == (3, 8, 64)
    masked = targets.masked_fill(targets < 0, -100).flatten()
    expected = F.cross_entropy(logits.flatten(0, 1), masked)
    loss = model.loss(ids[:, :-1], targets)
    close = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(loss, expected, **close)
    parameters = list(model.parameters())
    for one, two in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, two, **close)


def test_targets_outside_the_vocabulary_are_refused():
    """Also those of the padding, which the logits have columns for."""
    model, ids = megatron_tf.TokenFormer(MODEL), draw_ids()
    targets = ids.clone()
    targets[1, 1] = 50
    with pytest.raises(UserError, match=r"targets has the id 50, but model\.vocab_size is 50$"):
        model.loss(ids, targets)
    assert model.loss(ids, torch.full_like(ids, -100)) == 0


def test_a_mistake_in_the_configuration_is_one_line():
    with pytest.raises(ConfigError, match=r"^config: unknown key 'fnn_tokens'; did you mean 'ffn_tokens'"):
        megatron_tf.TokenFormer({**MODEL, "fnn_tokens": 3})
    with pytest.raises(ConfigError, match="it must be an even number above 0"):
        megatron_tf.TokenFormer({**MODEL, "rotary_percent": 0.01})


def test_a_state_dict_restores_a_model_that_has_grown():
    model = megatron_tf.grow(new_model(), {"ffn_tokens": 128, "init": "duplicate", "insert_layers": [1]})
    buffer = io.BytesIO()
    torch.save({"config": vars(model.config), "model": model.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    other = megatron_tf.TokenFormer({k: v for k, v in saved["config"].items() if not k.startswith("__")})
    assert other.record != model.record
    other.load_state_dict(saved["model"])
    assert other.record == model.record
    assert len(other.record.lineage) == 1
    taus = [p.tau for p in model.transformer.pattentions().values()]
    assert [p.tau for p in other.transformer.pattentions().values()] == taus
    assert len(set(taus)) == 3
    with torch.no_grad():
        assert torch.equal(model(draw_ids()), other(draw_ids()))


def test_modules_can_be_copied_and_pickled():
    model = new_model()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, megatron_tf.TokenFormer)
        assert other.record == model.record
        with torch.no_grad():
            assert torch.equal(other(draw_ids()), model(draw_ids()))


def test_a_temperature_that_was_changed_by_hand_is_kept():
    model = new_model()
    model.transformer.pattentions()["layers.1.ffn"].tau = 2.5
    other = new_model()
    other.load_state_dict(model.state_dict())
    assert other.record.tau["layers.1.ffn"] == other.transformer.pattentions()["layers.1.ffn"].tau == 2.5
    assert megatron_tf.grow(model, {"qkv_tokens": 30}).record.tau["layers.1.ffn"] == 2.5


def test_the_state_dict_of_another_model_is_refused_before_anything_changes():
    small, grown = new_model(), megatron_tf.grow(new_model(), {"ffn_tokens": 128})
    before = copy.deepcopy(small.state_dict())
    with pytest.raises(UserError, match=r"the state_dict is of another model, .* build TokenFormer\(config\)"):
        small.load_state_dict(grown.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert small.record.lineage == ()


def test_load_returns_a_module_that_trains(tmp_path):
    saved = random_model()
    model = megatron_tf.load(write_checkpoint(tmp_path / "run", saved))
    assert isinstance(model, megatron_tf.TokenFormer)
    assert isinstance(model, LanguageModel)
    assert not model.training
    ids = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids), saved(ids))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train().loss(ids[:, :-1], ids[:, 1:]).backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_type_of_activations_follows_the_parameters_or_is_set():
    model = new_model().to(torch.float64)
    assert model(draw_ids()).dtype == torch.float64
    model = new_model()
    model.transformer.dtype = torch.bfloat16
    assert model(draw_ids()).dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_public_names_are_found_and_no_others():
    assert set(megatron_tf.__all__) == {"GrownAdamW", "Pattention", "TokenFormer", "grow", "load"}
    assert all(hasattr(megatron_tf, name) for name in megatron_tf.__all__)
    assert isinstance(new_model().config, ModelConfig)
    with pytest.raises(AttributeError, match="module 'megatron_tf' has no attribute 'Transformer'"):
        megatron_tf.Transformer  # noqa: B018
