#!/bin/sh
# A needle in sixteen million slots, from nothing, on one GPU: trains a DRT of 6.1M parameters on rows of up to 16K slots, exports it in bf16 (12 MB), and asks it for five letters that stand once in a
# text it has not read, beside 15 needles with other names. Writes the table and the figure into the folder (runs/needle).
# dev/recipes/needle.sh [FOLDER]; recipe.sh tells the rest of what may be given.
. "$(dirname "$0")/recipe.sh"
OUT=${1:-runs/needle}
mkdir -p "$OUT"
# recall: many questions a row teach what single rows ask once. The curriculum's stages end when 95% of the answers are right.
learn() {
  train "$@" --groups 3 --task recall --curriculum 10,24,64,256 --batch 256 --needles 3,6,12,20 --questions 3,6,12,20 --lr 1.5e-3 --steps "${STEPS:-4000}" --seed 1
}
learn "$OUT/run"
export_run "$OUT/run" "$OUT/needle.safetensors"
M=$OUT/needle.safetensors
single() { find_needles "$OUT/needle.jsonl" "$@"; }
single "$M" --others 15 --length 16K,64K,256K,1M,4M --trials 100,100,100,100,30
single "$M" --others 19 --length 16M --trials 5 --asks 20
single "$M" --others 19 --length 64M --trials 1 --asks 20
for picks in random none; do single "$M" --others 15 --length 16K,64K,256K,1M --trials 100 --picks $picks; done
find_needles "$OUT/random_values.jsonl" "$M" --others 15 --values random --length 16K,1M --trials 100
learn "$OUT/run_text" --style text
find_needles "$OUT/text.jsonl" "$OUT/run_text" --others 15 --length 16K,1M --trials 100
python3 dev/plot_needles.py --out "$OUT/needles.svg" "$OUT/needle.jsonl" "$OUT/random_values.jsonl" "$OUT/text.jsonl" | tee "$OUT/table.txt"
