"""Dropping layers: untrained new ones leave the original, bit for bit; any others leave the rest as it was."""

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import inspect_checkpoint, reshard_checkpoint
from megatron_tf.config import GrowthStage, ModelConfig
from megatron_tf.growth.drop_layers import drop_layers
from megatron_tf.growth.grow import grow
from megatron_tf.tokenformer.parameters import key_tokens, model_parameters
from tests.support import toy
from tests.support.grown_models import TRANSFORMER, random_checkpoint, read, tokenformer

MODELS = {
    "tied": tokenformer(),
    "untied softmax": tokenformer(norm_activation="softmax", untie_embeddings_and_output_weights=True),
    "layers of several sizes": tokenformer(ffn_tokens=[30, 32, 32], qkv_tokens=[24, 20, 28]),
    "transformer": ModelConfig(**TRANSFORMER),
}
GROWTHS = {
    "inserted": {"insert_layers": [0, 1, 1, 3]},
    "interleaved": {"num_layers": 5},
    "stacked": {"num_layers": 7, "layer_order": "stacked"},
    "middle": {"num_layers": 6, "layer_order": "middle"},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layer_init", ["identity", "copy_zero"])
@pytest.mark.parametrize("placed", GROWTHS)
def test_dropping_untrained_new_layers_gives_the_original_bit_for_bit(placed, layer_init, model):
    source = random_checkpoint(MODELS[model], torch.float32)
    grown = grow(source, GrowthStage(**GROWTHS[placed], layer_init=layer_init))
    undone = drop_layers(grown, grown.record.lineage[-1].inserted_layers)
    assert list(differences(source, undone)) == []
    for key in ("model", "tau", "training", "generations"):
        assert getattr(undone.record, key) == getattr(source.record, key)


def test_the_remaining_layers_keep_their_rows_moments_temperatures_and_generations():
    source = grow(
        random_checkpoint(tokenformer(ffn_tokens=[30, 32, 34])),
        GrowthStage(ffn_tokens={"2": 50}, num_layers=5, layer_order="stacked", layer_init="copy", rewarmup_iters=3),
    )
    rest = read(drop_layers(source, [3, 1]))
    assert rest.record.model.num_layers == 3
    assert rest.record.model.ffn_tokens == [30, 50, 32]
    old = model_parameters(source.record.model)
    for name, parameter in model_parameters(rest.record.model).items():
        before = name if parameter.layer is None else parameter.name_in_layer([0, 2, 4][parameter.layer])
        for group in source.groups():
            rows = source.read_rows(group, before, start=0, stop=source.shape(group, before)[0])
            assert torch.equal(rest.tensors[group][name], rows)
        rows = parameter.shape[0]
        found = rest.record.all_generations.runs(name, rows)
        assert found == source.record.all_generations.runs(before, rows)
        if parameter.path in key_tokens(rest.record.model):
            assert rest.record.tau[parameter.path] == source.record.tau[old[before].path]
    event = rest.record.lineage[-1]
    assert (event.init, event.dropped_layers, event.kinds) == ("drop_layers", [1, 3], {})
    assert event.to_json()["dropped_layers"] == [1, 3]
    assert len(rest.record.lineage) == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], "there is no layer 3; the model has 3, numbered from 0"),
        ([0, 1, 2], "these are all 3 layers of the model; keep at least one"),
        ([1, 1], "layer 1 is given twice"),
    ],
)
def test_layers_that_cannot_be_dropped_are_named(layers, message):
    with pytest.raises(CheckpointError, match=message):
        drop_layers(random_checkpoint(MODELS["tied"]), layers)


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


def test_the_tool_takes_layers_back_on_another_layout(tmp_path, capsys):
    toy.save(tmp_path / "a", toy.random_tensors(), (2, 1, 2))
    growth = ["--num-layers", 5, "--layer-order", "middle", "--layer-init", "copy_zero"]
    assert tool(tmp_path / "a", tmp_path / "b", *growth, "--target-pipeline-parallel-size", 2, "--verify") == 0
    layout = ["--target-tensor-parallel-size", 2]
    assert tool(tmp_path / "b", tmp_path / "c", "--drop-layers", "2,3", *layout, "--verify") == 0
    assert "max |delta logit| before and after: 0 " in capsys.readouterr().out.splitlines()[-1]
    assert toy.same(toy.read_all(tmp_path / "a"), toy.read_all(tmp_path / "c"))
    first, last = (CheckpointReader(tmp_path / path).record for path in "ac")
    assert (first.model, first.tau, first.training, first.generations) == (
        last.model,
        last.tau,
        last.training,
        last.generations,
    )
    assert [event.init for event in last.lineage] == ["zero_key", "drop_layers"]
    assert inspect_checkpoint.main([str(tmp_path / "c")]) == 0
    assert "without layers 2, 3 by drop_layers" in capsys.readouterr().out


def test_width_and_layers_of_one_growth_are_taken_back_in_one_step(tmp_path, capsys):
    toy.save(tmp_path / "a", toy.random_tensors())
    growth = ["--hidden-multiple", 2, "--num-layers", 5, "--layer-init", "copy_zero", "--growth-noise", 0]
    assert tool(tmp_path / "a", tmp_path / "b", *growth, "--verify") == 0
    inserted = CheckpointReader(tmp_path / "b").record.lineage[-1].inserted_layers
    layers = ",".join(map(str, inserted))
    assert tool(tmp_path / "b", tmp_path / "c", "--divide-hidden", 2, "--drop-layers", layers, "--verify") == 0
    assert toy.same(toy.read_all(tmp_path / "a"), toy.read_all(tmp_path / "c"))
    first, last = (CheckpointReader(tmp_path / path).record for path in "ac")
    for key in ("model", "tau", "training", "generations"):
        assert getattr(first, key) == getattr(last, key)
    assert [event.init for event in last.lineage] == ["zero_key", "divide_hidden", "drop_layers"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop-layers", "1,x"], "--drop-layers '1,x': write layer indices, such as 1,3"),
        (["--drop-layers", ""], "--drop-layers '': write layer indices"),
        (["--drop-layers", "7"], "--drop-layers: there is no layer 7; the model has 3"),
        (["--drop-layers", "1", "--num-layers", 5], "--drop-layers and growth are separate steps: run the tool twice"),
    ],
)
def test_the_tool_explains_what_it_cannot_drop_and_writes_nothing(tmp_path, capsys, options, message):
    toy.save(tmp_path / "a", toy.random_tensors())
    assert tool(tmp_path / "a", tmp_path / "b", *options) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "b").exists()
