#!/bin/bash
# Pre-trains on the GPUs of some nodes, and goes on in a new job where time ran out:
#   sbatch examples/slurm/torchrun.sh --data /data/mimic-288 --config recommended --out /runs/first
# Two minutes before the end SLURM sends USR1 to this script. It passes it on, all processes save the
# same step, and the job is queued again. A node that dies ends the job; SLURM queues it again too,
# and it goes on from the last checkpoint (train.save_every_steps).
#SBATCH --job-name=mmclip
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A rank for each node, and no c10d rendezvous, in which a node fails when the one that keeps the store ends first.
# By itself torchrun kills 30 s after a signal, and a large model may take longer to end its step and save.
srun bash -c 'exec torchrun --node-rank "$SLURM_NODEID" "$@"' torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES_PER_NODE:-4}" \
  --master-addr "$first" --master-port "${PORT:-29500}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 110 \
  -m mmclip pretrain "$@" --resume &
step=$!
trap 'trap "" USR1; scancel --signal=USR1 "$SLURM_JOB_ID.0"; wait "$step" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
wait "$step"
