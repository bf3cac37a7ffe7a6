"""Build the index files that a run needs before it starts.

A run builds missing index files itself, but for large datasets its ranks would have to wait.

Example:
    megatron-tf build-index run.yaml --training.train_iters=10000
"""

import math
import time
from typing import TYPE_CHECKING

from megatron_tf.commands.arguments import file_path, make_parser
from megatron_tf.commands.runner import command, import_late

if TYPE_CHECKING:
    from megatron_tf.data.blend import Samples


@command()
def main(arguments: list[str] | None = None) -> int:
    """Build the index files of the training and validation datasets."""
    parser = make_parser("build-index", __doc__)
    parser.add_argument("config", type=file_path, help="YAML configuration, followed by overrides --section.key=value")
    known, overrides = parser.parse_known_args(arguments)
    import_late("megatron_tf.data.build")
    from megatron_tf.config import load_config
    from megatron_tf.data.build import build_dataset, build_validation, samples_of_run
    from megatron_tf.data.packed_dataset import packing_reports

    config = load_config(known.config, overrides)
    if config.data.order_of_new_run == "lanes":
        print("training data needs no index files under data.order lanes: samples are located as they are read")
    training = config.training
    dataset = build_dataset(config)
    report("train", dataset, samples_of_run(training, "train"))
    for packing in packing_reports(dataset):
        print(packing)
    if training.eval_interval:
        for part in build_validation(config):
            report(f"validation {part.name}", part.samples, training.eval_iters * training.global_batch_size)
    return 0


def report(name: str, dataset: "Samples", samples: int) -> None:
    """Build the index files of a dataset, and print how long it took."""
    started = time.perf_counter()
    build(dataset, samples)
    print(f"{name}: {samples:,} samples, {time.perf_counter() - started:.1f} s", flush=True)


def build(dataset: "Samples", samples: int) -> None:
    """Build the index files of every epoch that the first `samples` samples touch."""
    from megatron_tf.data.blend import BlendedDataset
    from megatron_tf.data.gpt_dataset import GPTDataset
    from megatron_tf.data.order import EpochOrder
    from megatron_tf.data.packed_dataset import PackedDataset

    if isinstance(dataset, BlendedDataset):
        # after one more step per dataset, no dataset is more than one sample beyond its share
        steps = samples + len(dataset.datasets)
        for part, share in zip(dataset.datasets, dataset.blend.shares.tolist(), strict=True):
            build(part, math.ceil(share * steps) + 1)
    elif isinstance(dataset, GPTDataset | PackedDataset) and isinstance(dataset.order, EpochOrder):
        for first in range(0, samples, dataset.order.samples_per_epoch):
            dataset.order.locate(first)
