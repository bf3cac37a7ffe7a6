"""A checkpoint as a directory for transformers, and back: everything in it but the tensors.

The model's code is copied from `template/`.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.contents import check_tau
from megatron_tf.checkpoint.files import read_bounded
from megatron_tf.checkpoint.format import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.checkpoint.record import RunRecord, read_model
from megatron_tf.config import TOKEN_KINDS, ModelConfig
from megatron_tf.convert.external import ExternalCheckpoint, ExternalTensor, rename
from megatron_tf.convert.huggingface.card import model_card
from megatron_tf.convert.huggingface.configuration import MAX_POSITIONS, check_vocabulary, model_section
from megatron_tf.convert.huggingface.tensors import HUGGINGFACE, MOST_JSON_BYTES, read_huggingface_tensors
from megatron_tf.data.hf_files import is_pair, tokenizer_json
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.tokenformer.parameters import initial_taus
from megatron_tf.tokenizer_files import merges_file

_CODE = ("configuration_tokenformer.py", "modeling_tokenformer.py")
_TOKENIZER_FILES = {"HFTokenizer": "tokenizer.json", "SentencePieceTokenizer": "tokenizer.model"}


def write_config_and_tokenizer(
    checkpoint: Checkpoint,
    directory: Path,
    tokenizer: Tokenizer,
    *,
    tokenizer_path: Path | None,
    measured: str | None,
) -> None:
    """Write the configuration, the code, the tokenizer's files and the model card; `measured` is a loss, in words.

    Raises CheckpointError for a model that the code does not know.
    """
    record = checkpoint.record
    model = record.model
    if model.layer != "tokenformer":
        raise CheckpointError(f"{checkpoint.directory} is a plain transformer: only TokenFormers are exported")
    for name in _CODE:
        shutil.copyfile(Path(__file__).parent / "template" / name, directory / name)
    _write_json(directory / "config.json", _config(record, tokenizer.eod))
    _write_json(directory / "generation_config.json", _generation_config(model, tokenizer.eod))
    _write_tokenizer(directory, tokenizer, tokenizer_path, seq_length=record.seq_length)
    (directory / "README.md").write_text(model_card(record, directory.name, measured))


def read_export(directory: Path) -> ExternalCheckpoint:
    """A directory written by this module, as a checkpoint without optimizer state.

    Raises CheckpointError or ConfigError naming the file and what is wrong with it.
    """
    path = directory / "config.json"
    try:
        config = json.loads(read_bounded(path, MOST_JSON_BYTES))
        values = _metadata(config)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no model: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is not of a model that megatron_tf exported: {error!r}") from error
    record = RunRecord.from_json(values, path)
    tensors = read_huggingface_tensors(directory)
    # sizes must be those of the tensors in both places that tell them; in the rest of it transformers' place counts
    ours = JsonObject(path, "megatron_tf.config.model", config["megatron_tf"]["config"]["model"])
    _fitting(directory, tensors, model=read_model(ours), tau=record.tau)
    renamed = _fitting(directory, tensors, model=record.model, tau=record.tau)
    check_vocabulary(config, record.model, path)
    tau = record.tau or initial_taus(record.model)  # as transformers does without them
    return ExternalCheckpoint(directory, renamed, replace(record, tau=tau))


def _fitting(
    directory: Path, tensors: Mapping[str, ExternalTensor], *, model: ModelConfig, tau: Mapping[str, float]
) -> dict[str, ExternalTensor]:
    """The tensors of the model by our names. Raises CheckpointError where they are not all there."""
    path = directory / "config.json"
    if model.num_layers > len(tensors):
        raise CheckpointError(f"{path}: there are {model.num_layers:,} layers in it, and {len(tensors):,} tensors")
    if tau:
        check_tau(path, model, tau)
    return rename(directory, tensors, expected=HUGGINGFACE.parameters(model))


def tokenizer_file(directory: Path, kind: str) -> Path | None:
    """The tokenizer's file in an export, if there is one."""
    pair = directory / "vocab.json"
    if kind == "HFTokenizer" and pair.is_file():
        return pair  # the run's own files; tokenizer.json was made from them
    path = directory / _TOKENIZER_FILES.get(kind, "")
    return path if path.is_file() else None


def _config(record: RunRecord, eod: int) -> dict[str, Any]:
    model = record.model
    return {
        "architectures": ["TokenFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tokenformer.TokenFormerConfig",
            "AutoModel": "modeling_tokenformer.TokenFormerModel",
            "AutoModelForCausalLM": "modeling_tokenformer.TokenFormerForCausalLM",
        },
        "model_type": "tokenformer",
        "dtype": "float32",
        "vocab_size": model.padded_vocab_size,  # transformers means the rows of the embedding
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "token_counts": {kind: model.token_counts(kind) for kind in TOKEN_KINDS},
        "norm_activation": model.norm_activation,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "layer_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": record.seq_length,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,  # a document begins after the end of another one, in training as well
        "eos_token_id": eod,
        "tau": dict(record.tau),
        "megatron_tf": _facts(record),
    }


def _facts(record: RunRecord) -> dict[str, Any]:
    """What a checkpoint of ours knows beyond the model; of the run's configuration only what is used without the run,
    so that nobody's paths are published."""
    written = record.to_json()
    return {
        "config": {
            "model": written["model"],
            "training": {"seq_length": record.seq_length, "seed": record.seed},
            "data": _data(record.data),
        },
        **{key: written[key] for key in ("tokenizer", "lineage", "after_growth") if key in written},
        "training": {"skipped": 0, **written["training"], "adam_steps": 0},  # the optimizer state is not exported
    }


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Which tokenizer it is, and the end of a document where the run names one."""
    end = data.get("eod_token")
    named = {} if end is None else {"eod_token": str(end)}
    return {"tokenizer_type": str(data["tokenizer_type"]), "tokenizer_model": None, **named}


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `_config` was made from. Raises KeyError and the like where something is not there."""
    facts = config["megatron_tf"]
    run = facts["config"]
    model = model_section(config, run["model"])
    seq_length = config.get("max_position_embeddings", MAX_POSITIONS)
    metadata = {
        "model": model,
        "config": {
            "model": dict(model),
            "training": {"seq_length": seq_length, "seed": run["training"]["seed"]},
            "data": _data(run["data"]),
        },
        "tau": {name: float(tau) for name, tau in (config.get("tau") or {}).items()},
        "tokenizer": dict(facts["tokenizer"]),
        "lineage": list(facts["lineage"]),
        "training": {key: facts["training"][key] for key in ("step", "samples", "tokens", "adam_steps", "skipped")},
    }
    return metadata | ({"after_growth": facts["after_growth"]} if "after_growth" in facts else {})


def _generation_config(model: ModelConfig, eod: int) -> dict[str, Any]:
    padding = list(range(model.vocab_size, model.padded_vocab_size))  # ids that no text has, never to be generated
    config: dict[str, Any] = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    return config | ({"suppress_tokens": padding} if padding else {})


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, path: Path | None, *, seq_length: int) -> None:
    """Write the tokenizer's own file, and how transformers is to read it; nothing where transformers lacks its kind."""
    kind = tokenizer.identity["type"]
    if path is None or kind not in _TOKENIZER_FILES:
        return
    merges = merges_file(path)
    if kind != "HFTokenizer" or merges is None or not is_pair(path):
        shutil.copyfile(path, directory / _TOKENIZER_FILES[kind])
    else:
        (directory / _TOKENIZER_FILES[kind]).write_text(tokenizer_json(path), encoding="utf-8")
        # the run's own files too: their hash is the tokenizer's identity, which an import compares
        shutil.copyfile(path, directory / "vocab.json")
        shutil.copyfile(merges, directory / "merges.txt")
    _, eod = _pieces(kind, path, tokenizer.eod)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "pad_token": eod,  # the attention mask hides it
        "padding_side": "left",  # where prompts of a batch end together
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
    }
    if kind == "SentencePieceTokenizer":
        config["split_special_tokens"] = True  # "</s>" in a text is text, as it was in training
    _write_json(directory / "tokenizer_config.json", config)


def texts_with_special_pieces(kind: str, path: Path) -> list[str]:
    """Make texts that spell out the pieces that have a meaning of their own, such as ends of documents."""
    special, _ = _pieces(kind, path, 0)
    return [f"one {piece} two{piece}" for piece in special]


def _pieces(kind: str, path: Path, token_id: int) -> tuple[list[str], str]:
    """Return the special pieces, and the name of an id; decoding would leave out that of a control piece."""
    if kind == "HFTokenizer":
        import tokenizers

        theirs = tokenizers.Tokenizer.from_str(tokenizer_json(path))
        return [token.content for token in theirs.get_added_tokens_decoder().values()], str(
            theirs.id_to_token(token_id)
        )
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    special = [i for i in range(model.get_piece_size()) if model.is_control(i) or model.is_unknown(i)]
    return [str(model.id_to_piece(i)) for i in special], str(model.id_to_piece(token_id))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
