"""The model card of an export."""

from megatron_tf.checkpoint.growth_event import GrowthEvent
from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import TOKEN_KINDS, ModelConfig
from megatron_tf.convert.huggingface.plain import architecture
from megatron_tf.tokenformer.sizes import parameter_count

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {tag}
- megatron_tf
---

# {name}

A {kind} language model of {parameters:,} parameters, trained with megatron_tf.

{usage}

| | |
|---|---|
| layers, hidden size, heads | {num_layers}, {hidden_size}, {num_attention_heads} |
{units}
| vocabulary | {vocab_size:,} ({padded_vocab_size:,} rows with padding, which `generate` never produces) |
| tokenizer | {tokenizer} |
| trained with sequences of | {seq_length:,} tokens |

## Training and lineage

{lineage}

## Measured loss

{measured}
"""

_TOKENFORMER_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code` runs `modeling_tokenformer.py` of this directory: read it first."""
_PLAIN_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

The architecture is transformers' own `{architecture}`: no remote code is needed."""


def model_card(record: RunRecord, name: str, measured: str | None) -> str:
    """Return README.md of an export called `name`, from the checkpoint's record; `measured` is a sentence on the
    loss."""
    model = record.model
    tokenizer = record.tokenizer
    return _CARD.format(
        name=name,
        **(_plain(model, name) if model.layer == "transformer" else _tokenformer(model, name)),
        parameters=parameter_count(model),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        tokenizer=f"{tokenizer['type']}, SHA-256 {tokenizer['sha256']}" if tokenizer["sha256"] else tokenizer["type"],
        seq_length=record.seq_length,
        lineage="\n".join(f"- {line}" for line in _lineage(record)),
        measured=measured or "Not measured during the export.",
    )


def _tokenformer(model: ModelConfig, name: str) -> dict[str, str]:
    tokens = ", ".join(f"{kind} {_range(model.token_counts(kind))}" for kind in TOKEN_KINDS)
    return {
        "tag": "tokenformer",
        "kind": "[TokenFormer](https://arxiv.org/abs/2410.23168)",
        "usage": _TOKENFORMER_USAGE.format(name=name),
        "units": f"| parameter tokens | {tokens} |\n| normalization | {model.norm_activation} |",
    }


def _plain(model: ModelConfig, name: str) -> dict[str, str]:
    return {
        "tag": "transformer",
        "kind": "transformer",
        "usage": _PLAIN_USAGE.format(name=name, architecture=architecture(model)),
        "units": f"| hidden units of each MLP | {_range(model.token_counts('ffn'))} |",
    }


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)} by layer"


def _lineage(record: RunRecord) -> list[str]:
    training = record.training
    lines = [_growth(event) for event in record.lineage] or ["never grown"]
    if not training.step:
        return [*lines, "not trained by megatron_tf: imported, or as initialized"]
    return [*lines, f"step {training.step:,} ({training.tokens:,} tokens): this checkpoint"]


def _growth(event: GrowthEvent) -> str:
    changes = [f"{kind} {old} to {new} tokens" for kind, (old, new) in event.kinds.items()]
    if event.hidden_size is not None:
        changes.insert(0, "width {} to {}".format(*event.hidden_size))
    if event.inserted_layers:
        changes.append(f"new layers {', '.join(map(str, event.inserted_layers))}")
    if event.dropped_layers:
        changes.append(f"without layers {', '.join(map(str, event.dropped_layers))}")
    return f"step {event.step:,} ({event.tokens:,} tokens): {', '.join(changes)}, by {event.init}"
