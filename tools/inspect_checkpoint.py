"""Look into a checkpoint, check it or compare it: `megatron-tf inspect-checkpoint` as a script of the source tree."""

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("inspect-checkpoint"))
