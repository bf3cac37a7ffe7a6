"""Registry of the commands: their names, modules and one-line descriptions."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A command of `megatron-tf`."""

    module: str
    """In megatron_tf.commands; has `main(arguments) -> int`."""
    summary: str
    is_tool: bool = False
    """Whether it is also available as a script in tools/."""


COMMANDS = {
    "pretrain": Entry("pretrain", "train a model, on one rank or under torchrun"),
    "torchrun": Entry("torchrun", "torchrun that reports the errors and exit code of its ranks"),
    "generate": Entry("generate", "generate text from prompts"),
    "evaluate": Entry("evaluate", "measure perplexity and bits per byte of datasets"),
    "lm-eval": Entry("lm_eval", "run lm-evaluation-harness with the model `megatron_tf`"),
    "train-tokenizer": Entry("train_tokenizer", "train a SentencePiece tokenizer", is_tool=True),
    "preprocess-data": Entry("preprocess_data", "tokenize text into .bin/.idx datasets", is_tool=True),
    "merge-datasets": Entry("merge_datasets", "concatenate datasets", is_tool=True),
    "inspect-dataset": Entry("inspect_dataset", "show and check a dataset", is_tool=True),
    "build-index": Entry("build_index", "build the index files of a run before it starts", is_tool=True),
    "inspect-checkpoint": Entry("inspect_checkpoint", "show, verify or compare checkpoints", is_tool=True),
    "reshard-checkpoint": Entry("reshard_checkpoint", "reshard, grow or shrink a checkpoint", is_tool=True),
    "convert-checkpoint": Entry(
        "convert_checkpoint", "import and export official weights and Hugging Face models", is_tool=True
    ),
    "dry-run": Entry(
        "dry_run", "run a step on many ranks that do not exist: memory, messages, checkpoint", is_tool=True
    ),
    "schedule": Entry("schedule", "show the pipeline schedule of a run: ranks over time, and its bubble", is_tool=True),
    "plan": Entry(
        "plan_layout", "rank the layouts of a run on a cluster by time and memory, over its growth", is_tool=True
    ),
    "plot-run": Entry("plot_run", "plot the loss of a run", is_tool=True),
    "doctor": Entry("doctor", "check this machine, and print what a bug report needs", is_tool=True),
}
