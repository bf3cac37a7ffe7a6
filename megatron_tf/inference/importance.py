"""How much each parameter token contributes to a model's outputs on samples of a text."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from megatron_tf.inference.model import LanguageModel
from megatron_tf.layers.pattention import Pattention


@torch.no_grad()
def token_importance(model: LanguageModel, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return module -> [N]: the norm of each token's contribution P_j V_j over all positions of samples (ids [S])."""
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
