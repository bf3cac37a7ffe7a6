"""Advice on a growth, for the plan of a command and the log of a run: its size, its cost and a warning."""

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.sizes import parameter_count, training_flops

_MOST_GROWTH = 2.0  # in parameters
_MOST_TOKENS = 20.0  # for each parameter before the growth


def advise(before: RunRecord, grown: ModelConfig) -> list[str]:
    """Return lines on the growth of a run's model to `grown`, and a warning if it is too large or too late.

    They say the growth factor, the tokens per parameter so far, and FLOPs per token in training before and after.
    """
    old, new = parameter_count(before.model), parameter_count(grown)
    factor, tokens = new / old, before.training.tokens / old
    flops = [training_flops(model, before.seq_length) for model in (before.model, grown)]
    lines = [
        f"growth factor {factor:.3g} ({old:,} to {new:,} parameters) after {tokens:.3g} tokens per parameter; "
        f"FLOPs per token in training: {flops[0]:,} before, {flops[1]:,} after"
    ]
    beyond = []
    if factor > _MOST_GROWTH:
        beyond.append(f"beyond a factor of {_MOST_GROWTH:g}")
    if tokens > _MOST_TOKENS:
        beyond.append(f"after more than {_MOST_TOKENS:g} tokens per parameter")
    if beyond:
        lines.append(
            f"warning: growing {' and '.join(beyond)} pays less reliably, and from some point on training the larger "
            f"model from scratch is better (arXiv 2605.13405)"
        )
    return lines
