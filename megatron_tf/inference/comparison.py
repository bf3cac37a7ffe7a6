"""What models do on a text: how well they predict it, how two differ, how much each parameter token contributes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_tf.data.bad_ids import check_ids
from megatron_tf.data.indexed_dataset import DataError, IndexedDataset
from megatron_tf.inference.model import LanguageModel, load_model
from megatron_tf.layers.pattention import Pattention

_RANDOM_IDS = 64  # of a sample whose logits are compared


@torch.no_grad()
def token_importance(model: LanguageModel, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Module -> [N], the norm of each token's contribution P_j V_j over all positions of the samples (ids [S])."""
    pattentions = model.transformer.pattentions()
    squares = {name: torch.zeros(len(p.key_tokens)) for name, p in pattentions.items()}

    def record(name: str, projection: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(projection, Pattention)
        used = projection.weights(inputs[0]).flatten(0, -2).float().square().sum(0)
        squares[name] += used.cpu() * projection.value_tokens.float().square().sum(1).cpu()

    handles = [p.register_forward_pre_hook(partial(record, name)) for name, p in pattentions.items()]
    try:
        for ids in samples:
            model(ids[None].to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: square.sqrt() for name, square in squares.items()}


@dataclass(frozen=True)
class Comparison:
    """Of the outputs of two models."""

    difference: float
    """Largest of the logits of ids that both have."""
    largest: float
    """Largest logit of the first."""
    losses: tuple[float, float] | None
    """Mean in nats, of the first and the second; None without a text."""
    became_non_finite: int = 0
    """Logits that are infinite or NaN in the second model only."""


def compare_models(first: Path, second: Path, samples: Sequence[Tensor] | None) -> Comparison:
    """Two checkpoints, one loaded after the other, on a text (ids [S] each) or else on fixed random ids."""
    logits, losses = [], []
    for path in (first, second):
        model = load_model(path)
        if samples is None:
            generator = torch.Generator().manual_seed(0)
            shown = [torch.randint(model.config.vocab_size, (_RANDOM_IDS,), generator=generator) for _ in range(2)]
        else:
            shown = list(samples)
            losses.append(mean_loss(model, shown))
        with torch.no_grad():
            logits.append(torch.cat([model(ids[None, :_RANDOM_IDS])[0, :, : model.config.vocab_size] for ids in shown]))
        del model
    old, new = logits
    pair = (losses[0], losses[1]) if losses else None
    # the same infinity, or NaN in both, is no difference; a NaN in one of them is, and stays one
    differences = (old - new).abs().masked_fill((old == new) | (old.isnan() & new.isnan()), 0.0)
    became_non_finite = int((old.isfinite() & ~new.isfinite()).sum())
    largest = float(old[old.isfinite()].abs().max()) if old.isfinite().any() else 0.0
    return Comparison(float(differences.max()), largest, pair, became_non_finite)


@torch.no_grad()
def mean_loss(model: LanguageModel, samples: Sequence[Tensor]) -> float:
    """Mean loss in nats of predicting each next token of the samples (ids [S])."""
    total, count = 0.0, 0
    for ids in samples:
        logits = model(ids[None, :-1])[0].float()
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def read_samples(prefix: Path, vocab_size: int, seq_length: int, num_tokens: int) -> list[Tensor]:
    """About `num_tokens` ids from the front of a data set, in samples [seq_length + 1]. Raises DataError where it has
    less than one sample, or ids the model has not."""
    dataset = IndexedDataset(prefix)
    parts, have, wanted = [], 0, max(1, num_tokens // seq_length) * (seq_length + 1)
    for i in range(len(dataset)):
        parts.append(np.asarray(dataset.document(i), dtype=np.int64))
        check_ids(parts[-1], vocab_size, prefix, i)
        have += len(parts[-1])
        if have >= wanted:
            break
    ids = torch.from_numpy(np.concatenate([*parts, np.empty(0, np.int64)])[:wanted])
    count = len(ids) // (seq_length + 1)
    if not count:
        raise DataError(f"{prefix} holds {len(ids)} tokens, a sample takes {seq_length + 1}")
    return list(ids[: count * (seq_length + 1)].unflatten(0, (count, -1)))


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # macOS tells what there is, not what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(0.8 * 1024 * int(fields["MemAvailable"].split()[0]))
