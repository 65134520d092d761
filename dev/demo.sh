#!/bin/sh
# make demo: trains a small model on real text and lets it write. The text is six novels (a Debian package of 1.6 MB); where that cannot
# be had, this project's own sources.
set -e
cd "$(dirname "$0")/.."
T=build/cpu/train_gca
RUN=runs/demo
if [ -d data/austen ] || python3 dev/data/prepare.py austen; then TEXT=data/austen PROMPT="It was"
else
  echo "no novels to be had here: training on this project's sources instead"
  TEXT=$(ls ./*.h ./*.cu ./*.md runtime/*.h tokenizer/*.h dev/test/*.cpp) PROMPT="template <"
fi
rm -rf "$RUN"
$T tokenize --out "$RUN/shards/demo" $TEXT
$T train --model tiny --data "$RUN/shards/demo_train_*" --val-data "$RUN/shards/demo_val_*" --out "$RUN/run" --batch 8 --steps 600 --lr 3e-3 --eval-every 200
echo
echo "A sample (train_gca generate --checkpoint $RUN/run --prompt '$PROMPT'):"
$T generate --checkpoint "$RUN/run" --prompt "$PROMPT" --count 400
