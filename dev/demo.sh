#!/bin/sh
# make demo: a small DRT learns, from nothing, to find needles in this project's own sources; then it looks for them in texts of up to 64
# times the length that it was trained on. SEED=n for another run, THREADS=n for fewer or more than all processors.
set -e
cd "$(dirname "$0")/.."
T=build/cpu/train_gca
RUN=runs/demo
TEXT='README.md,*.h,*.cu,*.cuh,runtime,tokenizer,kernels,dev/test'
rm -rf "$RUN"
$T train --task recall --haystack "$TEXT" --value-tokens 3 --out "$RUN" --seed "${SEED:-1}" --threads "${THREADS:-0}" --print-every 100 --save-every 100000 \
  --width 64 --heads 4 --ffn 128 --lower 1 --groups 1 --encoder 1 --chunk 16 --topk 8 --window 16 \
  --curriculum 5,10,20 --needles 8 --questions 8 --promote 0.9 --answer-weight 5 --batch 32 --steps 3000 --lr 3e-3 --warmup 50
find_needles() { $T passkey --checkpoint "$RUN" --threads "${THREADS:-0}" --length 320,1280,5120,20K --trials 100,100,100,50 --far-only --out "$RUN/passkey.jsonl" "$@"; }
echo
echo "Needles at 1, 4, 16 and 64 times the length of the last stage of training:"
find_needles --show 1
echo
echo "The same trials with random chunks fetched, and with none: what chance gives."
find_needles --random-retrieval
find_needles --no-retrieval
