"""The commands: their names, the modules they are in, and what brings the packages that only some of them need."""

from typing import NamedTuple


class Entry(NamedTuple):
    """A command of `megatron-tf`."""

    module: str
    """In megatron_tf.commands; has `main(arguments) -> int`."""
    summary: str
    is_tool: bool = False
    """Whether it is also a script in tools/."""


COMMANDS = {
    "pretrain": Entry("pretrain", "train a model; torchrun starts several ranks of it"),
    "torchrun": Entry("torchrun", "torchrun that ends with the words and the exit code of its ranks"),
    "generate": Entry("generate", "continue a text"),
    "evaluate": Entry("evaluate", "perplexity and bits per byte of datasets"),
    "lm-eval": Entry("lm_eval", "lm-evaluation-harness with the model `megatron_tf`"),
    "train-tokenizer": Entry("train_tokenizer", "train a SentencePiece tokenizer", is_tool=True),
    "preprocess-data": Entry("preprocess_data", "turn Pile shards into .bin/.idx", is_tool=True),
    "merge-datasets": Entry("merge_datasets", "put datasets together", is_tool=True),
    "inspect-dataset": Entry("inspect_dataset", "look into a dataset, and check it", is_tool=True),
    "build-index": Entry("build_index", "build the index files of a run ahead of it", is_tool=True),
    "inspect-checkpoint": Entry("inspect_checkpoint", "look into a checkpoint, check or compare it", is_tool=True),
    "reshard-checkpoint": Entry("reshard_checkpoint", "grow a checkpoint, or reshard it", is_tool=True),
    "convert-checkpoint": Entry("convert_checkpoint", "official weights and Hugging Face, in and out", is_tool=True),
    "plot-run": Entry("plot_run", "draw the loss of a run", is_tool=True),
    "doctor": Entry("doctor", "check this machine, and print what a bug report needs", is_tool=True),
}
