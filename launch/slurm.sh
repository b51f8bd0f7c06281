#!/usr/bin/env bash
# Hosts with NVIDIA GPUs under Slurm, from the repository's root: sbatch launch/slurm.sh CONFIG --output DIR ...
# Options before the script replace those below, such as: sbatch --nodes 4 --gpus-per-node 4 --time 8:00:00 launch/...
# The repository, its environment and DIR must be on storage that all hosts share.
# Two minutes before the time limit Slurm sends SIGTERM to the step's processes (only B: would send it to this script
# instead): the run saves and ends. Submitted again, the same command continues, as it does when Slurm requeues the job.
#SBATCH --job-name=ernie-jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"  # in a job, BASH_SOURCE is Slurm's copy of this file
. launch/environment.sh
usage "$@"
[[ " $* " != *" --fresh "* ]] || fail "launch: --fresh would start anew at every restart; name a new --output instead"
install "[cuda]"
# One process drives all GPUs of its host. JAX must be told: under Slurm it assumes one process for each GPU.
devices=$(seq -s, 0 $((${SLURM_GPUS_ON_NODE:-8} - 1)))
run srun env JAX_LOCAL_DEVICE_IDS="$devices" ernie-jax run "$@" --multihost
