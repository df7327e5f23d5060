#!/bin/bash
# Builds a data folder on 16 nodes at once, then joins the shards:
#   sbatch --wait examples/slurm/build.sh mimic-cxr-jpg --root /data/physionet --out /data/mimic-288 --image-size 288
#   mmclip data build mimic-cxr-jpg --root /data/physionet --out /data/mimic-288 --image-size 288
#SBATCH --job-name=mmclip-build
#SBATCH --array=1-16
#SBATCH --cpus-per-task=16
#SBATCH --mem=16G
#SBATCH --time=04:00:00
set -euo pipefail
mmclip data build "$@" --workers "$SLURM_CPUS_PER_TASK" --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
