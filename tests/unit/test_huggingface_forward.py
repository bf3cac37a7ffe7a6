"""What an export's forward takes, gives and refuses."""

import sys

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
import torch.nn.functional as F
from transformers import DynamicCache

import megatron_tf
from megatron_tf.convert.huggingface.check import load_export
from megatron_tf.convert.huggingface.tensors import HUGGINGFACE
from megatron_tf.tokenformer.parameters import model_parameters

IDS = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(1))
LEFT_PADDED = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])


@pytest.fixture(scope="module")
def ours(exported):
    """Our model."""
    return megatron_tf.load(exported[0])


@pytest.fixture
def model(exported):
    """The export."""
    return load_export(exported[1])


def module_of(model):
    """The file modeling_tokenformer.py of an export, as a module."""
    return sys.modules[type(model).__module__]


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_prompt_in_chunks_is_causal_under_either_name_of_the_cache(name, model, ours):
    cache, parts = DynamicCache(), []
    for chunk in IDS.split([5, 1, 4, 2], dim=1):
        outputs = model(chunk, **{name: cache}, use_cache=name == "cache")  # a given cache is used in any case
        assert outputs[module_of(model).CACHE] is outputs.past_key_values is cache
        parts.append(outputs.logits)
    assert (torch.cat(parts, 1) - ours(IDS)).abs().max() < 1e-5


def test_a_cache_is_made_by_default_and_not_without_use_cache(model):
    assert model(IDS).past_key_values.get_seq_length() == 12
    assert model(IDS, use_cache=False).past_key_values is None


def test_the_cache_may_be_given_under_both_names_if_it_is_one(model):
    cache = DynamicCache()
    assert model(IDS, cache=cache, past_key_values=cache).past_key_values is cache
    with pytest.raises(ValueError, match="cache and past_key_values are two names of the same argument"):
        model(IDS, cache=DynamicCache(), past_key_values=DynamicCache())


@pytest.mark.parametrize(
    "name", ["kv_store", "head_mask", "token_type_ids", "output_router_logits", "cu_seq_lens_q", "is_causal"]
)
def test_an_argument_that_is_not_known_is_refused_unless_it_is_none(name, model):
    for module in (model, model.model):
        with pytest.raises(TypeError, match=f"'{name}'"):
            module(IDS, **{name: torch.zeros(1)})
        module(IDS, **{name: None})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"output_attentions": True}, "output_attentions=True needs attn_implementation='eager'"),
        ({"output_hidden_states": 1}, "output_hidden_states must be True or False, not 1"),
        ({"input_ids": None}, "give either input_ids or inputs_embeds"),
    ],
)
def test_what_cannot_be_given_is_refused(options, message, model):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, **options})


def test_other_implementations_of_attention_are_refused(exported, model):
    for attention in ("flash_attention_2", "flex_attention"):
        with pytest.raises((ValueError, ImportError)):
            load_export(exported[1], attn_implementation=attention)
    model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"attn_implementation must be 'sdpa' or 'eager', not 'paged\|sdpa'"):
        model(IDS)


@torch.no_grad()
def test_eager_attention_gives_its_weights(exported, ours):
    model = load_export(exported[1], attn_implementation="eager")
    outputs = model(IDS, attention_mask=LEFT_PADDED, output_attentions=True)
    assert (outputs.logits[1] - ours(IDS)[1]).abs().max() < 1e-5
    assert (outputs.logits[0, 5:] - ours(IDS[:1, 5:])[0]).abs().max() < 1e-5
    assert [weights.shape for weights in outputs.attentions] == [(2, 4, 12, 12)] * 2
    for weights in outputs.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 12))
        assert not weights.triu(1).any()
        assert not weights[0, :, 5:, :5].any()
    assert model(IDS).attentions is None
    settings = {"return_dict_in_generate": True, "output_attentions": True, "do_sample": False}
    generated = model.generate(IDS, max_new_tokens=3, eos_token_id=None, **settings)
    assert [step[0].shape[-2:] for step in generated.attentions] == [(12, 12), (1, 13), (1, 14)]


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("mask", [None, torch.ones_like(IDS), LEFT_PADDED])
def test_the_whole_graph_compiles(mask, use_cache, model, ours):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    logits = compiled(IDS, attention_mask=mask, use_cache=use_cache).logits
    assert (logits[1] - ours(IDS)[1]).abs().max() < 1e-5
    hidden = 5 if mask is LEFT_PADDED else 0
    assert (logits[0, hidden:] - ours(IDS[:1, hidden:])[0]).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "mask", [LEFT_PADDED, torch.zeros_like(LEFT_PADDED), torch.zeros(2, 1, 12, 12, dtype=torch.bool)]
)
def test_padding_gives_no_nan(mask, attention, exported):
    model = load_export(exported[1], attn_implementation=attention)
    assert model(IDS, attention_mask=mask).logits.isfinite().all()


def test_every_query_sees_a_key_even_where_all_before_is_padding(model):
    padding = torch.tensor([[False, False, True]])
    mask = module_of(model)._attention_mask(torch.arange(3), 3, padding)
    assert mask[0, 0].tolist() == [[True, False, False], [False, True, False], [False, False, True]]


def test_loss_gradients_and_gradient_checkpointing(exported):
    checkpoint, export = exported
    ours, theirs = megatron_tf.load(checkpoint), load_export(export).train()
    ids = torch.randint(60, (2, 16), generator=torch.Generator().manual_seed(2))
    expected = F.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    declared = model_parameters(ours.config)
    gradients = {
        HUGGINGFACE.of(declared[name], ours.config.num_layers): parameter.grad
        for name, parameter in ours.transformer.named_parameters()
    }
    for is_checkpointed in (False, True):
        if is_checkpointed:
            theirs.gradient_checkpointing_enable()
        theirs.zero_grad()
        loss = theirs(ids, labels=ids).loss
        loss.backward()
        assert abs(loss.item() - expected.item()) < 1e-6
        for name, parameter in theirs.named_parameters():
            assert (parameter.grad - gradients[name]).norm() < 1e-5 * gradients[name].norm(), name
    with pytest.raises(ValueError, match="a cache cannot be used with gradient checkpointing"):
        theirs(ids, labels=ids, past_key_values=DynamicCache())


def test_the_loss_over_several_batches_and_of_shifted_labels(model):
    mean = model(IDS, labels=IDS).loss
    assert torch.allclose(model(IDS, labels=IDS, num_items_in_batch=44).loss, mean / 2)
    shifted = F.pad(IDS, (0, 1), value=-100)[:, 1:].contiguous()
    assert torch.equal(model(IDS, labels=IDS, shift_labels=shifted).loss, mean)


def test_the_last_logits_only_and_a_tuple(model):
    logits = model(IDS).logits
    assert torch.allclose(model(IDS, logits_to_keep=2).logits, logits[:, -2:], atol=1e-6)
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([3, 5])).logits, logits[:, [3, 5]], atol=1e-6)
    assert torch.equal(model(IDS, return_dict=False)[0], logits)
