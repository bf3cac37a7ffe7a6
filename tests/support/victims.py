"""Processes to be killed while they save or reshard."""

from functools import partial
from pathlib import Path

import torch

from megatron_tf.checkpoint.background import BackgroundSaver
from megatron_tf.checkpoint.save import Retention, save_checkpoint
from megatron_tf.commands import reshard_checkpoint
from megatron_tf.parallel.sharding import RowShard
from tests.support.toy import GROUPS, random_tensors, record

ROWS = 3000


def shards_of(step):
    """Return the shards of an 18 MB checkpoint in which every value is its step."""
    rows = torch.full((ROWS, 512), float(step))
    return {group: [RowShard("embedding.weight", (ROWS, 512), 0, ROWS, rows, True)] for group in GROUPS}


def save(root, step, **options):
    keep = Retention(keep_last=2)
    return save_checkpoint(Path(root), step, record=record(step), writer_label="all", retention=keep, **options)


def save_for_ever(root, first):
    """Save one checkpoint after another, keeping the last two."""
    step = first
    while True:
        save(root, step, tensors=shards_of(step))
        step += 1


def save_in_background_for_ever(root, first):
    """Save in the background while the process does something else."""
    with BackgroundSaver(None, lambda path: None, print) as saver:
        step = first
        while True:
            saver.save(partial(save, root, step), shards_of(step))
            torch.randn(300, 300).mm(torch.randn(300, 300))
            step += 1


def reshard_for_ever(source, root):
    """Run reshard-checkpoint in a loop."""
    while True:
        reshard_checkpoint.main(["--load", source, "--save", root, "--target-tensor-parallel-size", "2"])


def burn():
    """Put load on the machine."""
    values = random_tensors()
    while True:
        sum(tensor.sum() for tensor in values["model"].values())
