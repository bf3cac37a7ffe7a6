"""Train: `python -m megatron_tf.pretrain CONFIG.yaml`; see megatron_tf.commands.pretrain."""

import sys

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    sys.exit(run_script("pretrain"))

from megatron_tf.commands.pretrain import main

__all__ = ["main"]
