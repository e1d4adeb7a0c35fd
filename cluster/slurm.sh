#!/usr/bin/env bash
# One allocation is one Ray cluster is one job:  sbatch --nodes=4 cluster/slurm.sh JOB [--set a.b=c ...]
# `ray` and `distill` must be on the PATH of every node, and the job's storage on a file system that all nodes share.
# Submitted again with the same job, it goes on where it stopped.
#SBATCH --job-name=distill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # seconds; nodes of a large allocation do not start at once
(umask 077 && ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token)

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# symmetric-run ends in 0 when Ray itself did not start, so the exit code of the job comes from the job.
outcome=$(mktemp -p "$PWD" .distill-outcome-XXXXXX)
trap 'rm -f "$outcome"' EXIT

# shellcheck disable=SC2016 # expanded on the head node, by the inner shell
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" \
    ray symmetric-run --address="$head:6379" --min-nodes="$SLURM_JOB_NUM_NODES" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
    -- bash -c 'distill run "${@:2}"; code=$?; echo "$code" > "$1"; exit "$code"' \
        distill "$outcome" "$@" --set "cluster.address=$head:6379" || true

code=$(< "$outcome")
exit "${code:-4}"
