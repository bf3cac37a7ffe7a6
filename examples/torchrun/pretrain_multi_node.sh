#!/usr/bin/env bash
# Many nodes. Run the same command on each of them; HOST is one node that all the others can reach:
# `bash examples/torchrun/pretrain_multi_node.sh CONFIG.yaml NODES GPUS_PER_NODE HOST[:PORT] [--section.key=value ...]`
# If a rank fails, all ranks restart and resume from the newest checkpoint, up to three times.
set -euo pipefail
config=$1 nodes=$2 ranks=$3 endpoint=$4
shift 4
exec python -m megatron_tf.torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 3 --rdzv-backend c10d \
    --rdzv-endpoint "$endpoint" --rdzv-id "${RDZV_ID:-megatron_tf}" -m megatron_tf.pretrain "$config" "$@"
