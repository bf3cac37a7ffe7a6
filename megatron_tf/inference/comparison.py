"""Compare the outputs and losses of two checkpoints on samples of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tf.inference.model import LanguageModel, load_model
from megatron_tf.tokenformer.dtypes import wide_dtype

_RANDOM_IDS = 64  # ids of each sample whose logits are compared


@dataclass(frozen=True)
class Comparison:
    """The differences between the outputs of two models."""

    difference: float
    """Largest absolute difference between the logits."""
    largest: float
    """Largest absolute logit of the first model."""
    losses: tuple[float, float] | None
    """Mean losses in nats of the first and the second model; None without a text."""
    became_non_finite: int = 0
    """Logits that are infinite or NaN in the second model only."""


def compare_models(
    first: Path, second: Path, samples: Sequence[Tensor] | None, *, dtype: torch.dtype = torch.float32
) -> Comparison:
    """Compare two checkpoints, loaded one after the other in `dtype`, on samples (ids [S]) or else on fixed random
    ids."""
    logits = []
    losses = []
    for path in (first, second):
        model = load_model(path, dtype=dtype)
        if samples is None:
            generator = torch.Generator().manual_seed(0)
            shown = [torch.randint(model.config.vocab_size, (_RANDOM_IDS,), generator=generator) for _ in range(2)]
        else:
            shown = list(samples)
            losses.append(mean_token_loss(model, shown))
        with torch.no_grad():
            logits.append(torch.cat([model(ids[None, :_RANDOM_IDS])[0, :, : model.config.vocab_size] for ids in shown]))
        del model
    old, new = logits
    pair = (losses[0], losses[1]) if losses else None
    # equal infinities, or NaN in both, count as no difference; a NaN in only one of them propagates
    differences = (old - new).abs().masked_fill((old == new) | (old.isnan() & new.isnan()), 0.0)
    became_non_finite = int((old.isfinite() & ~new.isfinite()).sum())
    largest = float(old[old.isfinite()].abs().max()) if old.isfinite().any() else 0.0
    return Comparison(float(differences.max()), largest, pair, became_non_finite)


@torch.no_grad()
def mean_token_loss(model: LanguageModel, samples: Sequence[Tensor]) -> float:
    """Return the mean loss in nats of predicting each next token of the samples (ids [S])."""
    total, count = 0.0, 0
    for ids in samples:
        logits = model(ids[None, :-1])[0]
        logits = logits.to(wide_dtype(logits.dtype))
        total += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count
