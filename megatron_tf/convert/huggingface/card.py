"""The model card of an export."""

from megatron_tf.checkpoint.record import GrowthEvent, RunRecord
from megatron_tf.config import TOKEN_KINDS
from megatron_tf.tokenformer.sizes import parameter_count

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- tokenformer
- megatron_tf
---

# {name}

A [TokenFormer](https://arxiv.org/abs/2410.23168) language model of {parameters:,} parameters, trained with megatron_tf.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code` runs `modeling_tokenformer.py` of this directory: read it first.

| | |
|---|---|
| layers, hidden size, heads | {num_layers}, {hidden_size}, {num_attention_heads} |
| parameter tokens | {tokens} |
| normalisation | {norm_activation} |
| vocabulary | {vocab_size:,} ({padded_vocab_size:,} rows with padding, which `generate` leaves out) |
| tokenizer | {tokenizer} |
| trained with samples of | {seq_length:,} tokens |

## Training and lineage

{lineage}

## Measured loss

{measured}
"""


def model_card(record: RunRecord, name: str, measured: str | None) -> str:
    """Return README.md of an export called `name`, from the checkpoint's record; `measured` is a loss in words."""
    model = record.model
    tokenizer = record.tokenizer
    return _CARD.format(
        name=name,
        parameters=parameter_count(model),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        tokens=", ".join(f"{kind} {_range(model.token_counts(kind))}" for kind in TOKEN_KINDS),
        norm_activation=model.norm_activation,
        vocab_size=model.vocab_size,
        padded_vocab_size=model.padded_vocab_size,
        tokenizer=f"{tokenizer['type']}, SHA-256 {tokenizer['sha256']}" if tokenizer["sha256"] else tokenizer["type"],
        seq_length=record.seq_length,
        lineage="\n".join(f"- {line}" for line in _lineage(record)),
        measured=measured or "Not measured at the export.",
    )


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)} by layer"


def _lineage(record: RunRecord) -> list[str]:
    training = record.training
    lines = [_growth(event) for event in record.lineage] or ["never grown"]
    if not training.step:
        return [*lines, "not trained by megatron_tf: imported, or as initialized"]
    return [*lines, f"step {training.step:,} ({training.tokens:,} tokens): this checkpoint"]


def _growth(event: GrowthEvent) -> str:
    kinds = [f"{kind} {old} to {new} tokens" for kind, (old, new) in event.kinds.items()]
    if event.inserted_layers:
        kinds.append(f"new layers {', '.join(map(str, event.inserted_layers))}")
    return f"step {event.step:,} ({event.tokens:,} tokens): {', '.join(kinds)}, by {event.init}"
