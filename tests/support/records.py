"""Builds records of hypothetical runs."""

from megatron_tf.checkpoint.record import RunRecord
from megatron_tf.checkpoint.run_state import TrainingCounters
from megatron_tf.config import ModelConfig, to_dict
from megatron_tf.tokenformer.parameters import initial_taus

NO_TOKENIZER = {"type": "NullTokenizer"}


def make_record(model: ModelConfig, *, config=None, tokenizer=NO_TOKENIZER, step=0, **counters) -> RunRecord:
    """Make the record of a run of `model` after `step` steps, with the initial temperatures.

    `config` is the complete configuration, by default the minimum that readers need. Keywords are nonzero counters.
    """
    training = {"samples": 0, "tokens": 0, "adam_steps": 0, "skipped": 0, **counters}
    return RunRecord(
        model=model,
        config=config or {"model": to_dict(model), "training": {"seq_length": 8, "seed": 7}},
        tau=initial_taus(model),
        tokenizer=tokenizer,
        training=TrainingCounters(step=step, **training),
    )
