#!/bin/sh
# Retrieval on real text, from nothing, on one GPU: a DRT, which learns to read with all chunks fetched, then to weigh them, then to
# choose in longer rows, and a sliding window alone with as much time; what the DRT's picks are worth beside others, with 1, 4 and 16 times
# the past, on the second half of rows; what the DRT is ahead by, row by row; the loss of all by position, and in training by time. Writes tables and drawings into the folder (runs/text).
# dev/recipes/text.sh [FOLDER]      paths are relative to the repository, and without blanks; FOLDER keeps its tokens, trainings are made anew
#   TRAIN_GCA   the program [./train_gca]    DATA   where the text lies [data]    TEXT   what dev/data/prepare.py makes by that name, or a folder of text, what is in its val/ to validate [linux]; 16 rows of CHUNKS chunks of that at least
#   EACH        seconds of the window's training, and of the DRT's three together, 3/8, 1/4 and 3/8 [320]    SEED   the first [1]
#   VOCAB       of the BPE learned from the text [8192]    ROWS   validation rows at most [128]    SIZES   of all models
#   CHUNKS, BATCH   the window's chunks a row [64], rows a step [10]; the DRT takes about as many slots a step, a row at least    TOPK   chunks fetched, 32 at most [32]
#   WINDOW   of the DRT's first two trainings [128]    LAST_WINDOW   of its third, and of the sliding window alone: half of the window's rows at most [640]    DEVICE   its flags    TIMED   steps timed first [40]
#   WARMUP      steps of the window's and of the DRT's first training: with 63 of them no reader formed (dev/LOG.md) [400]
#   WEIGH       flags of the DRT's second training beside the recipe's [--score-gradient 32]    CHOOSE   of its third [WEIGH and --noise off]
set -e
cd "$(dirname "$0")/../.."
T=${TRAIN_GCA:-./train_gca} DATA=${DATA:-data} TEXT=${TEXT:-linux} EACH=${EACH:-320} SEED=${SEED:-1} ROWS=${ROWS:-128}
DEVICE=${DEVICE:---device cuda --precision bf16}
OUT=${1:-runs/text}
mkdir -p "$OUT"
refuse() { echo "text.sh: $1" >&2 && exit 1; }
whole() { case $2 in '' | *[!0-9]* | 0?*) refuse "$1: expected a whole number from $3, found '$2'" ;; esac; [ "$2" -ge "$3" ] || refuse "$1: expected a whole number from $3, found $2"; }
SIZES=${SIZES:---width 384 --heads 6 --ffn 1024 --chunk 64}
WARMUP=${WARMUP:-400} WEIGH=${WEIGH---score-gradient 32} TIMED=${TIMED:-40}
CHOOSE=${CHOOSE-$WEIGH --noise off}
CHUNKS=${CHUNKS:-64} BATCH=${BATCH:-10} TOPK=${TOPK:-32} WINDOW=${WINDOW:-128} LAST_WINDOW=${LAST_WINDOW:-640}  # rows of 4,096 slots, 40,960 a step
whole EACH "$EACH" 6 && whole SEED "$SEED" 0 && whole ROWS "$ROWS" 1 && whole TIMED "$TIMED" 4
whole CHUNKS "$CHUNKS" 2 && whole BATCH "$BATCH" 1 && whole TOPK "$TOPK" 1 && whole WINDOW "$WINDOW" 1 && whole LAST_WINDOW "$LAST_WINDOW" "$WINDOW"
slots=$((CHUNKS * $(echo "$SIZES --chunk 64" | sed 's/.*--chunk  *\([0-9]*\).*--chunk 64$/\1/; s/.*--chunk //')))
[ $((2 * LAST_WINDOW)) -le "$slots" ] || refuse "LAST_WINDOW: expected half of a row of $slots slots at most, or nothing lies beyond it, found $LAST_WINDOW"
made_of="${TEXT}, ${VOCAB:-8192} ids"
held=$(cat "$OUT/made_of" 2>/dev/null || echo "a text that it does not name")
if [ -f "$OUT/bpe.bin" ] && [ "$held" != "$made_of" ]; then
  refuse "$OUT holds tokens of $held, asked for are those of $made_of: name another folder"
fi
if [ ! -d "$TEXT" ]; then
  [ -d "$DATA/$TEXT" ] || python3 dev/data/prepare.py "$TEXT" --out "$DATA"
  TEXT=$DATA/$TEXT
fi
echo "$made_of" > "$OUT/made_of"
[ -f "$OUT/bpe.bin" ] || $T tokenizer-train --vocab-size "${VOCAB:-8192}" --out "$OUT/bpe.bin" "$TEXT"
[ -f "$OUT/tokens_val_000000.bin" ] || $T tokenize --tokenizer "$OUT/bpe.bin" --out "$OUT/tokens" "$TEXT"
COMMON="$SIZES --data $OUT/tokens_train_*.bin --tokenizer $OUT/bpe.bin $DEVICE"
# At first all chunks are fetched, in rows of two more than that, and about as many slots a step. Scores learn faster than the rest only when
# a model reads: from the start they fell together. In the end rows are four times as long as the window's: with 8 chunks in rows of 64 the
# newest were better than picks with 16 times the past, and the window larger: beside one of 640 no reader forms, and a formed one stays
# (dev/LOG.md). Seeds differ, or a training would read the rows of the one before again.
rows_of() { n=$(((BATCH * CHUNKS + $1 / 2) / $1)) && echo $((n ? n : 1)); }  # rows of so many chunks with about the slots of the window's

# train_for SECONDS NAME FLAG...: as many steps as fit into the time, by the median of some that are timed before.
train_for() {
  seconds=$1 name=$2 && shift 2
  rm -rf "$OUT/$name.timing" "$OUT/$name"
  $T train $COMMON --out "$OUT/$name.timing" --steps "$TIMED" --print-every 0 --save-every 0 "$@" > "$OUT/$name.timing.txt"
  steps=$(python3 -c "import json, statistics, sys; ms = [json.loads(line)['ms'] for line in open(sys.argv[1])]; print(max(1, int($seconds * 1e3 / statistics.median(ms[len(ms) // 4:]))))" "$OUT/$name.timing/log.jsonl")
  rm -rf "$OUT/$name.timing"
  $T train $COMMON --out "$OUT/$name" --steps "$steps" --print-every 100 --save-every 0 "$@"
  python3 -c "import json, sys; print('$name: $steps steps,', round(sum(json.loads(line).get('ms', 0) for line in open(sys.argv[1])) / 1e3, 1), 's')" "$OUT/$name/log.jsonl"
}
MODEL="--lower 3 --groups 3 --encoder 1 --topk $TOPK"
ALL="--window $WINDOW --chunks $((TOPK + 2)) --batch $(rows_of $((TOPK + 2)))"
LONG="--window $LAST_WINDOW --chunks $((4 * CHUNKS)) --batch $(rows_of $((4 * CHUNKS)))"
# The same tokens for all: the second half of rows as long as the window's in training, then with more before them.
judge() {
  name=$1 rows=$2 && shift 2
  rm -f "$OUT/$name.jsonl"
  $T eval --checkpoint "$OUT/$name" $DEVICE --data "$OUT/tokens_val_*.bin" --rows "$rows" --chunks "$CHUNKS" --score-last $((CHUNKS / 2)) --past 1,4,16 --by-reach --out "$OUT/$name.jsonl" "$@" > "$OUT/$name.txt"
}
# What would stop it in the end stops it now: a step of the DRT's three trainings, and one row judged.
ALL_PICKS="--against random,latest,newest,lexical,hindsight,noisy,equal,none"
read_flags="$MODEL $ALL --lr 2e-3 --lr-final 1.9e-3 --warmup $WARMUP" weigh_flags="$MODEL $ALL --lr 1.9e-3 --lr-final 1.8e-3 --warmup 20 $WEIGH" choose_flags="$MODEL $LONG --lr 1.8e-3 --lr-final 2e-4 --warmup 20 $CHOOSE"
for flags in "$read_flags" "$weigh_flags" "$choose_flags"; do
  rm -rf "$OUT/trial"
  $T train $COMMON --out "$OUT/trial" --steps 1 --save-every 0 $flags > "$OUT/trial.timing.txt"
done
judge trial 1 $ALL_PICKS || refuse "no row could be judged (above): text to validate lies in $TEXT/val, 16 rows of $slots slots at least; with another text name another folder than $OUT"
rm -rf "$OUT"/trial* "$OUT"/*.positions.txt
train_for "$EACH" window --seed "$SEED" --chunks "$CHUNKS" --batch "$BATCH" --lower 7 --groups '' --window "$LAST_WINDOW" --lr 2e-3 --warmup "$WARMUP"
train_for "$EACH * 3 / 8" drt.read --seed "$SEED" $read_flags
train_for "$EACH / 4" drt.weigh --seed $((SEED + 1000)) --init "$OUT/drt.read" $weigh_flags
train_for "$EACH * 3 / 8" drt --seed $((SEED + 2000)) --init "$OUT/drt.weigh" $choose_flags
judge window "$ROWS"
judge drt "$ROWS" $ALL_PICKS
cat "$OUT/window.txt" "$OUT/drt.txt"
echo "A: the DRT, B: the sliding window alone"
python3 dev/compare_rows.py "$OUT/drt.jsonl" "$OUT/window.jsonl"
# Loss by position, in rows of four times the length.
position() {
  $T eval --checkpoint "$OUT/$1" $DEVICE --data "$OUT/tokens_val_*.bin" --rows $((ROWS / 4 + 1)) --chunks $((4 * CHUNKS)) --picks "$2" > "$OUT/$1.$2.positions.txt"
}
position window learned
for picks in learned random latest none; do position drt $picks; done
python3 dev/plot_positions.py --out "$OUT/positions.svg" "$OUT"/*.positions.txt
python3 dev/plot_time.py --out "$OUT/time.svg" "sliding window alone=$OUT/window" "DRT: reads, weighs, chooses=$OUT/drt.read+$OUT/drt.weigh+$OUT/drt"
