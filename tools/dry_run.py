"""Run a step on ranks that do not exist: `megatron-tf dry-run` as a script of the source tree."""

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("dry-run"))
