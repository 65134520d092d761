#!/bin/sh
# Two hops, from nothing, on one GPU: A leads to B, B to C; C must be found. With two chains all their statements fit into one retrieval of K chunks: two look-ups. With twelve, and a chunk between question
# and answer, the second retrieval needs what the first one fetched: one group of upper layers cannot do it but by luck.
# dev/recipes/two_hop.sh [FOLDER]; recipe.sh tells the rest of what may be given.
. "$(dirname "$0")/recipe.sh"
OUT=${1:-runs/two_hop}
mkdir -p "$OUT"
# Names and values of two letters. First recall, until retrieval tells one name from another; then with a chunk between question and answer; then two hops. There are as many chains as fit from the first row on, and all are
# asked for: with two or three, or without the gap, all statements can be fetched at once, a model learns to do that, and no second retrieval comes of it later (dev/LOG.md).
learn() {
  name=$1 groups=$2
  recall='--task recall --name-tokens 2 --value-tokens 2 --lr 1.5e-3'
  train "$OUT/$name.recall" --groups "$groups" $recall --curriculum 10,24,64,256 --batch 256 --needles 12,12,20 --questions 12,12,20 --lr-final 1e-3 --steps 3000 --seed 1
  train "$OUT/$name.gap" --groups "$groups" --init "$OUT/$name.recall" $recall --gap 1 --curriculum 24,64,256 --batch 107 --needles 12,20 --questions 12,20 --lr-final 1e-3 --steps 1000 --seed 2
  train "$OUT/$name" --groups "$groups" --init "$OUT/$name.gap" --task two-hop --value-tokens 2 --gap 1 --curriculum 10,14,20,28,40,64,128,256 --promote 0.9 --batch 256 --needles 12 --questions 12 \
    --lr 1.5e-3 --steps "${STEPS:-6000}" --seed 3
  export_run "$OUT/$name" "$OUT/$name.safetensors"
}
learn two_groups 1,2
learn one_group 3
for name in two_groups one_group; do
  find_needles "$OUT/$name.jsonl" "$OUT/$name.safetensors" --task two-hop --chains 2 --gap 1 --length 16K,64K,1M,4M --trials 100,100,100,20
  find_needles "$OUT/$name.12.jsonl" "$OUT/$name.safetensors" --task two-hop --chains 12 --gap 1 --length 16K,1M --trials 100
done
find_needles "$OUT/two_groups.jsonl" "$OUT/two_groups.safetensors" --task two-hop --chains 2 --gap 1 --length 16K,64K,1M --trials 100 --picks random
find_needles "$OUT/two_groups.jsonl" "$OUT/two_groups.safetensors" --task two-hop --chains 2 --gap 1 --length 16K,64K,1M --trials 100 --picks none
python3 dev/plot_needles.py --out "$OUT/two_hop.svg" "$OUT"/two_groups.jsonl "$OUT"/*.12.jsonl "$OUT"/one_group.jsonl | tee "$OUT/table.txt"
