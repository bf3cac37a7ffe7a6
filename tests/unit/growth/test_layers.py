"""New layers: where they are placed, what they copy, and their optimizer state."""

from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.generations import Generation, Run
from megatron_tf.config import GrowthStage, ModelConfig, layer_sources
from megatron_tf.growth.grow import grow
from megatron_tf.tokenformer.parameters import initial_taus, key_tokens, model_parameters
from tests.support.grown_models import COUNTS, STEPS, TRANSFORMER, random_checkpoint, read, tokenformer

GROUPS = ("model", "exp_avg", "exp_avg_sq")
MODELS = {"tokenformer": tokenformer(), "transformer": ModelConfig(**TRANSFORMER)}


def sources(old, **keys):
    """Return the old layer at each place, and the places that are new."""
    layers = layer_sources(old, GrowthStage(**keys))
    return [layer.layer for layer in layers], [place for place, layer in enumerate(layers) if layer.is_new]


@pytest.mark.parametrize(
    ("order", "old", "new", "expected", "new_places"),
    [
        ("interleaved", 3, 6, [0, 0, 1, 1, 2, 2], [1, 3, 5]),
        ("interleaved", 3, 4, [0, 0, 1, 2], [1]),
        ("interleaved", 4, 6, [0, 0, 1, 2, 2, 3], [1, 4]),
        ("stacked", 3, 6, [0, 1, 2, 0, 1, 2], [3, 4, 5]),
        ("stacked", 3, 4, [0, 1, 2, 0], [3]),
        ("middle", 4, 6, [0, 1, 2, 1, 2, 3], [3, 4]),
        ("middle", 5, 7, [0, 1, 2, 1, 2, 3, 4], [3, 4]),
        ("middle", 5, 6, [0, 1, 2, 2, 3, 4], [3]),
        ("middle", 4, 8, [0, 1, 2, 1, 2, 1, 2, 3], [3, 4, 5, 6]),
        ("middle", 2, 4, [0, 0, 0, 1], [1, 2]),
        ("middle", 1, 3, [0, 0, 0], [1, 2]),
    ],
)
def test_layers_are_placed_in_each_order(order, old, new, expected, new_places):
    assert sources(old, num_layers=new, layer_order=order) == (expected, new_places)


@pytest.mark.parametrize("order", ["interleaved", "stacked", "middle"])
def test_every_old_layer_stays_in_its_order_and_the_formulas_hold(order):
    for old in range(1, 9):
        for new in range(old, 30):
            layers, new_places = sources(old, num_layers=new, layer_order=order)
            assert [layer for place, layer in enumerate(layers) if place not in new_places] == list(range(old))
            assert len(layers) == new
            if order == "interleaved":
                assert layers == [i * old // new for i in range(new)]
            if order == "stacked":
                assert layers == [i % old for i in range(new)]


def test_layers_are_inserted_before_those_named():
    assert sources(3, insert_layers=[3, 1, 1]) == ([0, 1, 1, 1, 2, 2], [1, 2, 5])


def origin_of(model, stage, parameter):
    """Return the name of the old parameter, and whether its layer is new."""
    if parameter.layer is None:
        return parameter.name, False
    layer = layer_sources(model.num_layers, stage)[parameter.layer]
    return parameter.name_in_layer(layer.layer), layer.is_new


@pytest.mark.parametrize("order", ["interleaved", "stacked", "middle"])
@pytest.mark.parametrize("layer", MODELS)
def test_a_copied_layer_has_every_bit_moment_and_count_of_its_source(layer, order):
    model = MODELS[layer]
    source = random_checkpoint(model, torch.float32)
    stage = GrowthStage(num_layers=5, layer_order=order, layer_init="copy")
    grown = read(grow(source, stage))
    for name, parameter in model_parameters(grown.record.model).items():
        old, is_new = origin_of(model, stage, parameter)
        for group in GROUPS:
            assert torch.equal(
                grown.tensors[group][name].view(torch.int32), source.tensors[group][old].view(torch.int32)
            )
        generation = Generation(growth=int(is_new), exp_avg_steps=STEPS, exp_avg_sq_steps=STEPS)
        assert grown.record.all_generations.runs(name, parameter.shape[0]) == [Run(parameter.shape[0], generation)]
    for path, keys in key_tokens(grown.record.model).items():
        assert grown.record.tau[path] == source.record.tau[_path(model, stage, keys)]


def _path(model, stage, keys):
    old, _ = origin_of(model, stage, keys)
    return model_parameters(model)[old].path


@pytest.mark.parametrize("layer", MODELS)
@pytest.mark.parametrize("layer_init", ["identity", "copy_zero"])
def test_new_layers_that_keep_the_output_start_without_moments(layer, layer_init):
    model = MODELS[layer]
    source = random_checkpoint(model, torch.float32)
    stage = GrowthStage(insert_layers=[0, 2], layer_init=layer_init, rewarmup_iters=7, new_tokens_lr_scale=0.5)
    grown = read(grow(source, stage))
    for name, parameter in model_parameters(grown.record.model).items():
        old, is_new = origin_of(model, stage, parameter)
        runs = grown.record.all_generations.runs(name, parameter.shape[0])
        if not is_new:
            old_rows = Generation(exp_avg_steps=STEPS, exp_avg_sq_steps=STEPS, rewarmup_iters=7)
            assert runs == [Run(parameter.shape[0], old_rows)]
            continue
        assert runs == [Run(parameter.shape[0], Generation(growth=1, lr_scale=0.5, rewarmup_iters=7))]
        assert not grown.tensors["exp_avg"][name].any()
        assert not grown.tensors["exp_avg_sq"][name].any()
        values = grown.tensors["model"][name]
        if parameter.ends_branch:
            assert not values.any()
        else:
            assert torch.equal(values, source.tensors["model"][old]) == (layer_init == "copy_zero")
    for path, keys in key_tokens(grown.record.model).items():
        _, is_new = origin_of(model, stage, keys)
        is_drawn = is_new and layer_init == "identity"
        expected = initial_taus(grown.record.model)[path] if is_drawn else source.record.tau[_path(model, stage, keys)]
        assert grown.record.tau[path] == expected


@pytest.mark.parametrize(
    ("state", "old_counts", "copy_counts"),
    [
        ("keep", (STEPS, STEPS), (STEPS, STEPS)),
        ("reset", (0, 0), (0, 0)),
        ("reset_new", (STEPS, STEPS), (0, 0)),
        ("reset_second", (STEPS, 0), (STEPS, 0)),
    ],
)
def test_which_moments_of_full_copies_restart_is_chosen_by_adam_state(state, old_counts, copy_counts):
    model = MODELS["tokenformer"]
    source = random_checkpoint(model)
    stage = GrowthStage(num_layers=6, layer_init="copy", adam_state=state)
    grown = read(grow(source, stage))
    for name, parameter in model_parameters(grown.record.model).items():
        old, is_new = origin_of(model, stage, parameter)
        (run,) = grown.record.all_generations.runs(name, parameter.shape[0])
        counts = copy_counts if is_new else old_counts
        assert (run.generation.exp_avg_steps, run.generation.exp_avg_sq_steps) == counts
        for group, count in zip(("exp_avg", "exp_avg_sq"), counts, strict=True):
            moment = grown.tensors[group][name]
            assert torch.equal(moment, source.tensors[group][old] if count else torch.zeros_like(moment))


def test_copies_of_grown_layers_inherit_the_generations_of_their_rows():
    """Rows that a first growth added keep their counts and step scales in a full copy of their layer."""
    source = random_checkpoint(MODELS["tokenformer"])
    first = grow(source, GrowthStage(ffn_tokens=2 * COUNTS["ffn_tokens"] + 3, init="duplicate", noise=0.0))
    second = grow(first, GrowthStage(num_layers=6, layer_init="copy"))
    values = "layers.{}.ffn.value_tokens".format
    old, copy = (second.record.all_generations.runs(values(layer), 67) for layer in (0, 1))
    half = Generation(exp_avg_steps=STEPS, exp_avg_sq_steps=STEPS, step_scale=0.5)
    assert old == [Run(32, half), Run(32, replace(half, growth=1)), Run(3, Generation(growth=1))]
    assert copy == [Run(64, replace(half, growth=2)), Run(3, Generation(growth=2))]


def test_the_lineage_names_the_new_layers():
    source = random_checkpoint(MODELS["tokenformer"])
    stage = GrowthStage(num_layers=5, layer_order="stacked", layer_init="copy_zero")
    event = grow(source, stage).record.lineage[-1]
    assert event.inserted_layers == [3, 4]
    assert event.kinds == {}
