"""Duplication by utility: how many copies each parameter token gets, measured on a text.

The tokens that contribute most to the output of their module, by the norm of P_j V_j over the text, get more copies.
The norm of a row of scores then grows by a factor that depends on the input, where m copies of every token would
multiply it by sqrt(m), or by m for softmax. So tau is multiplied by the mean norm after the growth over that before it,
both for the inputs of the old model.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.interface import Checkpoint
from megatron_tf.config import GrowthStage, ModelConfig, grown_model, layer_sources
from megatron_tf.layers.pattention import Pattention
from megatron_tf.model.contributions import observe_modules, unit_contributions
from megatron_tf.model.from_checkpoint import read_transformer
from megatron_tf.model.samples import samples_for
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tokenformer.normalization import Normalization
from megatron_tf.tokenformer.parameters import key_tokens

_TOKENS = 16384  # of the text, from its start
_ROWS = 256  # of scores at a time, to limit memory


@dataclass(frozen=True)
class Utility:
    """What is measured for one growth by `duplicate_by_utility`, for each module that gets more tokens.

    Both are keyed by the path of the module in the grown model.
    """

    copies: Mapping[str, Sequence[int]]
    """The number of copies of each old token, itself included."""
    norm_factors: Mapping[str, float]
    """The mean norm of a row after the growth over that before it."""


@dataclass(frozen=True)
class _GrownModule:
    """A module that gets more tokens."""

    old_path: str
    num_tokens: int
    """After the growth."""


def needs_utility(stage: GrowthStage) -> bool:
    """Return whether `grow` needs the utility of the old tokens for this stage."""
    return stage.init == "duplicate_by_utility"


def measure_utility(checkpoint: Checkpoint, stage: GrowthStage) -> Utility:
    """Measure the old model of `checkpoint` on the first 16,384 tokens of `stage.utility_data`, in fp32 on the CPU.

    The result does not depend on the number of threads or the layout of the checkpoint. The whole model has to fit in
    memory. Raises ConfigError if the model can't grow like this, DataError for data of another tokenizer or less than a
    sample of them, and CheckpointError for non-finite contributions.
    """
    assert stage.utility_data is not None, "a stage checks that it is given"
    grown = _grown_modules(checkpoint.record.model, stage)
    samples = samples_for(checkpoint.record, Path(stage.utility_data), _TOKENS)
    transformer = read_transformer(checkpoint)
    contributions = unit_contributions(transformer, samples)
    for path, values in contributions.items():
        if not values.isfinite().all():
            raise CheckpointError(f"{checkpoint.directory}: {path} has infinite or NaN contributions on the text")
    copies = {path: choose_copies(contributions[each.old_path], each.num_tokens) for path, each in grown.items()}
    return Utility(copies, _norm_factors(transformer, samples, grown=grown, copies=copies))


def choose_copies(contributions: Tensor, num_tokens: int) -> tuple[int, ...]:
    """Return the number of copies of each token, at least one, that add up to `num_tokens`.

    Each further copy goes to the token with the largest contribution per copy; ties go to the first. If no token
    contributes anything, as in an untrained identity layer, all count the same.
    """
    values = contributions.tolist()
    if not any(values):
        values = [1.0] * len(values)
    copies = [1] * len(values)
    queue = [(-value, token) for token, value in enumerate(values)]  # a heap pops the smallest
    heapq.heapify(queue)
    for _ in range(num_tokens - len(values)):
        _, token = queue[0]
        copies[token] += 1
        heapq.heapreplace(queue, (-values[token] / copies[token], token))
    return tuple(copies)


def _grown_modules(model: ModelConfig, stage: GrowthStage) -> dict[str, _GrownModule]:
    """Return every module that gets more tokens by its path in the grown model."""
    layers = layer_sources(model.num_layers, stage)
    old_keys = {(keys.layer, keys.module): keys for keys in key_tokens(model).values()}
    grown = {}
    for path, keys in key_tokens(grown_model(model, stage)).items():
        assert keys.layer is not None
        source = layers[keys.layer]
        old = old_keys[source.layer, keys.module]
        is_drawn = source.is_new and stage.layer_init == "identity"
        if keys.shape[0] > old.shape[0] and not is_drawn:
            grown[path] = _GrownModule(old.path, keys.shape[0])
    return grown


def _norm_factors(
    transformer: TokenFormer,
    samples: Sequence[Tensor],
    *,
    grown: Mapping[str, _GrownModule],
    copies: Mapping[str, Sequence[int]],
) -> dict[str, float]:
    counts: dict[str, dict[str, Tensor]] = {}  # old path -> path in the grown model -> copies of each token
    for path, each in grown.items():
        counts.setdefault(each.old_path, {})[path] = torch.tensor(copies[path])

    def total_norms(old_path: str, module: nn.Module, x: Tensor) -> dict[str, tuple[float, float]]:
        """Sum the norms of the rows before and after the growth, by path in the grown model."""
        assert isinstance(module, Pattention)
        scores = module.scores(x)
        once = torch.ones(scores.shape[1], dtype=torch.int64)
        return {
            path: (_total_norm(module.norm, scores, once), _total_norm(module.norm, scores, repeats))
            for path, repeats in counts.get(old_path, {}).items()
        }

    before, after = dict.fromkeys(grown, 0.0), dict.fromkeys(grown, 0.0)
    for sample in observe_modules(transformer, samples, total_norms):
        for found in sample.values():
            for path, (old, new) in found.items():
                before[path] += old
                after[path] += new
    return {path: _ratio(path, after[path], before[path]) for path in grown}


def _total_norm(norm: Normalization, scores: Tensor, copies: Tensor) -> float:
    """Sum the norms of rows of scores [T, N], each in its number of copies, in float64.

    It is the root of the statistic, or for softmax the sum that it is the logarithm of.
    """
    total = 0.0
    for rows in scores.split(_ROWS):
        statistic = norm.statistic(rows.double().repeat_interleave(copies, dim=1))
        total += float((statistic.exp() if norm.is_logarithmic else statistic.sqrt()).sum())
    return total


def _ratio(path: str, after: float, before: float) -> float:
    ratio = after / before if before else math.nan
    if not math.isfinite(ratio):
        raise CheckpointError(
            f"{path}: the mean norm of its scores on the text is 0 or non-finite: no tau fits its copies"
        )
    return ratio
