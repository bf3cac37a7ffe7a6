"""Growth in width by the tool: from and to every layout, with everything that reads the result, and what it refuses."""

import json
from dataclasses import replace

import pytest
import torch

import megatron_tf
from megatron_tf import evaluate
from megatron_tf.checkpoint.load import CheckpointReader
from megatron_tf.checkpoint.reshard import reshard
from megatron_tf.checkpoint.summary import differences
from megatron_tf.commands import inspect_checkpoint, preprocess_data, reshard_checkpoint
from megatron_tf.config import GrowthStage
from megatron_tf.growth.grow import grow
from tests.support import toy
from tests.support.conversion import convert, save_small_model
from tests.support.layouts import LAYOUTS
from tests.support.models import greedy_ids, random_model, write_checkpoint

MULTIPLES = [2, 3, 1.5]
TRANSFORMER = {"layer": "transformer", "qkv_tokens": None, "proj_tokens": None}
UNTIED = {"untie_embeddings_and_output_weights": True}
MODELS = {
    "tied": {"norm_activation": "gelu_l2_norm"},
    "untied": UNTIED,
    "softmax": {"norm_activation": "softmax", "scale": 0.1},  # with larger weights, rounding alone moves its logits
    "transformer": {**TRANSFORMER, **UNTIED},
}


def tool(source, target, *options):
    return reshard_checkpoint.main(["--load", str(source), "--save", str(target), *map(str, options)])


def widen(source, target, multiple, *options):
    return tool(source, target, "--hidden-multiple", multiple, *options)


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("model", MODELS)
def test_the_outputs_stay_and_dividing_brings_the_model_back(tmp_path, capsys, model, multiple):
    base = save_small_model(tmp_path, tau_scale=1.2, **MODELS[model])
    ranks = ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2]
    assert widen(base, tmp_path / "wide", multiple, "--verify", *ranks) == 0
    plan = capsys.readouterr().out
    assert f"64 x {32 * multiple:g}" in plan
    assert f"final_norm.weight                                     32{32 * multiple:>20g}" in plan
    assert widen(base, tmp_path / "other", multiple) == 0
    assert inspect_checkpoint.main([str(tmp_path / "wide"), "--diff", str(tmp_path / "other")]) == 0
    assert inspect_checkpoint.main([str(tmp_path / "wide"), "--verify"]) == 0
    assert f"hidden_size 32 -> {32 * multiple:g}" in capsys.readouterr().out
    if multiple == 1.5:
        return
    assert tool(tmp_path / "wide", tmp_path / "back", "--divide-hidden", multiple, "--verify") == 0
    assert "does not preserve" not in capsys.readouterr().out
    before, after = (toy.read_all(path)["model"] for path in (base, tmp_path / "back"))
    for name, values in before.items():
        torch.testing.assert_close(after[name], values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_width_and_layers_are_taken_back_together_bit_for_bit(tmp_path, model):
    base = save_small_model(tmp_path, tau_scale=1.2, **MODELS[model])
    layers = ["--num-layers", 3, "--layer-init", "copy_zero", "--growth-noise", 0]
    assert widen(base, tmp_path / "grown", 2, *layers, "--verify") == 0
    assert tool(tmp_path / "grown", tmp_path / "back", "--divide-hidden", 2, "--drop-layers", 1) == 0
    before, after = CheckpointReader(base), CheckpointReader(tmp_path / "back")
    assert list(differences(before, after)) == []
    assert before.record == replace(after.record, lineage=())


@pytest.mark.parametrize("multiple", [2, 1.5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_gets_the_same_from_every_layout(tmp_path, layout, multiple):
    tensors = toy.random_tensors()
    stage = GrowthStage(hidden_multiple=multiple, ffn_tokens=48)
    source = CheckpointReader(toy.save(tmp_path / "base", tensors, layout))
    expected = grow(CheckpointReader(toy.save(tmp_path / "one", tensors)), stage)
    written = CheckpointReader(reshard(grow(source, stage), tmp_path / "grown", toy.target(*layout[:2])))
    assert list(differences(written, expected)) == []
    assert written.record == expected.record


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_any_rows_are_those_of_the_whole(tmp_path, multiple):
    """A rank reads its own rows, and the tool blocks of them."""
    grown = grow(CheckpointReader(toy.save(tmp_path, toy.random_tensors())), GrowthStage(hidden_multiple=multiple))
    for group in grown.groups():
        for name in grown.names(group):
            rows = grown.shape(group, name)[0]
            whole = grown.read_rows(group, name, start=0, stop=rows)
            parts = [grown.read_rows(group, name, start=row, stop=row + 1) for row in range(rows)]
            assert torch.equal(torch.cat(parts), whole), (group, name)
            assert torch.equal(grown.read_rows(group, name, start=1, stop=rows - 1), whole[1:-1]), (group, name)


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_official_weights_hold_a_wider_model(tmp_path, multiple):
    base = save_small_model(tmp_path, make_vocab_size_divisible_by=128)
    assert widen(base, tmp_path / "wide", multiple) == 0
    assert convert("megatron_tf", "official", tmp_path / "wide", tmp_path / "official") == 0
    facts = ["--num-attention-heads", int(4 * multiple), "--norm-activation", "l2_norm_gelu", "--vocab-size", 60]
    file = tmp_path / "official" / "pytorch_model.bin"
    assert convert("official", "megatron_tf", file, tmp_path / "back", *facts) == 0
    one, other = CheckpointReader(tmp_path / "wide"), CheckpointReader(tmp_path / "back")
    assert list(differences(one, other)) == []
    assert one.record.tau == other.record.tau


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_transformers_loads_a_wider_model(tmp_path, multiple):
    pytest.importorskip("transformers", reason="transformers is not installed")
    base = save_small_model(tmp_path, tau_scale=1.2, **UNTIED)
    assert widen(base, tmp_path / "wide", multiple) == 0
    assert convert("megatron_tf", "hf", tmp_path / "wide", tmp_path / "hf") == 0  # compares logits
    assert f"width 32 to {32 * multiple:g}" in (tmp_path / "hf" / "README.md").read_text()
    assert convert("hf", "megatron_tf", tmp_path / "hf", tmp_path / "back") == 0
    one, other = CheckpointReader(tmp_path / "wide"), CheckpointReader(tmp_path / "back")
    assert list(differences(one, other)) == []
    assert one.record.lineage == other.record.lineage


@pytest.mark.parametrize("multiple", MULTIPLES)
@pytest.mark.parametrize("model", MODELS)
def test_a_wider_model_generates_the_same_text(tmp_path, model, multiple):
    base = save_small_model(tmp_path, **MODELS[model])
    assert widen(base, tmp_path / "wide", multiple) == 0
    texts = []
    for path in (base, tmp_path / "wide"):
        loaded = megatron_tf.load(path)
        loaded.arrange_for_decoding()
        texts.append(greedy_ids(loaded, [[5, 9, 20], [7]], 12))  # with a cache
    assert texts[0] == texts[1]


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_a_wider_model_has_the_same_perplexity(tmp_path, multiple):
    base = write_checkpoint(tmp_path / "base", random_model())
    assert widen(base, tmp_path / "wide", multiple) == 0
    lines = [json.dumps({"text": text}) for text in ("A wider model", "says the same as the narrow one did.")]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    data = ["--input", str(tmp_path / "text.jsonl"), "--output-prefix", str(tmp_path / "data")]
    assert preprocess_data.main([*data, "--tokenizer-type", "NullTokenizer"]) == 0
    figures = []
    for name in ("base", "wide"):
        output = tmp_path / f"{name}.json"
        arguments = [str(tmp_path / name), "--data-path", str(tmp_path / "data_text_document"), "--output", str(output)]
        assert evaluate.main(arguments) == 0
        figures.append(json.loads(output.read_text())["all"]["nats_per_token"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({}, ["--hidden-multiple", 2.5], "must be an integer above 1, or 1.5"),
        ({}, ["--hidden-multiple", 1], "must be an integer above 1, or 1.5"),
        ({"num_attention_heads": 1}, ["--hidden-multiple", 1.5], "an even num_attention_heads"),
        (
            {"hidden_size": 27, "num_attention_heads": 1, "rotary_percent": 0.5},
            ["--hidden-multiple", 1.5],
            "an even hidden_size",
        ),
        (
            {"num_attention_heads": 2},
            ["--hidden-multiple", 2, "--target-tensor-parallel-size", 8],
            "4 attention heads cannot be shared equally by 8 tensor-parallel ranks",
        ),
        ({}, ["--hidden-multiple", 2, "--old-tokens-lr-scale", 0.5], "growth in width copies every row"),
        ({}, ["--hidden-multiple", 1e9], "hidden_size=32000000000: Input should be less than 2147483648"),
        ({}, ["--num-layers", 100_001], "num_layers: Input should be less than or equal to 100000"),
        ({}, ["--grow", "ffn=128", "--grow", "ffn=256"], "--grow: ffn is given twice"),
        ({}, ["--grow", "ffn@0-1=128,ffn@1=256"], "ffn_tokens: layer 1 is named twice, the second time in '1'"),
        ({}, ["--grow", "ffn@0=128,ffn@00=256"], "ffn_tokens: layer 0 is named twice, the second time in '00'"),
        ({}, ["--grow", "ffn=128", "--data", "there/is/none"], "there/is/none.idx is missing"),
        ({}, ["--divide-hidden", 2], "consists of 1 equal part"),
        ({}, ["--divide-hidden", 2, "--hidden-multiple", 2], "separate steps"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, capsys, keys, options, message):
    base = save_small_model(tmp_path, **keys)
    assert tool(base, tmp_path / "new", *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
