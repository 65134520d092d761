# What the recipes of needles share; they source it. The text comes from Debian packages by name; what is in $DATA already stays.
#   TRAIN_GCA   the program [./train_gca]        DATA   where the text lies [data]        SEED   of trials [20263]
set -e
cd "$(dirname "$0")/../.."
T=${TRAIN_GCA:-./train_gca} DATA=${DATA:-data} SEED=${SEED:-20263}
for text in setmm austen hol-light linux; do
  [ -d "$DATA/$text" ] || python3 dev/data/prepare.py $text --out "$DATA"
done
# Read in training: CC0 and in the public domain. It lacks many bytes, tabs among them, and before a question a byte that training has not met hides it; so some of it comes again with its bytes exchanged.
# Looked through in trials: what training has not read.
[ -f "$DATA/exchanged.txt" ] || python3 dev/recipes/exchange_bytes.py "$DATA"/setmm/set.mm "$DATA"/austen/*.txt --out "$DATA/exchanged.txt"
TEXT="$DATA/setmm/set.mm,$DATA/austen/*.txt,$DATA/exchanged.txt"
HAYSTACK="$DATA/hol-light,$DATA/setmm/val"
for part in fs net kernel mm lib crypto security Documentation; do HAYSTACK="$HAYSTACK,$DATA/linux/$part"; done
MODEL='--width 256 --heads 4 --ffn 688 --lower 3 --encoder 1 --chunk 64 --topk 8 --window 128'  # upper layers: each recipe's own
DEVICE=${DEVICE:---device cuda --precision bf16}

# train RUN FLAG...: from random weights, or from --init's.
train() {
  run=$1 && shift
  rm -rf "$run"
  start=$(date +%s)
  $T train $MODEL $DEVICE --haystack "$TEXT" --out "$run" --print-every 100 --save-every 0 "$@"
  echo "$run: $(($(date +%s) - start)) s"
}
# export_run RUN FILE: what an earlier run left there is replaced.
export_run() {
  rm -f "$2"
  $T export --checkpoint "$1" --out "$2"
}
# find_needles FILE MODEL FLAG...: its trials and figures are appended to FILE; what FILE has already is not read again.
find_needles() {
  file=$1 model=$2 && shift 2
  $T passkey --checkpoint "$model" $DEVICE --haystack "$HAYSTACK" --far-only --seed "$SEED" --out "$file" "$@"
}
