"""Control pieces that a text spells out are text, in an export as in training."""

import pytest
import sentencepiece

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import AutoTokenizer

from megatron_tf.commands import convert_checkpoint
from megatron_tf.convert.huggingface import export
from megatron_tf.data.tokenizer import build_tokenizer
from tests.support.conversion import save_small_model

TEXTS = ["the <s>old</s> fox", "fox</s>dogs", "a <unk> b", "</s>", "<s>"]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def checkpoint(request, tmp_path_factory):
    """Of a model with a SentencePiece tokenizer; and the tokenizer."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text("the quick brown fox jumps over lazy dogs old new </ss> unk\n" * 300)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "t"),
        vocab_size=60,
        minloglevel=2,
        model_type=request.param,
        hard_vocab_limit=False,
    )
    tokenizer = build_tokenizer("SentencePieceTokenizer", folder / "t.model")
    choice = ("SentencePieceTokenizer", folder / "t.model")
    return save_small_model(folder, tokenizer=choice, vocab_size=tokenizer.vocab_size), tokenizer


def export_to(folder, checkpoint):
    return convert_checkpoint.main(["--from=megatron_tf", "--to=hf", f"--load={checkpoint}", f"--save={folder / 'hf'}"])


def test_an_exported_tokenizer_reads_control_pieces_as_text(checkpoint, tmp_path, capsys):
    run, tokenizer = checkpoint
    assert export_to(tmp_path, run) == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    found = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    expected = [row.tolist() for row in tokenizer.encode_batch(TEXTS).rows()]
    assert (found == expected) == ("warning: transformers encodes differently" not in capsys.readouterr().out)
    assert theirs.eos_token == "</s>"


def test_an_export_that_reads_them_otherwise_is_warned_of(checkpoint, tmp_path, capsys, monkeypatch):
    def without(path, content, write=export._write_json):
        write(path, {key: value for key, value in content.items() if key != "split_special_tokens"})

    monkeypatch.setattr(export, "_write_json", without)
    assert export_to(tmp_path, checkpoint[0]) == 0
    assert "warning: transformers encodes differently from megatron_tf" in capsys.readouterr().out
