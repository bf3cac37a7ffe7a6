"""Run lm-eval with this model: `python -m megatron_tf.lm_eval run ...`; see megatron_tf.commands.lm_eval."""

import sys

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    sys.exit(run_script("lm-eval"))

from megatron_tf.commands.lm_eval import main, register

__all__ = ["main", "register"]
