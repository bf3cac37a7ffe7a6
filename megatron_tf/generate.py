"""Continue texts: `python -m megatron_tf.generate CHECKPOINT`; see megatron_tf.commands.generate."""

import sys

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    sys.exit(run_script("generate"))

from megatron_tf.commands.generate import main

__all__ = ["main"]
