#!/usr/bin/env bash
# Many nodes: the same command on each of them, with the name of one that all can reach as HOST,
# `bash examples/torchrun/pretrain_multi_node.sh CONFIG.yaml NODES GPUS_PER_NODE HOST[:PORT] [--section.key=value ...]`
# A rank that fails is started again with all others, up to three times; they go on from the newest checkpoint.
set -euo pipefail
config=$1 nodes=$2 ranks=$3 endpoint=$4
shift 4
exec python -m megatron_tf.torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts 3 --rdzv-backend c10d \
    --rdzv-endpoint "$endpoint" --rdzv-id "${RDZV_ID:-megatron_tf}" -m megatron_tf.pretrain "$config" "$@"
