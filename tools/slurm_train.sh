#!/usr/bin/env bash
# Train on a Slurm cluster, one task for each GPU.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [arguments of train.py]" >&2
    echo "set before it: GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS= PYTHON=python" >&2
    exit 2
fi
partition=$1 job_name=$2 config=$3
shift 3
gpus=${GPUS:-8}
per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086  # SRUN_ARGS are several words
exec srun --partition "$partition" --job-name "$job_name" --gres "gpu:$per_node" --ntasks "$gpus" \
    --ntasks-per-node "$per_node" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$config" --launcher slurm "$@"
