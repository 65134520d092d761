#!/usr/bin/env python3
"""Loss curves of one or several runs, read from RUN/log.jsonl: in the terminal, or with --out an image (needs matplotlib).
Training loss is drawn with the run's letter (a, b, ...), averaged over each column; validation loss with the capital (A, B, ...)."""
import argparse
import json
import math
import os
import shutil
import sys

def read_log(run, letter, first_step):
  """-> [(label, letter, {step: loss})]: loss, val_loss, those there are. Of a step logged twice the later counts."""
  path = os.path.join(run, "log.jsonl") if os.path.isdir(run) else run
  curves, unread = {"loss": {}, "val_loss": {}}, 0
  with open(path, encoding="utf-8", errors="replace") as file:
    for line in file:
      try:
        entry = json.loads(line)
        for name, curve in curves.items():
          if entry.get(name) is not None and math.isfinite(entry[name]) and int(entry["step"]) >= first_step:
            curve[int(entry["step"])] = float(entry[name])
      except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        unread += bool(line.strip())  # the last line of a killed run may be cut
  if unread:
    print(f"{path}: left out {unread} lines that hold no JSON object with a step and a loss", file=sys.stderr)
  if not any(curves.values()):
    sys.exit(f'{path}: no finite loss from step {first_step} on; expected lines like {{"step": 1, "loss": 10.8, "val_loss": 10.7}}')
  marks = {"loss": letter, "val_loss": letter.upper()}
  return [(f"{run} {name}", marks[name], curve) for name, curve in curves.items() if curve]

def draw_text(curves, columns, rows):
  first, last = (end(step for _, _, curve in curves for step in curve) for end in (min, max))
  low, high = (end(loss for _, _, curve in curves for loss in curve.values()) for end in (min, max))
  canvas = [[" "] * columns for _ in range(rows)]
  for _, mark, curve in curves:
    bins = {}
    for step, loss in curve.items():
      bins.setdefault((step - first) * (columns - 1) // max(1, last - first), []).append(loss)
    for column, losses in bins.items():
      height = (sum(losses) / len(losses) - low) / ((high - low) or 1)
      canvas[round((1 - height) * (rows - 1))][column] = mark
  for row, line in enumerate(canvas):
    print(f"{high - (high - low) * row / (rows - 1):9.4f} |{''.join(line).rstrip()}")
  print(f"{'':10}+{'-' * columns}\n{'step':>9}  {first}{last:>{columns - len(str(first))}}")
  for label, mark, curve in curves:
    print(f"{mark} {label}: {curve[max(curve)]:.4f} at step {max(curve)}, lowest {min(curve.values()):.4f}")

def draw_image(curves, path):
  import matplotlib
  matplotlib.use("Agg")  # no display needed
  from matplotlib import pyplot
  for label, mark, curve in curves:
    look = dict(color=f"C{ord(mark.lower()) - ord('a')}", markersize=3, linewidth=1, label=label)
    pyplot.plot(*zip(*sorted(curve.items())), "-" if mark.islower() else "o--", **look)
  pyplot.gca().set(xlabel="step", ylabel="loss (nats a token)")
  pyplot.legend()
  pyplot.savefig(path, dpi=150)

def main():
  parser = argparse.ArgumentParser(description="Draws the loss curves of runs.")
  parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a log.jsonl; 26 at most")
  parser.add_argument("--out", metavar="FILE", help="image to write (.png, .svg, .pdf) instead of text")
  parser.add_argument("--from", dest="first_step", type=int, default=0, metavar="STEP", help="leave out what comes before (default 0)")
  args = parser.parse_args()
  if len(args.runs) > 26:
    parser.error(f"{len(args.runs)} runs, but one letter each: 26 at most")
  try:
    curves = [curve for index, run in enumerate(args.runs) for curve in read_log(run, chr(ord("a") + index), args.first_step)]
    if args.out:
      draw_image(curves, args.out)
    else:
      draw_text(curves, max(20, min(160, shutil.get_terminal_size().columns - 12)), 20)
  except ImportError:
    sys.exit("--out needs matplotlib: apt-get install python3-matplotlib, or leave --out away for curves in the terminal")
  except (OSError, ValueError) as error:
    sys.exit(f"plot_log.py: {error}")

if __name__ == "__main__":
  main()
