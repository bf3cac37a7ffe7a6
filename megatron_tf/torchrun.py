"""torchrun with the exit code of its ranks: `python -m megatron_tf.torchrun ...`; see megatron_tf.commands.torchrun."""

import sys

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    sys.exit(run_script("torchrun"))

from megatron_tf.commands.torchrun import main

__all__ = ["main"]
