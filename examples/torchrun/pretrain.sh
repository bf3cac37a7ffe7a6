#!/usr/bin/env bash
# One node: `bash examples/torchrun/pretrain.sh CONFIG.yaml GPUS [--section.key=value ...]`
set -euo pipefail
config=$1 ranks=$2
shift 2
exec python -m megatron_tf.torchrun --standalone --nproc-per-node "$ranks" -m megatron_tf.pretrain "$config" "$@"
