"""The log line and the metrics of what a run has read and left out of its training sets."""

from typing import Any

from megatron_tf.data.phases import SetState
from megatron_tf.training.observability.observer import DataReport


def data_event(report: DataReport) -> dict[str, Any]:
    """Return the event for the metrics file."""
    training = report.training
    return {
        "event": "data",
        "reason": report.reason,
        "step": report.step,
        "samples": report.samples,
        "seq_length": training.seq_length,
        "micro_batch_size": training.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "weights": dict(report.phase.weights),
        "sets": {name: counts_of(state) for name, state in report.sets.items()},
    }


def counts_of(state: SetState) -> dict[str, int]:
    """Return what has been read and left out of a set, in tokens."""
    return {
        "epoch": state.position.epoch,
        "epoch_tokens": state.ring.tokens,
        "read": state.read,
        "read_of_epoch": state.position.read_of_epoch(),
        "tail": state.position.left_out,
        "skipped": state.skipped,
        "rewound": state.rewound,
    }


def describe_data(report: DataReport) -> str:
    """Return the line for the log: why it is written, and what has been left out of each set so far."""
    return f"data: {_reason(report)}; left out so far: {_all_left_out(report)}"


def _reason(report: DataReport) -> str:
    if report.reason == "epoch":
        return ", ".join(f"epoch {report.sets[name].position.epoch + 1} of {name} starts" for name in report.new_epochs)
    if report.reason == "end":
        return f"{sum(state.read for state in report.sets.values()):,} tokens read"
    weights = ", ".join(f"{weight:g} {name}" for name, weight in report.phase.weights.items())
    training = report.training
    return (
        f"a phase starts with {weights}; seq_length {training.seq_length}, global_batch_size "
        f"{training.global_batch_size}"
    )


def _all_left_out(report: DataReport) -> str:
    found = [f"{name}: {text}" for name, state in report.sets.items() if (text := describe_left_out(state))]
    return "; ".join(found) or "nothing"


def describe_left_out(state: SetState) -> str:
    """Say how many tokens of a set the model has not seen, and why; empty if there are none."""
    counts = {
        "in tails of epochs": state.position.left_out,
        "in skipped batches": state.skipped,
        "rewound": state.rewound,
    }
    return ", ".join(f"{count:,} {why}" for why, count in counts.items() if count)
