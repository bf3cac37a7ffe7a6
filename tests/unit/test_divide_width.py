"""Taking back a growth in width: the identity while untrained, afterwards what dense matrices say."""

from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.growth.divide_width import divide_width
from megatron_tf.growth.grow import grow
from tests.support.doubles import logits_and_gradients, random_parameters, read_group
from tests.support.grown_models import MemoryCheckpoint
from tests.support.toy import GROUPS
from tests.support.width import MODELS, close, source_of, stage_of, widened


def trained(keys):
    """A checkpoint with random Adam moments after five steps."""
    source = source_of(keys, groups=GROUPS, step=5, adam_steps=5)
    source.tensors["exp_avg_sq"] = {name: values.square() for name, values in source.tensors["exp_avg_sq"].items()}
    return source


def in_fp32(source):
    tensors = {
        group: {name: values.float() for name, values in named.items()} for group, named in source.tensors.items()
    }
    return MemoryCheckpoint(tensors, source.record)


@pytest.mark.parametrize("multiple", [2, 4])
@pytest.mark.parametrize("step_scale", ["preserve", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_growing_by_a_power_of_two_and_dividing_changes_no_bit(name, multiple, step_scale):
    source = in_fp32(trained(MODELS[name]))
    grown = grow(source, stage_of(multiple, noise=0, step_scale=step_scale))
    back = divide_width(grown, multiple)
    for group in GROUPS:
        for tensor, found in read_group(back, group).items():
            assert torch.equal(found, source.tensors[group][tensor]), (group, tensor)
    assert replace(back.record, lineage=()) == source.record
    width = 16 * multiple
    assert [event.hidden_size for event in back.record.lineage] == [[16, width], [width, 16]]
    assert back.record.lineage[1].init == "divide_hidden"


@pytest.mark.parametrize("multiple", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_with_noise_it_is_the_identity_within_rounding(name, multiple):
    source = in_fp32(trained(MODELS[name]))
    back = divide_width(grow(source, stage_of(multiple, noise=0.5)), multiple)
    for group in GROUPS:
        for tensor, found in read_group(back, group).items():
            assert close(found, source.tensors[group][tensor], 1e-6), (group, tensor)
    assert replace(back.record, lineage=()) == source.record


@pytest.mark.parametrize("multiple", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_trained_is_projected_and_its_gradients_obey_the_chain_rule(name, multiple):
    source = trained(MODELS[name])
    grown = grow(source, stage_of(multiple))
    record = grown.record
    tensors = {group: random_parameters(record.model, seed) for seed, group in enumerate(GROUPS)}
    back = divide_width(MemoryCheckpoint(tensors, record), multiple)
    old = {tensor: values.requires_grad_() for tensor, values in source.tensors["model"].items()}
    made = widened(old, multiple)
    first = sum((made[tensor] * tensors["exp_avg"][tensor]).sum() for tensor in made)
    by_chain_rule = torch.autograd.grad(first, list(old.values()), retain_graph=True)
    for (tensor, values), expected in zip(read_group(back, "exp_avg").items(), by_chain_rule, strict=True):
        assert close(values, expected, 1e-11), tensor
    # the projection: what remains is orthogonal to all that the growth can make
    again = widened(read_group(back), multiple)
    rest = sum((made[tensor] * (tensors["model"][tensor] - again[tensor])).sum() for tensor in made)
    for tensor, values in zip(old, torch.autograd.grad(rest, list(old.values())), strict=True):
        assert values.abs().max() < 1e-12, tensor


@pytest.mark.parametrize("step_scale", ["preserve", "none"])
@pytest.mark.parametrize("multiple", [2, 49])
def test_generations_of_earlier_growths_come_back(multiple, step_scale):
    """49 times 1/49 is less than one in fp64."""
    source = grow(
        source_of(MODELS["gelu_l2_norm"], step=5, adam_steps=5), stage_of(None, ffn_tokens=40, init="duplicate")
    )
    grown = grow(source, stage_of(multiple, step_scale=step_scale))
    assert (grown.record.generations == source.record.generations) == (step_scale == "none")
    assert divide_width(grown, multiple).record.generations == source.record.generations


def test_new_tokens_and_layers_that_are_untrained_do_not_hinder_it():
    source = source_of(MODELS["gelu_l2_norm"])
    grown = grow(source, stage_of(2, ffn_tokens=50, num_layers=3))
    assert close(logits_and_gradients(divide_width(grown, 2))[0], logits_and_gradients(source)[0])


def lineage(*multiples):
    """A checkpoint without tensors after growth and division by these factors."""
    source = source_of(MODELS["transformer"])
    for multiple in multiples:
        source = grow(source, stage_of(multiple)) if multiple > 1 else divide_width(source, round(1 / multiple))
    return source


@pytest.mark.parametrize(
    ("factors", "copies", "message"),
    [
        ([], 2, "consists of 1 equal part"),
        ([3], 2, "consists of 3 equal part"),
        ([1.5], 3, "consists of 1 equal part"),
        ([2, 1.5], 2, "consists of 1 equal part"),
        ([2, 1 / 2], 2, "consists of 1 equal part"),
        ([2], 3, "hidden_size is 32, which is not divisible by 3"),
        ([2], 16, "num_attention_heads is 8, which is not divisible by 16"),
        ([2], 1, "give the number of copies to merge, 2 or more"),
    ],
)
def test_what_are_no_copies_is_refused(factors, copies, message):
    with pytest.raises(CheckpointError, match=message):
        divide_width(lineage(*factors), copies)


@pytest.mark.parametrize(("factors", "copies"), [([2, 3], 3), ([2, 3], 2), ([2, 3], 6), ([1.5, 2], 2), ([4, 1 / 2], 2)])
def test_copies_of_several_growths_merge(factors, copies):
    source = lineage(*factors)
    assert close(logits_and_gradients(divide_width(source, copies))[0], logits_and_gradients(source)[0])
