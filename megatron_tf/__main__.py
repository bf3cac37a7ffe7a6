"""Train, grow and evaluate TokenFormers: `megatron-tf COMMAND ...`, or `python -m megatron_tf COMMAND ...`."""

import importlib
import sys

from megatron_tf.interrupt import end_at_interrupt, run_command
from megatron_tf.parallel.signals import catch_from_first_line

COMMANDS = {
    "pretrain": (
        "megatron_tf.pretrain",
        "train a model; torchrun starts several ranks of it",
    ),
    "torchrun": ("megatron_tf.torchrun", "torchrun that ends with the words and the exit code of its ranks"),
    "generate": ("megatron_tf.generate", "continue a text"),
    "evaluate": ("megatron_tf.evaluate", "perplexity and bits per byte of data sets"),
    "lm-eval": ("megatron_tf.lm_eval", "lm-evaluation-harness with the model `megatron_tf`"),
    "train-tokenizer": ("megatron_tf.tools.train_tokenizer", "train a SentencePiece tokenizer"),
    "preprocess-data": ("megatron_tf.tools.preprocess_data", "turn Pile shards into .bin/.idx"),
    "merge-datasets": ("megatron_tf.tools.merge_datasets", "put data sets together"),
    "inspect-dataset": ("megatron_tf.tools.inspect_dataset", "look into a data set, and check it"),
    "build-index": ("megatron_tf.tools.build_index", "build the index files of a run ahead of it"),
    "inspect-checkpoint": ("megatron_tf.tools.inspect_checkpoint", "look into a checkpoint, check or compare it"),
    "reshard-checkpoint": ("megatron_tf.tools.reshard_checkpoint", "grow a checkpoint, or lay it out anew"),
    "convert-checkpoint": ("megatron_tf.tools.convert_checkpoint", "official weights and Hugging Face, in and out"),
    "plot-run": ("megatron_tf.tools.plot_run", "draw the loss of a run"),
}
"""Command -> (module, what it does)."""


def main() -> int:
    """The exit code of the command; 0 for --help, 2 where there is no such command."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in COMMANDS:
        module, _ = COMMANDS[command]
        if command == "pretrain":
            catch_from_first_line()
        else:
            end_at_interrupt()
        sys.argv = [f"megatron-tf {command}", *sys.argv[2:]]
        try:
            run = importlib.import_module(module).main
        except ModuleNotFoundError as error:
            print(f"error: megatron-tf {command} needs {error.name}, which is not installed", file=sys.stderr)
            return 1
        return run_command(run)
    lines = [f"  {name:<20}{summary}" for name, (_, summary) in COMMANDS.items()]
    usage = "\n".join(["usage: megatron-tf COMMAND ...", "", *lines, "", "megatron-tf COMMAND --help says more."])
    if command in ("-h", "--help"):
        print(usage)
        return 0
    print(f"error: megatron-tf has no command {command!r}\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
