#!/usr/bin/env bash
# One checkpoint a task of a SLURM array. The base is drawn once: tasks that need it wait for the one that draws it.
# A task that is started again skips what it has done.
#
#   MODELS="runs/nudity runs/church runs/van_gogh" TASK=i2p sbatch --array=0-2 eval/slurm_array.sh
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
set -euo pipefail
read -ra models <<<"${MODELS:?folders of the runs, separated by spaces}"
model=${models[${SLURM_ARRAY_TASK_ID:?start it with sbatch --array}]}
srun eval-concept run --model "$model" --task "${TASK:-i2p}" --output "${OUTPUT:-runs/evaluation}" "$@"
