"""Show the pipeline schedule of a run: `megatron-tf schedule` as a script of the source tree."""

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("schedule"))
