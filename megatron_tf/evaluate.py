"""Evaluate: `python -m megatron_tf.evaluate CHECKPOINT`; see megatron_tf.commands.evaluate."""

import sys

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    sys.exit(run_script("evaluate"))

from megatron_tf.commands.evaluate import main

__all__ = ["main"]
