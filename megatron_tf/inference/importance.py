"""The contribution of each parameter token or hidden unit to a model's outputs on samples of a text."""

from collections.abc import Sequence

from torch import Tensor

from megatron_tf.inference.model import LanguageModel
from megatron_tf.model.contributions import unit_contributions


def token_importance(model: LanguageModel, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return, by module, the norm [N] of each token's or hidden unit's contribution over samples (ids [S])."""
    return unit_contributions(model.transformer, samples)
