#!/usr/bin/env bash
# One checkpoint a task of a SLURM array. The base is drawn once: tasks that need it wait for the one that draws it.
# A task that is started again skips what it has done.
#
#   MODELS="runs/nudity runs/church runs/van_gogh" TASK=i2p sbatch --array=0-2 eval/slurm_array.sh
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
set -euo pipefail
read -ra models <<<"${MODELS:?folders of the runs, separated by spaces}"
task=${SLURM_ARRAY_TASK_ID:?start it with sbatch --array}
if ((task >= ${#models[@]})); then
    echo "task $task of the array has no model: MODELS has ${#models[@]} folders, so start it with --array=0-$((${#models[@]} - 1))" >&2
    exit 2
fi
srun eval-concept run --model "${models[task]}" --task "${TASK:-i2p}" --output "${OUTPUT:-runs/evaluation}" "$@"
