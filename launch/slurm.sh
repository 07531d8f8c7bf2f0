#!/usr/bin/env bash
# Runs one program on the GPUs of one or more SLURM nodes: sbatch [option...] launch/slurm.sh PROGRAM [ARGUMENT...]
#
#   sbatch --nodes=2 launch/slurm.sh python -m infer.sample --config=configs/sample.py \
#       --config.mesh.tensor=8 --config.mesh.data=2 --config.checkpoint=/shared/checkpoints/llama-2-70b --prompt "Hello"
#
# Submit from the repository, on a file system that all nodes see, with its environment made: make sample, then
# .venv/bin/pip install "jax[cuda13]==VERSION" (README.md). Another environment: sbatch --export=ALL,VENV=/path/to/venv ...
#
# One task per GPU, as JAX expects under SLURM: it gives task i of a node (SLURM_LOCALID) GPU i among those the task sees, so
# every task must see all GPUs of its node. That is --gres with --ntasks-per-node; not --gpus-per-task or --gpu-bind, which
# hide the others. Change the next two lines together when your nodes have another number of GPUs.
#SBATCH --gres=gpu:8
#SBATCH --ntasks-per-node=8
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --job-name=llama_jax
#SBATCH --output=%x-%j.log
# After a failed node or a preemption the job is queued again under the same number: the log goes on, and a program that keeps
# its state in a work directory goes on from there. Nothing here has to be cleaned up first.
#SBATCH --open-mode=append
#SBATCH --requeue
# A minute or two before the time is up every task gets SIGTERM.
#SBATCH --signal=TERM@60
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no program: sbatch launch/slurm.sh python -m infer.sample ..."
[ -n "${SLURM_JOB_ID:-}" ] || fail "not in a SLURM job: sbatch launch/slurm.sh $*"
cd "${SLURM_SUBMIT_DIR:-.}" # SLURM runs a copy of this script, so its own place says nothing
[ -d infer ] || fail "$PWD is not the repository: submit from there"
VENV=${VENV:-$PWD/.venv}
[ -x "$VENV/bin/python" ] || fail "no environment in $VENV: make sample makes it, or --export=ALL,VENV=DIR names another"
tasks=${SLURM_NTASKS_PER_NODE:-}
gpus=${SLURM_GPUS_ON_NODE:-}
if [ -n "$tasks" ] && [ -n "$gpus" ] && [ "$tasks" != "$gpus" ]; then
    fail "$tasks tasks for $gpus GPUs a node: one task per GPU, --gres=gpu:$gpus --ntasks-per-node=$gpus"
fi
export PATH="$VENV/bin:$PATH"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch since SLURM 22.05
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}     # without this a node with a broken driver computes on its CPU
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Where NCCL picks the wrong network, or none:
#   export NCCL_SOCKET_IFNAME=ib0  # the interface of the node's address, see `ip -br address`
#   export NCCL_IB_HCA=mlx5        # the InfiniBand adapters, see `ibv_devices`
# JAX takes the first node as coordinator and a port from the job's number (61440 to 65535); JAX_COORDINATOR_PORT names another.
echo "job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, start number $((${SLURM_RESTART_COUNT:-0} + 1)): $*" >&2
# A task that dies ends them all. The exit code is the highest of theirs: its own, or 137 and the like when others were killed.
exec srun --kill-on-bad-exit=1 "$@"
