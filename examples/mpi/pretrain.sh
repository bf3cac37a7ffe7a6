#!/usr/bin/env bash
# Ranks started by MPI: `bash examples/mpi/pretrain.sh CONFIG.yaml RANKS [--section.key=value ...]`; needs mpi4py.
# On many nodes, name the hosts in the way of your MPI, such as HYDRA_HOST_FILE for MPICH.
set -euo pipefail
config=$1 ranks=$2
shift 2
exec mpiexec -n "$ranks" python -m megatron_tf.pretrain "$config" "$@"
