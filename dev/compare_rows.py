#!/usr/bin/env python3
"""Two models on the same rows, row by row: compare_rows.py A.jsonl B.jsonl, of `eval --past ... --out`, with --by-reach or without.
A table in Markdown of A's loss minus B's, of each one's own picks, with its standard error over rows (runtime/by_reach.h has the formula)."""
import json
import math
import sys

OWN = ("learned", "baseline")


def read(path):
  """-> {(past, class): the last line of a file with that}, in the file's order."""
  found = {}
  with open(path, encoding="utf-8") as file:
    for number, text in enumerate(file, 1):
      try:
        line = json.loads(text)
        key, own = (line["past"], line["class"]), line["retrieval"] in OWN
        line["row_losses"], line["scored_slots"], line["slots"]
      except (ValueError, KeyError, TypeError):
        sys.exit(f"compare_rows.py: {path}:{number}: expected a line of `eval --out` (past, class, retrieval, slots, scored_slots, row_losses), found {text[:60].strip()!r}")
      if own:
        found[key] = line
  if not found:
    sys.exit(f"compare_rows.py: {path}: expected lines of `eval --out` whose retrieval is learned or baseline, found none")
  return found


def difference(key, a, b):
  """-> mean, its standard error (None of a single row)."""
  rows = [row[:2] for row in a["row_losses"]]
  if rows != [row[:2] for row in b["row_losses"]] or a["scored_slots"] != b["scored_slots"]:
    sys.exit(f"compare_rows.py: past {key[0]}, class {key[1]}: expected the same rows and targets in both files; give both evals the same text, tokens, --rows, --chunks, --score-last and --past")
  parts = [(n, x[2] - y[2]) for (_, n), x, y in zip(rows, a["row_losses"], b["row_losses"]) if n]
  targets = sum(n for n, _ in parts)
  mean = sum(d for _, d in parts) / targets if targets else math.nan
  if len(parts) < 2:
    return mean, None
  return mean, math.sqrt(len(parts) / (len(parts) - 1) * sum((d - n * mean) ** 2 for n, d in parts)) / targets


def main():
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  try:
    a, b = map(read, sys.argv[1:])
  except OSError as error:
    sys.exit(f"compare_rows.py: {error}")
  both = [key for key in a if key in b]
  pasts, classes = ([*dict.fromkeys(key[i] for key in both)] for i in range(2))
  if not both:
    sys.exit("compare_rows.py: expected a past and a class that both files have, found none; give both evals the same --past")
  print("| loss of A minus B | " + " | ".join(f"rows of {a[past, classes[0]]['slots']:,} slots" for past in pasts) + " |", "|---" * (len(pasts) + 1) + "|", sep="\n")
  for name in classes:
    cells = []
    for past in pasts:
      mean, error = difference((past, name), a[past, name], b[past, name]) if (past, name) in both else (None, None)
      cells.append("" if mean is None else f"{mean:+.4f} ({'-' if error is None else f'{error:.4f}'})")
    print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
  main()
