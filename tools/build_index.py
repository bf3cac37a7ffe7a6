"""Build the index files a run will read from its configuration, without a GPU: build_index.py CONFIG [--section.key=v].

A run builds what is missing by itself; for large data sets this saves its ranks the waiting.
"""

import argparse
import math
import sys
import time

from megatron_tf.interrupt import end_at_interrupt, run_command

if __name__ == "__main__":
    end_at_interrupt()  # the imports below take seconds

import numpy as np

from megatron_tf.arguments import file_path
from megatron_tf.config import load_config
from megatron_tf.data.blend import BlendedDataset, Samples
from megatron_tf.data.build import build_dataset, build_validation, samples_of_run
from megatron_tf.data.gpt_dataset import GPTDataset
from megatron_tf.data.order import SampleOrder


def main(arguments: list[str] | None = None) -> int:
    """0 when everything is built, 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=file_path, help="YAML file of the run")
    known, overrides = parser.parse_known_args(arguments)
    try:
        config = load_config(known.config, overrides)
        training = config.training
        report("train", build_dataset(config), samples_of_run(training, "train"))
        if training.eval_interval:
            for part in build_validation(config):
                report(f"validation {part.name}", part.samples, training.eval_iters * training.global_batch_size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(name: str, dataset: Samples, samples: int) -> None:
    """Build, and say how long it took."""
    started = time.perf_counter()
    build(dataset, samples)
    print(f"{name}: {samples:,} samples, {time.perf_counter() - started:.1f} s", flush=True)


def build(dataset: Samples, samples: int) -> None:
    """Every epoch that so many samples reach into."""
    if isinstance(dataset, BlendedDataset):
        # no blend takes more than one sample beyond the share that a set has of a few more steps, one for each set
        steps = samples + len(dataset.datasets)
        for part, share in zip(dataset.datasets, dataset.blend.shares.tolist(), strict=True):
            build(part, math.ceil(share * steps) + 1)
    elif isinstance(dataset, GPTDataset) and isinstance(dataset.order, SampleOrder):
        for first in np.arange(0, samples, dataset.order.samples_per_epoch).tolist():
            dataset.order.locate(first)


if __name__ == "__main__":
    sys.exit(run_command(main))
