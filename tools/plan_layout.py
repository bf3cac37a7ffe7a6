"""Rank the layouts of a run on a cluster: `megatron-tf plan` as a script of the source tree."""

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("plan"))
