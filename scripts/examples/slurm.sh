#!/usr/bin/env bash
# Trains a tokenizer on all GPUs of one or more nodes. A job that is stopped or runs out of time is queued again and resumes.
#
#   sbatch --nodes 1 scripts/examples/slurm.sh runs/mine --dataset path/to/images --eval-fraction 0.1
#   sbatch --nodes 4 scripts/examples/slurm.sh runs/imagenet --config imagenet_f16_4heads --dataset path/to/imagenet
#
# The output folder, on a disk that all nodes share, and then what `optvq train` takes.
#SBATCH --job-name=optvq
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# 5 minutes before the end all processes are asked to stop, and write a checkpoint.
#SBATCH --signal=TERM@300
set -euo pipefail

export OUTPUT_DIR="$1"
shift
# One process per GPU, which finds the others by these, as under torchrun.
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE="$SLURM_NTASKS" LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"

srun bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m optvq_hf.commands.train \
    --output-dir "$OUTPUT_DIR" --resume auto --save-every 1000 --mixed-precision bf16 --channels-last true --num-workers 6 \
    "$@"' optvq "$@"

if [[ ! -e "$OUTPUT_DIR/metrics.json" ]]; then # which a finished run has
    scontrol requeue "$SLURM_JOB_ID"
fi
