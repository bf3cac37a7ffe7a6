"""What the rows of each growth contribute to a model's outputs on a text, and how many of their tokens are dead."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.errors import UserError
from megatron_tf.growth.row_groups import ContributionSums, RowGroup, RowGroups
from megatron_tf.inference.importance import token_importance
from megatron_tf.inference.model import LanguageModel
from megatron_tf.tokenformer.parameters import model_parameters


@dataclass(frozen=True)
class RowContribution:
    """The parameter tokens, or hidden units of an MLP, of one kind that one growth added, in one layer."""

    group: RowGroup
    tokens: int
    contribution: float
    """Root of the sum over the tokens j of |P_j V_j|^2, averaged over the positions of the text."""
    dead: int
    """Number of tokens whose contribution is at most 1% of the median over the tokens of their module."""


def row_contributions(model: LanguageModel, samples: Sequence[Tensor]) -> list[RowContribution]:
    """Measure the tokens of every growth, kind and layer of a model on samples of a text (ids [S]).

    Raises UserError if contributions are infinite or NaN.
    """
    positions = sum(len(sample) for sample in samples)
    squares = {path: norms.square() / positions for path, norms in token_importance(model, samples).items()}
    if broken := next((path for path, values in squares.items() if not values.isfinite().all()), None):
        raise UserError(f"{broken} has infinite or NaN contributions: the checkpoint is damaged or has diverged")
    groups = RowGroups(model_parameters(model.config), model.record.all_generations)
    sums = ContributionSums(groups, squares, torch.device("cpu"))(squares).tolist()
    found = zip(groups.keys, groups.tokens, sums, strict=True)
    return [
        RowContribution(group=group, tokens=tokens, contribution=square**0.5, dead=int(dead))
        for group, tokens, (square, dead) in found
        if tokens
    ]


def samples_of_text(ids: Sequence[int], seq_length: int) -> list[Tensor]:
    """Split the ids of a text into samples of at most `seq_length`; the last one may be shorter."""
    return list(torch.tensor(ids, dtype=torch.int64).split(seq_length))
