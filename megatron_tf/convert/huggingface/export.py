"""Writes and reads everything in a Hugging Face export except the tensors.

The model code of a TokenFormer is copied from `template/`; a plain transformer needs none.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.contents import check_tau
from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.files import read_bounded
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.checkpoint.record import RunRecord, read_model
from megatron_tf.config import TOKEN_KINDS, ModelConfig
from megatron_tf.convert.external import ExternalCheckpoint, ExternalTensor, rename
from megatron_tf.convert.huggingface.card import model_card
from megatron_tf.convert.huggingface.configuration import MAX_POSITIONS, check_vocabulary, model_section
from megatron_tf.convert.huggingface.plain import check_plain, plain_config
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
    """Write the configuration, code, tokenizer's files and model card; `measured` is a sentence on the loss.

    Raises CheckpointError for a plain transformer that transformers does not have.
    """
    record = checkpoint.record
    model = record.model
    if model.layer == "transformer":
        check_plain(model, checkpoint.directory)
    else:
        for name in _CODE:
            shutil.copyfile(Path(__file__).parent / "template" / name, directory / name)
    _write_json(directory / "config.json", _config(record, tokenizer.eod))
    _write_json(directory / "generation_config.json", _generation_config(model, tokenizer.eod))
    _write_tokenizer(directory, tokenizer, tokenizer_path, seq_length=record.seq_length)
    (directory / "README.md").write_text(model_card(record, directory.name, measured))


def read_export(directory: Path) -> ExternalCheckpoint:
    """Open a directory written by this module as a checkpoint without optimizer state.

    Raises CheckpointError or ConfigError naming the file and the problem.
    """
    path = directory / "config.json"
    try:
        config = json.loads(read_bounded(path, MOST_JSON_BYTES))
        _check_importable(config, path)
        values = _metadata(config)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no model: it has no config.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} does not belong to a model exported by megatron_tf: {error!r}") from error
    record = RunRecord.from_json(values, path)
    tensors = read_huggingface_tensors(directory)
    # both records of the sizes must match the tensors; for all other keys the one that transformers uses counts
    ours = JsonObject(path, "megatron_tf.config.model", config["megatron_tf"]["config"]["model"])
    _fitting(directory, tensors, model=read_model(ours), tau=record.tau)
    renamed = _fitting(directory, tensors, model=record.model, tau=record.tau)
    check_vocabulary(config, record.model, path)
    tau = record.tau or initial_taus(record.model)  # as transformers does if they are missing
    return ExternalCheckpoint(directory, renamed, replace(record, tau=tau))


def _check_importable(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for an export of a plain transformer, which this module only writes."""
    if config["megatron_tf"]["config"]["model"].get("layer") == "transformer":
        raise CheckpointError(f"{path} belongs to a plain transformer: only exports of TokenFormers can be imported")


def _fitting(
    directory: Path, tensors: Mapping[str, ExternalTensor], *, model: ModelConfig, tau: Mapping[str, float]
) -> dict[str, ExternalTensor]:
    """Return the tensors of the model under our names. Raises CheckpointError if any are missing."""
    path = directory / "config.json"
    if model.num_layers > len(tensors):
        raise CheckpointError(f"{path}: there are {model.num_layers:,} layers in it, and {len(tensors):,} tensors")
    if tau:
        check_tau(path, model, tau)
    return rename(directory, tensors, expected=HUGGINGFACE.parameters(model))


def tokenizer_file(directory: Path, kind: str) -> Path | None:
    """Return the tokenizer's file in an export, if there is one."""
    pair = directory / "vocab.json"
    if kind == "HFTokenizer" and pair.is_file():
        return pair  # the run's own files come first, as tokenizer.json was made from them
    path = directory / _TOKENIZER_FILES.get(kind, "")
    return path if path.is_file() else None


def _config(record: RunRecord, eod: int) -> dict[str, Any]:
    model = record.model
    return {
        **(plain_config(model) if model.layer == "transformer" else _tokenformer_config(record)),
        "dtype": "float32",
        "vocab_size": model.padded_vocab_size,  # in transformers this is the number of embedding rows
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "initializer_range": model.init_method_std,
        "max_position_embeddings": record.seq_length,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": eod,  # in training, too, a document starts after the end of another one
        "eos_token_id": eod,
        "megatron_tf": _facts(record),
    }


def _tokenformer_config(record: RunRecord) -> dict[str, Any]:
    model = record.model
    return {
        "architectures": ["TokenFormerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_tokenformer.TokenFormerConfig",
            "AutoModel": "modeling_tokenformer.TokenFormerModel",
            "AutoModelForCausalLM": "modeling_tokenformer.TokenFormerForCausalLM",
        },
        "model_type": "tokenformer",
        "token_counts": {kind: model.token_counts(kind) for kind in TOKEN_KINDS},
        "norm_activation": model.norm_activation,
        "rotary_percent": model.rotary_percent,
        "rotary_base": model.rotary_base,
        "layer_norm_eps": model.layernorm_epsilon,
        "tau": dict(record.tau),
    }


def _facts(record: RunRecord) -> dict[str, Any]:
    """Return the record of our checkpoint beyond the model. Only keys of the run's configuration that are needed
    outside the run are included, so that no private paths are published."""
    if record.generations is not None:  # the optimizer state is not exported
        record = replace(record, generations=record.generations.without_state())
    written = record.to_json()
    return {
        "config": {
            "model": written["model"],
            "training": {"seq_length": record.seq_length, "seed": record.seed},
            "data": _data(record.data),
        },
        **{key: written[key] for key in ("tokenizer", "lineage", "generations", "schedule_start") if key in written},
        "training": {"skipped": 0, **written["training"], "adam_steps": 0},
    }


def _data(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's type, and the end-of-document token if the run sets one."""
    end = data.get("eod_token")
    named = {} if end is None else {"eod_token": str(end)}
    return {"tokenizer_type": str(data["tokenizer_type"]), "tokenizer_model": None, **named}


def _metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reconstruct the metadata that `_config` was made from. Raises KeyError and similar errors if keys are missing."""
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
    # "after_growth" is what version 0.1 wrote
    growth = ("generations", "after_growth", "schedule_start")
    return metadata | {key: facts[key] for key in growth if key in facts}


def _generation_config(model: ModelConfig, eod: int) -> dict[str, Any]:
    # these ids occur in no text and must never be generated
    padding = list(range(model.vocab_size, model.padded_vocab_size))
    config: dict[str, Any] = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    return config | ({"suppress_tokens": padding} if padding else {})


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, path: Path | None, *, seq_length: int) -> None:
    """Write the tokenizer's file and transformers' settings for it; nothing if transformers has no such tokenizer."""
    kind = tokenizer.identity["type"]
    if path is None or kind not in _TOKENIZER_FILES:
        return
    merges = merges_file(path)
    if kind != "HFTokenizer" or merges is None or not is_pair(path):
        shutil.copyfile(path, directory / _TOKENIZER_FILES[kind])
    else:
        (directory / _TOKENIZER_FILES[kind]).write_text(tokenizer_json(path), encoding="utf-8")
        # also the run's own files: an import compares their hash, the tokenizer's identity
        shutil.copyfile(path, directory / "vocab.json")
        shutil.copyfile(merges, directory / "merges.txt")
    _, eod = _pieces(kind, path, tokenizer.eod)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "pad_token": eod,  # masked by the attention mask
        "padding_side": "left",  # so that the prompts of a batch end together
        "model_max_length": seq_length,
        "clean_up_tokenization_spaces": False,
    }
    if kind == "SentencePieceTokenizer":
        config["split_special_tokens"] = True  # "</s>" within a text is ordinary text, as in training
    _write_json(directory / "tokenizer_config.json", config)


def texts_with_special_pieces(kind: str, path: Path) -> list[str]:
    """Return texts that contain the special pieces, such as the end of a document, spelled out."""
    special, _ = _pieces(kind, path, 0)
    return [f"one {piece} two{piece}" for piece in special]


def _pieces(kind: str, path: Path, token_id: int) -> tuple[list[str], str]:
    """Return the special pieces, and a function from ids to names, since decoding would omit control pieces."""
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
