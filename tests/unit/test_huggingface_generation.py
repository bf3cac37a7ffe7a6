"""The ways in which users generate with an export, each against our own model."""

import functools

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from transformers import AutoTokenizer, CompileConfig, GenerationMixin, StaticCache, pipeline

import megatron_tf
from megatron_tf.convert.huggingface.check import load_export
from tests.support.conversion import convert, save_small_model
from tests.support.models import greedy_ids

PROMPTS = [[5, 9, 2, 33, 7], [12, 50], [40, 41, 42]]
NUM_NEW = 12
PADDED_ID = 63  # never generated, so that nothing ends early
SETTINGS = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": PADDED_ID}
COMPILED = {"fullgraph": True, "backend": "aot_eager", "mode": None}  # no C++ compiler in the loop


@pytest.fixture(scope="module")
def ours(exported):
    """Our model."""
    return megatron_tf.load(exported[0])


@pytest.fixture(scope="module")
def expected(ours):
    """What our model continues each of PROMPTS with."""
    return greedy_ids(ours, PROMPTS, NUM_NEW)


def left_padded(prompts):
    """ids, mask."""
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate_each(model, **settings):
    """What follows each prompt when it is alone."""
    return [
        model.generate(torch.tensor([prompt]), **SETTINGS, **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS
    ]


def generate_batch(model, **settings):
    """What follows each prompt of a left-padded batch."""
    ids, mask = left_padded(PROMPTS)
    return model.generate(ids, attention_mask=mask, **SETTINGS, **settings)[:, ids.shape[1] :].tolist()


def compiled():
    """A setting of `generate`: compile where that is possible, on a CPU too."""
    config = CompileConfig(**COMPILED)
    config._compile_all_devices = True
    return {"compile_config": config}


@pytest.mark.parametrize("generate", [generate_each, generate_batch])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(dict, id="default"),
        pytest.param(lambda: {"use_cache": False}, id="no cache"),
        pytest.param(lambda: {"cache_implementation": "static", "disable_compile": True}, id="static"),
        pytest.param(lambda: {"cache_implementation": "static", **compiled()}, id="static, compiled"),
        pytest.param(lambda: {"prefill_chunk_size": 2, "cache_implementation": "dynamic"}, id="prompt in chunks"),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_generation_equals_ours_alone_and_in_a_batch_of_different_lengths(
    attention, settings, generate, exported, expected
):
    torch.compiler.reset()
    assert generate(load_export(exported[1], attn_implementation=attention), **settings()) == expected


def test_a_static_cache_compiles_in_generate(exported, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: calls.append(options) or call)
    generate_batch(load_export(exported[1]), cache_implementation="static", **compiled())
    assert [options["fullgraph"] for options in calls] == [True]


@torch.no_grad()
def beam_search(model, prompt, num_beams):
    """What follows the prompt in the likeliest of `num_beams` beams."""
    beams = [(0.0, prompt)]
    for _ in range(NUM_NEW):
        scores = [
            score + model(torch.tensor([ids]))[0, -1].log_softmax(-1)[: model.config.vocab_size] for score, ids in beams
        ]
        best = torch.cat(scores).topk(num_beams)
        beams = [
            (score, [*beams[index // model.config.vocab_size][1], index % model.config.vocab_size])
            for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return max(beams)[1][len(prompt) :]


def test_beam_search_equals_a_search_with_ours(exported, ours, expected):
    beams = [beam_search(ours, prompt, 3) for prompt in PROMPTS]
    assert beams != expected
    model = load_export(exported[1])
    assert generate_each(model, num_beams=3) == beams
    assert generate_batch(model, num_beams=3) == beams
    assert generate_batch(model, num_beams=3, use_cache=False) == beams


def test_assisted_generation_and_prompt_lookup(exported, expected, tmp_path):
    model = load_export(exported[1])
    assert convert("megatron_tf", "hf", save_small_model(tmp_path, tau_scale=0.8), tmp_path / "assistant") == 0
    assert generate_each(model, assistant_model=load_export(tmp_path / "assistant")) == expected
    assert generate_each(model, assistant_model=load_export(exported[1])) == expected
    assert generate_each(model, prompt_lookup_num_tokens=3) == expected


def test_prompt_lookup_accepts_and_rejects_candidates(exported, ours):
    pattern = [7, 8, 9, 10]
    prompt = pattern * 4
    theirs = load_export(exported[1]).generate(torch.tensor([prompt]), prompt_lookup_num_tokens=3, **SETTINGS)
    assert theirs[0, len(prompt) :].tolist() == greedy_ids(ours, [prompt], NUM_NEW)[0]


def test_a_pipeline_with_batches(exported, ours):
    _, export = exported
    tokenizer = AutoTokenizer.from_pretrained(export, trust_remote_code=True)
    generate = pipeline("text-generation", model=str(export), tokenizer=str(export), trust_remote_code=True)
    texts = [tokenizer.decode(prompt) for prompt in PROMPTS]
    settings = {"return_full_text": False, "max_new_tokens": NUM_NEW, "do_sample": False}
    alone = [generate(text, **settings)[0]["generated_text"] for text in texts]
    together = [found[0]["generated_text"] for found in generate(texts, batch_size=2, **settings)]
    assert alone == together
    for text, ids in zip(alone, greedy_ids(ours, PROMPTS, NUM_NEW), strict=True):
        end = ids.index(0) if 0 in ids else NUM_NEW
        assert text.split() == tokenizer.decode(ids[:end]).split()


def test_the_tokenizer_pads_at_the_left(exported):
    tokenizer = AutoTokenizer.from_pretrained(exported[1], trust_remote_code=True)
    batch = tokenizer(["w12 w50", "w40 w41 w42"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, 12, 50], [40, 41, 42]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_lm_eval_through_the_export(exported, ours):
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(exported[1]), trust_remote_code=True, device="cpu", batch_size=2)
    texts = ["w5 w9 w2", "w12", "w40 w41 w42 w7"]
    requests = [Instance("loglikelihood", {}, (text, " w33 w7"), i) for i, text in enumerate(texts)]
    for text, (found, _) in zip(texts, model.loglikelihood(requests), strict=True):
        ids = torch.tensor([[*(int(word[1:]) for word in text.split()), 33, 7]])
        scores = ours(ids).detach()[0].log_softmax(-1)
        assert found == pytest.approx(float(scores[-3, 33] + scores[-2, 7]), abs=1e-4)
    options = {"until": ["w0"], "max_gen_toks": 4, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
    prompts = [[int(word[1:]) for word in text.split()] for text in texts]
    for found, ids in zip(model.generate_until(requests), greedy_ids(ours, prompts, 4), strict=True):
        assert found.split() == [f"w{i}" for i in ids]


def test_generation_in_training_mode_with_gradient_checkpointing(exported, expected):
    model = load_export(exported[1]).train()
    model.gradient_checkpointing_enable()
    assert generate_batch(model) == expected


def test_padded_ids_are_never_generated(tmp_path):
    checkpoint = save_small_model(tmp_path, vocab_size=50)
    assert convert("megatron_tf", "hf", checkpoint, tmp_path / "model") == 0
    model = load_export(tmp_path / "model")
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model.model.embed_tokens.weight[50:] = 20 * model.model.embed_tokens.weight[: 64 - 50]
        assert int(model(prompt).logits[0, -1].argmax()) >= 50
    assert int(model.generate(prompt, max_new_tokens=20, do_sample=False).max()) < 50


def test_a_static_cache_that_the_user_fills(exported, ours):
    model = load_export(exported[1])
    ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        parts = [model(chunk, past_key_values=cache).logits for chunk in ids.split([4, 1, 1, 3], dim=1)]
        assert (torch.cat(parts, 1) - ours(ids)).abs().max() < 1e-5


def future_transformers(prepare):
    """As `prepare_inputs_for_generation`, with another name for the cache."""

    @functools.wraps(prepare)
    def renamed(*arguments, **keywords):
        inputs = prepare(*arguments, **keywords)
        return {"kv_store" if name in ("cache", "past_key_values") else name: value for name, value in inputs.items()}

    return renamed


def test_a_cache_of_a_new_name_is_refused_in_generation_and_at_the_export(exported, tmp_path, monkeypatch, capsys):
    name = "prepare_inputs_for_generation"
    monkeypatch.setattr(GenerationMixin, name, future_transformers(GenerationMixin.prepare_inputs_for_generation))
    with pytest.raises(TypeError, match="'kv_store'"):
        generate_batch(load_export(exported[1]))
    assert convert("megatron_tf", "hf", exported[0], tmp_path / "model") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "error: greedy generation with transformers" in line
    assert "'kv_store'" in line
    assert not list(tmp_path.iterdir())
