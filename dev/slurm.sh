#!/bin/sh
# Training on two hosts of eight GPUs each, a task a GPU: sbatch dev/slurm.sh. Submitted again it goes on from the newest checkpoint.
# It saves at TERM, USR1, USR2 or XCPU, here two minutes before its time is up.
#SBATCH --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8
#SBATCH --time=24:00:00 --signal=TERM@120
export GCA_PORT=$((20000 + SLURM_JOB_ID % 20000))
RUN=runs/drt
if [ -d "$RUN" ]; then set -- --resume
else set -- --model drt --precision bf16 --chunks 260 --batch 32 --tokens 10G --data 'data/shards/train_*' --tokenizer data/tokenizer.json; fi
exec srun --kill-on-bad-exit=1 ./train_gca train --device cuda --out "$RUN" "$@"
