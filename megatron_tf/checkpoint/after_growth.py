"""Reads what checkpoints of version 0.1 say about old and new rows, which had one count of updates for all of them."""

from megatron_tf.checkpoint.errors import CheckpointError
from megatron_tf.checkpoint.generations import Generation, Generations, Run
from megatron_tf.checkpoint.json_object import JsonObject
from megatron_tf.config import ModelConfig
from megatron_tf.tokenformer.parameters import model_parameters


def read_after_growth(
    values: JsonObject, model: ModelConfig, *, num_growths: int, step: int, adam_steps: int
) -> Generations:
    """Read the key `after_growth` of a run at `step`, whose Adam moments count `adam_steps` updates.

    Raises CheckpointError if it does not list the parameter tokens of every layer.
    """
    start, iters = values.count("step"), values.count("rewarmup_iters")
    scale, old_rows = values.number("old_tokens_lr_scale"), values.counts("old_rows")
    # before generating names for each layer, whose number may be absurd in a damaged file
    if len(old_rows) < model.num_layers:
        raise CheckpointError(f"{values.source}: {values.path}.old_rows does not list the tokens of every layer")

    def generation(growth: int, lr_scale: float) -> Generation:
        return Generation(
            growth=growth,
            exp_avg_steps=adam_steps,
            exp_avg_sq_steps=adam_steps,
            lr_scale=lr_scale,
            rewarmup_iters=iters,
            rewarmup_done=min(iters, max(0, step - start)),
        )

    runs = {}
    for parameter in model_parameters(model).values():
        rows, old = parameter.shape[0], old_rows.get(parameter.name)
        if old is None:
            runs[parameter.name] = [Run(rows, generation(0, 1.0))]
        else:
            old = min(old, rows)
            runs[parameter.name] = [Run(old, generation(0, scale)), Run(rows - old, generation(num_growths, 1.0))]
    return Generations.of_runs(runs)
