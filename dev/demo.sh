#!/bin/sh
# make demo: a small DRT learns, from nothing, to find needles in this project's own text; then it looks for them in other files, in rows of
# up to 64 times the length that it was trained on. SEED=n: another run. THREADS=n: not all processors.
set -e
cd "$(dirname "$0")/.."
T=build/cpu/train_gca
RUN=runs/demo
rm -rf "$RUN"
$T train --task recall --haystack 'README.md,*.h,*.cu,base,cpu,commands,runtime,tokenizer' --value-tokens 3 --out "$RUN" --seed "${SEED:-1}" --threads "${THREADS:-0}" \
  --width 64 --heads 4 --ffn 128 --lower 1 --groups 1 --encoder 1 --chunk 16 --topk 8 --window 16 \
  --curriculum 5,10,20 --promote 0.9 --needles 8 --questions 8 --answer-weight 1 \
  --batch 32 --steps 2500 --lr 2e-3 --lr-final 1.5e-4 --warmup 50 --print-every 100 --save-every 100000
find_needles() {
  $T passkey --checkpoint "$RUN" --threads "${THREADS:-0}" --haystack 'kernels,dev/test' --length 320,1280,5120,20K --trials 100,100,100,50 \
    --far-only --out "$RUN/passkey.jsonl" "$@"
}
echo
echo "Needles in other files, in rows of 1, 4, 16 and 64 times the chunks of the last stage:"
find_needles --show 1
echo
echo "The same trials when random chunks are fetched, and when none are: what chance gives."
find_needles --random-retrieval
find_needles --no-retrieval
echo
echo "A row of needles as a page for a browser, each token coloured by what retrieval gains on it:"
$T inspect --checkpoint "$RUN" --threads "${THREADS:-0}" --haystack 'kernels,dev/test' --html "$RUN/page.html"
