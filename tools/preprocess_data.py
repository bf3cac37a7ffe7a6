"""Turn Pile shards into indexed datasets: `megatron-tf preprocess-data` as a script of the source tree."""

from megatron_tf.commands.runner import run_script

if __name__ == "__main__":
    raise SystemExit(run_script("preprocess-data"))
