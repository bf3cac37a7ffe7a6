"""Look into a dataset and check it: `megatron-tf inspect-dataset` as a script of the source tree."""

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("inspect-dataset"))
