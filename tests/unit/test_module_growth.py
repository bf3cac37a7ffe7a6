"""Growth of a module in memory: the bits of the tool, its optimizer, and what is refused."""

import copy

import numpy as np
import pytest
import torch
import yaml

import megatron_tf
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generation
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.save import save_checkpoint
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.config import GrowthStage, to_dict
from megatron_tf.errors import UserError
from megatron_tf.inference.model import LanguageModel
from megatron_tf.model.parallelize import parameter_shards
from megatron_tf.modules.in_memory import of_module
from megatron_tf.parallel.mesh import Mesh
from tests.support.data import write_data_set
from tests.support.modules import MODEL, draw_ids

MOMENTS = ("exp_avg", "exp_avg_sq")
STAGES = {
    "zero_key": {"qkv_tokens": 30, "ffn_tokens": {"1": 96}},
    "duplicate": {"ffn_tokens": 150, "proj_tokens": 32, "init": "duplicate"},
    "random": {"ffn_tokens": 96, "init": "random"},
    "rotated_key": {"ffn_tokens": 200, "proj_tokens": 32, "init": "rotated_key"},
    "zero_value": {"qkv_tokens": 30, "ffn_tokens": 96, "init": "zero_value"},
    "identity layers": {"insert_layers": [0, 2], "old_tokens_lr_scale": 0.5, "rewarmup_iters": 4},
    "copied layers": {"num_layers": 5, "layer_order": "stacked", "layer_init": "copy", "ffn_tokens": 96},
    "zero layers": {"num_layers": 4, "layer_init": "copy_zero", "adam_state": "reset_new"},
    "reset": {"ffn_tokens": 96, "adam_state": "reset"},
    "width": {"hidden_multiple": 2, "ffn_tokens": 96, "insert_layers": [1]},
    "uneven width": {"hidden_multiple": 1.5},
    "shrink and perturb": {"ffn_tokens": 96, "shrink_factor": 0.75, "perturb_std": 0.01},
    "second moments": {"ffn_tokens": 96, "adam_state": "reset_second", "new_tokens_lr_scale": 2.0},
}


def new_model(**keys):
    return megatron_tf.TokenFormer(MODEL, seed=3, **keys)


def trained(model=None, *, steps=3, how=None, groups=None):
    """A model after some steps, and its optimizer."""
    model = model or new_model()
    optimizer = torch.optim.AdamW(groups(model) if groups else model.parameters(), lr=1e-2, **(how or {}))
    train(model, optimizer, steps)
    return model, optimizer


def train(model, optimizer, steps):
    ids = draw_ids()
    for _ in range(steps):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(root, model, optimizer):
    """Write them as a checkpoint of a run, and return it."""
    checkpoint = of_module(model, optimizer)
    shards = parameter_shards(model.transformer, mesh=Mesh(torch.device("cpu")))
    tensors = {"model": shards}
    for moment in MOMENTS if optimizer else ():
        tensors[moment] = [shard.with_tensor(checkpoint.tensors[moment][shard.name]) for shard in shards]
    save_checkpoint(root, 0, tensors=tensors, record=checkpoint.record, writer_label="one")
    return root


def grown_by_tool(folder, source, stage):
    (folder / "stage.yaml").write_text(yaml.safe_dump(stage))
    target = folder / f"{source.name}-grown"
    arguments = ["--load", source, "--save", target, "--stage", folder / "stage.yaml"]
    assert reshard_checkpoint.main(list(map(str, arguments))) == 0
    return target


def assert_same(checkpoint, expected):
    """Every bit of every tensor, and what the record says of the model and its rows."""
    for group in checkpoint.groups():
        assert checkpoint.names(group) == expected.names(group)
        for name in checkpoint.names(group):
            rows = expected.read_rows(group, name, start=0, stop=expected.shape(group, name)[0])
            assert torch.equal(checkpoint.tensors[group][name], rows), (group, name)
    for key in ("model", "tau", "lineage"):
        assert getattr(checkpoint.record, key) == getattr(expected.record, key), key
    for name, shape in ((name, expected.shape("model", name)) for name in expected.names("model")):
        found, wanted = (each.record.all_generations.runs(name, shape[0]) for each in (checkpoint, expected))
        assert found == wanted, name


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_and_its_optimizer_grow_to_the_bits_of_the_tool(tmp_path, stage):
    """Twice, since the second growth reads the generations of the first."""
    model, optimizer = trained()
    for number, keys in enumerate((STAGES[stage], {"qkv_tokens": 48, "init": "random", "rewarmup_iters": 2})):
        source = save(tmp_path / f"{number}", model, optimizer)
        model, optimizer = megatron_tf.grow(model, keys, optimizer)
        expected = CheckpointReader(grown_by_tool(tmp_path, source, keys)).complete()
        assert_same(of_module(model, optimizer), expected)
        train(model, optimizer, 2)
    assert len(model.record.lineage) == 2


def test_a_plain_transformer_grows_to_the_bits_of_the_tool(tmp_path):
    config = {**MODEL, "layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
    stage = {"ffn_tokens": 128, "mlp_init": "duplicate", "hidden_multiple": 2}
    model, optimizer = trained(megatron_tf.TokenFormer(config, seed=3))
    source = save(tmp_path / "a", model, optimizer)
    grown = megatron_tf.grow(model, stage, optimizer)
    assert_same(of_module(*grown), CheckpointReader(grown_by_tool(tmp_path, source, stage)))
    train(*grown, 2)


def test_growth_by_utility_measures_the_module(tmp_path):
    ids = np.random.default_rng(0).integers(0, MODEL["vocab_size"], 400).astype(np.uint16)
    write_data_set(tmp_path / "text", [ids])
    stage = {"ffn_tokens": 100, "init": "duplicate_by_utility", "utility_data": str(tmp_path / "text")}
    model, optimizer = trained(new_model(seq_length=16))
    source = save(tmp_path / "a", model, optimizer)
    grown = megatron_tf.grow(model, stage, optimizer)
    assert_same(of_module(*grown), CheckpointReader(grown_by_tool(tmp_path, source, stage)))


def test_a_module_without_optimizer_grows_to_the_bits_of_the_tool(tmp_path):
    stage = STAGES["duplicate"]
    source = save(tmp_path / "a", new_model(), None)
    loaded = megatron_tf.load(source)
    model = megatron_tf.grow(loaded, GrowthStage(**stage, at_step=7))
    assert model.directory == loaded.directory  # where its tokenizer is
    assert_same(of_module(model, None), CheckpointReader(grown_by_tool(tmp_path, source, stage)))
    counts = {(row.exp_avg_steps, row.exp_avg_sq_steps) for row in model.record.generations.table}
    assert counts == {(0, 0)}  # it has no Adam moments


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_growth_in_float64_keeps_the_logits_and_commutes_with_a_step(norm):
    config = {**MODEL, "norm_activation": norm}
    model, optimizer = trained(megatron_tf.TokenFormer(config, dtype=torch.float64), how={"eps": 1e-30})
    grown, grown_optimizer = megatron_tf.grow(model, {"ffn_tokens": 128, "init": "duplicate", "noise": 0.0}, optimizer)
    ids = draw_ids()
    assert grown(ids).dtype == torch.float64
    assert (model(ids) - grown(ids)).abs().max() <= 1e-12 * model(ids).abs().max()
    # to step and then to grow is to grow and then to step, since copies of values step at half the size
    train(model, optimizer, 1)
    train(grown, grown_optimizer, 1)
    assert (model(ids) - grown(ids)).abs().max() <= 1e-9 * model(ids).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_and_settings_are_kept(dtype):
    model, optimizer = trained(new_model(dtype=dtype).eval())
    model.transformer.final_norm.bias.requires_grad_(False)
    model, optimizer = megatron_tf.grow(model, {"ffn_tokens": 96, "insert_layers": [1]}, optimizer)
    assert {p.dtype for p in model.parameters()} == {model(draw_ids()).dtype} == {dtype}
    assert {optimizer.state[p][moment].dtype for p in model.parameters() for moment in MOMENTS} == {dtype}
    assert not model.training
    assert [name for name, p in model.transformer.named_parameters() if not p.requires_grad] == ["final_norm.bias"]
    assert megatron_tf.grow(model.train(), {"ffn_tokens": 97}).training


def test_activations_of_another_type_stay_so():
    model = new_model()
    model.transformer.dtype = torch.bfloat16
    assert megatron_tf.grow(model, {"ffn_tokens": 96})(draw_ids()).dtype == torch.bfloat16


def grouped(model):
    """Values, the rest of the layers, the final norm; the embedding is left out."""
    named = dict(model.transformer.named_parameters())
    values = {name: p for name, p in named.items() if name.endswith("value_tokens")}
    norm = {name: p for name, p in named.items() if name.startswith("final_norm.")}
    others = [p for name, p in named.items() if name.startswith("layers.") and name not in values]
    return [
        {"params": [*values.values()], "lr": 0.02, "betas": (0.8, 0.9)},
        {"params": others, "weight_decay": 0.5},
        {"params": [*norm.values()], "eps": 1e-5, "foreach": False},
    ]


def test_parameter_groups_are_kept_and_new_layers_join_those_of_their_neighbors():
    model, optimizer = trained(groups=grouped)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    grown, after = megatron_tf.grow(model, {"num_layers": 4, "ffn_tokens": 96}, optimizer)
    names = {parameter: name for name, parameter in grown.transformer.named_parameters()}
    for found, expected, before in zip(after.param_groups, grouped(grown), optimizer.param_groups, strict=True):
        assert [names[p] for p in found["params"]] == [names[p] for p in expected["params"]]
        assert {key: found[key] for key in before if key != "params"} == {
            key: before[key] for key in before if key != "params"
        }
    assert after.defaults == optimizer.defaults
    assert grown.transformer.embedding.weight not in after.state
    before = grown.transformer.embedding.weight.detach().clone()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(after, 0.5, last_epoch=1)
    train(grown, after, 1)
    scheduler.step()
    assert after.param_groups[0]["lr"] == pytest.approx(0.02 / 4)
    assert torch.equal(grown.transformer.embedding.weight, before)


def test_an_optimizer_of_named_parameters_grows_too():
    model, optimizer = trained(groups=lambda model: model.named_parameters())
    grown, after = megatron_tf.grow(model, {"ffn_tokens": 96}, optimizer)
    assert after.param_groups[0]["params"] == list(grown.parameters())
    assert "param_names" not in after.param_groups[0]  # those of the old model


def test_a_plain_adamw_of_a_grown_model_counts_all_rows_alike():
    """What an earlier growth without optimizer recorded of learning rates never applied."""
    model = megatron_tf.grow(new_model(), {"ffn_tokens": 128, "init": "duplicate", "old_tokens_lr_scale": 0.5})
    _, optimizer = trained(model, steps=4)
    _, after = megatron_tf.grow(model, {"qkv_tokens": 30}, optimizer)
    values = dict(_.transformer.named_parameters())["layers.0.ffn.value_tokens"]
    expected = [Generation(growth=growth, exp_avg_steps=4, exp_avg_sq_steps=4) for growth in (0, 1)]
    assert [run.generation for run in after.runs(values)] == expected


def test_a_fresh_optimizer_has_moments_of_zero():
    model, optimizer = trained(steps=0)
    grown, after = megatron_tf.grow(model, {"ffn_tokens": 96}, optimizer)
    keys = dict(grown.transformer.named_parameters())["layers.1.ffn.key_tokens"]
    assert [(run.count, run.generation.exp_avg_steps) for run in after.runs(keys)] == [(64, 0), (32, 0)]
    train(grown, after, 1)
    assert {run.generation.exp_avg_steps for run in after.runs(keys)} == {1}


def test_the_record_of_a_module_has_no_counts_which_belong_to_its_optimizer():
    model, optimizer = trained(steps=3)
    model, optimizer = megatron_tf.grow(model, STAGES["zero_key"], optimizer)
    counts = {(row.exp_avg_steps, row.exp_avg_sq_steps) for row in model.record.generations.table}
    assert counts == {(0, 0)}
    assert {row.exp_avg_steps for row in of_module(model, optimizer).record.generations.table} == {0, 3}


def outside(model):
    return [*model.parameters(), torch.nn.Parameter(torch.zeros(2, 5))]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            lambda model: torch.optim.SGD(model.parameters()),
            "the optimizer is SGD: only the state of a torch.optim.AdamW",
        ),
        (lambda model: torch.optim.Adam(model.parameters()), "the optimizer is Adam: "),
        (lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True), "amsgrad: an optimizer of a grown model"),
        (
            lambda model: torch.optim.AdamW(outside(model)),
            r"parameter group 0 of the optimizer has a parameter \[2, 5\] that is not one of the model",
        ),
        (lambda model: torch.optim.AdamW(new_model().parameters()), r"has a parameter \[64, 32\] that is not one of"),
    ],
)
def test_other_optimizers_are_refused(optimizer, message):
    model = new_model()
    with pytest.raises(UserError, match=message):
        megatron_tf.grow(model, {"ffn_tokens": 96}, optimizer(model))


def assert_unchanged(model, optimizer, before):
    """Compare their state_dicts with copies of earlier ones."""
    states, saved = optimizer.state_dict()["state"], before[1]["state"]
    pairs = [(model.state_dict(), before[0]), *((state, saved[index]) for index, state in states.items())]
    for found, expected in pairs:
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"fnn_tokens": 96}, "^stage: unknown key 'fnn_tokens'; did you mean 'ffn_tokens'"),
        ({"ffn_tokens": 32}, "ffn_tokens=32: layer 0 already has 64, and growth only adds tokens"),
        ({}, "the growth adds nothing"),
        ({"ffn_tokens": 96, "tensor_model_parallel_size": 2}, "^stage: tensor_model_parallel_size is for runs: remove"),
        ({"ffn_tokens": 96, "optimizer": {"lr": 1e-3}}, "^stage: optimizer is for runs: remove it"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_model_and_its_optimizer_as_they_were(stage, message):
    model, optimizer = trained()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(UserError, match=message):
        megatron_tf.grow(model, stage, optimizer)
    assert_unchanged(model, optimizer, before)


def test_growth_leaves_the_old_model_and_optimizer_as_they_were():
    model, optimizer = trained()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    grown, after = megatron_tf.grow(model, {"ffn_tokens": 128, "init": "duplicate"}, optimizer)
    train(grown, after, 2)
    assert_unchanged(model, optimizer, before)


def test_rows_that_are_read_are_copies():
    model = new_model()
    checkpoint = of_module(model, None)
    before = copy.deepcopy(model.state_dict())
    checkpoint.read_rows("model", "layers.0.ffn.key_tokens", start=1, stop=64).zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, stop in (("layers.0.ffn.key_tokens", 65), ("layers.7.ffn.key_tokens", 1)):
        with pytest.raises(CheckpointError, match=r"layers\.\d\.ffn\.key_tokens"):
            checkpoint.read_rows("model", name, start=0, stop=stop)


def test_what_is_wrapped_is_refused():
    wrapped = LanguageModel(new_model().transformer, new_model().record)
    with pytest.raises(UserError, match=r"takes a megatron_tf\.TokenFormer, .* not LanguageModel: pass the module"):
        megatron_tf.grow(wrapped, {"ffn_tokens": 96})


def test_the_record_of_a_module_is_one_that_a_checkpoint_can_have():
    model, optimizer = trained()
    model, optimizer = megatron_tf.grow(model, STAGES["duplicate"], optimizer)
    record = of_module(model, optimizer).record
    assert RunRecord.from_json(record.to_json(), "test") == record
    assert to_dict(record.model) == record.config["model"]
