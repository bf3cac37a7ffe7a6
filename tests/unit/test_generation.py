"""Generation with a cache against the model without one, in batches and alone."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from megatron_tf.errors import UserError
from megatron_tf.inference.generation import Generation
from megatron_tf.inference.sampling import Sampling, sample_tokens
from megatron_tf.kernels import row_attention
from megatron_tf.layers import cache as cache_module
from megatron_tf.layers.cache import KeyValueCache
from tests.support.models import VOCAB, random_model
from tests.support.training import PLAIN, STRONG

PROMPTS = [[5], list(range(40, 57)), [7, 7, 7, 200, 3], list(range(150))]
GREEDY = Sampling(temperature=0)


@pytest.fixture(params=["cpu", "elsewhere"])
def attends(request, monkeypatch):
    """Attention over the cache as on a CPU, in C++, and as on every other device."""
    if request.param == "elsewhere":
        monkeypatch.setattr(row_attention, "is_for_rows", lambda q, keys: False)


def generate(model, prompts, sampling=GREEDY, seed=0, count=30):
    """`count` tokens after each prompt."""
    generation, found = Generation(model, prompts, sampling, seed=seed), [[] for _ in prompts]
    for _ in range(count):
        for i, token in generation.step().items():
            found[i].append(token)
    return found


@torch.no_grad()
def uncached(model, prompt, sampling=GREEDY, seed=0, count=30):
    """Generate the same by running all tokens again for each new one."""
    generator, ids = torch.Generator().manual_seed(seed), list(prompt)
    for _ in range(count):
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        logits = model(torch.tensor([ids]))[:, -1, : model.config.vocab_size]
        ids.append(int(sample_tokens(logits, sampling, uniform)))
    return ids[len(prompt) :]


@pytest.mark.parametrize("arranged", [False, True])
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_greedy_equals_the_model_without_cache(norm, arranged, attends):
    model = random_model(norm_activation=norm, untie_embeddings_and_output_weights=True)
    if arranged:
        model.arrange_for_decoding()
    tokens = generate(model, [PROMPTS[1]])[0]
    assert tokens == uncached(model, PROMPTS[1])
    assert len(set(tokens)) > 5  # a model that repeats itself would hide mistakes


@pytest.mark.parametrize("keys", [PLAIN, STRONG], ids=["plain", "strong"])
def test_plain_transformer_equals_itself_without_cache(keys):
    model = random_model(**keys)
    assert generate(model, PROMPTS[1:3]) == [uncached(model, prompt) for prompt in PROMPTS[1:3]]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5), Sampling(0.8, 20, 0.9)])
def test_prompts_of_a_batch_are_continued_as_each_alone(sampling, attends):
    model = random_model()
    together = generate(model, PROMPTS, sampling, seed=3)
    assert together == [generate(model, [prompt], sampling, seed=3)[0] for prompt in PROMPTS]
    assert together == [uncached(model, prompt, sampling, seed=3) for prompt in PROMPTS]


@torch.no_grad()
def test_logits_of_a_batch_of_different_lengths_are_those_of_each_alone():
    model = random_model(torch.float64)
    cache = model.new_cache()
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([prompt + [1] * (longest - len(prompt)) for prompt in PROMPTS])
    model(ids, cache)
    cache.keep(list(map(len, PROMPTS)))
    more = torch.tensor([[9, 8, 7]] * len(PROMPTS))
    found = torch.cat([model(more[:, :2], cache), model(more[:, 2:], cache)], 1)
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert torch.allclose(row, model(torch.tensor([[*prompt, 9, 8, 7]]))[0, -3:], atol=1e-10)


@torch.no_grad()
def test_a_text_in_chunks_is_causal():
    model = random_model(torch.float64)
    ids = torch.randint(VOCAB, (2, 300), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    for lengths in ([300], [1, 299], [7, 100, 1, 192], [1] * 300):
        cache = model.new_cache()
        parts = [model(chunk, cache) for chunk in ids.split(lengths, 1)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)
    changed = ids.clone()
    changed[:, 200:] += 1
    assert torch.equal(model(changed % VOCAB)[:, :200], whole[:, :200])


def test_long_prompts_are_read_in_parts(monkeypatch):
    monkeypatch.setattr("megatron_tf.inference.generation._PREFILL_TOKENS", 50)
    model = random_model()
    assert generate(model, PROMPTS, count=5) == [uncached(model, prompt, count=5) for prompt in PROMPTS]


def test_finished_samples_leave_and_change_nothing():
    model = random_model()
    generation = Generation(model, PROMPTS, Sampling(1.2), seed=5)
    found = [[] for _ in PROMPTS]
    for step in range(12):
        for i, token in generation.step().items():
            found[i].append(token)
        generation.finish({3: [1], 6: [0, 3]}.get(step, []))
    whole = generate(model, PROMPTS, Sampling(1.2), seed=5, count=12)
    assert found == [whole[0][:7], whole[1][:4], whole[2], whole[3][:7]]


def test_a_seed_decides_and_another_gives_another_text():
    model = random_model()
    texts = [generate(model, PROMPTS[1:2], Sampling(1.5), seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_ids_that_pad_the_vocabulary_never_come():
    model = random_model()
    assert model.config.padded_vocab_size > VOCAB
    with torch.no_grad():
        model.transformer.embedding.weight[VOCAB:] *= 100.0
        assert int(model(torch.tensor([PROMPTS[1]]))[0].argmax(-1).max()) >= VOCAB
    for sampling in (GREEDY, Sampling(5.0)):
        assert max(map(max, generate(model, PROMPTS, sampling))) < VOCAB


def test_what_is_not_a_number_is_told():
    model = random_model()
    with torch.no_grad():
        model.transformer.final_norm.weight[3] = torch.nan
    for sampling in (GREEDY, Sampling(), Sampling(0.8, 20), Sampling(0.8, 20, 0.9)):
        with pytest.raises(UserError, match="non-finite"):
            Generation(model, PROMPTS, sampling).step()
    with pytest.raises(UserError, match="a prompt is empty"):
        Generation(model, [[1], []], GREEDY)


def test_bf16_decodes_near_fp32():
    """The likeliest token of bf16 is nearly so in fp32."""
    model, half = random_model(), random_model(torch.bfloat16)
    half.arrange_for_decoding()
    ids = generate(half, PROMPTS[1:2])[0]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[1] + ids]))[0, len(PROMPTS[1]) - 1 : -1, :VOCAB]
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert behind.max() < 0.05 * logits.abs().max()


class Backends(TorchFunctionMode):
    """Notes whether each attention may be cuDNN's."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "is_allowed"), [("cpu", True), ("cuda", False)])
def test_attention_over_a_cache_is_never_that_of_cudnn(device, is_allowed, monkeypatch):
    """Whose plans are made for one length each. The choice for a device is applied to tensors on a CPU."""
    choose, model = cache_module._backends, random_model()
    chosen = []
    monkeypatch.setattr(row_attention, "is_for_rows", lambda q, keys: False)
    monkeypatch.setattr(cache_module, "_backends", lambda found: chosen.append(found) or choose(torch.device(device)))
    with Backends() as backends:
        assert generate(model, PROMPTS[1:3], count=3) == [uncached(model, prompt, count=3) for prompt in PROMPTS[1:3]]
    cached, again = 3 * model.config.num_layers, 6 * model.config.num_layers
    assert backends.seen == [is_allowed] * cached + [True] * again
    assert chosen == [model.device] * cached


@pytest.mark.parametrize("lengths", [[5, 3], [16, 16], [20, 31]])
def test_the_mask_of_a_cache_hides_later_tokens_and_is_aligned(lengths):
    """Attention on a GPU copies a mask in every layer unless its rows begin at multiples of 16."""
    cache = KeyValueCache(1)
    cache.keep(lengths)
    for count in (4, 2):
        before = list(cache.lengths)
        mask = cache.extend(2, count, device=torch.device("cpu"), dtype=torch.bfloat16).mask
        assert mask.dtype == torch.bfloat16
        assert all(stride % 16 == 0 for stride in mask.stride()[:-1])
        for sample, length in enumerate(before):
            for token, row in enumerate(mask[sample % len(mask), 0]):
                assert row.tolist() == [
                    0 if key <= length + token else -torch.inf for key in range(max(before) + count)
                ]


def test_finite_logits_whose_sum_is_not_are_no_divergence():
    """fp16 ends at 65,504."""
    model = random_model()
    logits = torch.full((1, 1, VOCAB), -60000.0, dtype=torch.float16)
    model.logits = lambda hidden: logits
    assert generate(model, [[5]], count=2) == [[0, 0]]
    logits[0, 0, 3] = float("-inf")
    with pytest.raises(UserError, match="non-finite"):
        generate(model, [[5]], count=1)
