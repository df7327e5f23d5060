#!/bin/bash
# As torchrun.sh, by `accelerate launch`, for who keeps its settings in a file of `accelerate config`:
#   sbatch examples/slurm/accelerate.sh --data /data/mimic-288 --config recommended --out /runs/first
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
# accelerate passes on TERM, and not USR1. Without --multi_gpu, a host with one GPU or none would train alone.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
per_node=${PROCESSES_PER_NODE:-4}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110  # s to end a step and save, before it kills; its own default is 30
srun bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate \
  --multi_gpu --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * per_node))" \
  --rdzv_backend static --same_network --main_process_ip "$first" --main_process_port "${PORT:-29500}" \
  --mixed_precision no --dynamo_backend no \
  -m mmclip pretrain "$@" --resume &
step=$!
trap 'trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID.0"; wait "$step" || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
wait "$step"
