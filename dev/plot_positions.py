#!/usr/bin/env python3
"""Loss by position in the row, from what `eval` printed into files NAME.positions.txt: a table in Markdown, and with --out a figure (SVG)."""
import argparse
import os
import re
import sys

from plot_needles import length, svg_curves, svg_write

LINE = re.compile(r"^  slots +(\d+)\.\.(\d+) +loss ([0-9.]+)$")


def read(path):
  """-> {last slot + 1 of a stretch: loss} of a file."""
  with open(path, encoding="utf-8") as file:
    points = {int(found[2]) + 1: float(found[3]) for found in map(LINE.match, file) if found}
  if not points:
    sys.exit(f"plot_positions.py: {path}: expected lines 'slots A..B loss X' as eval prints them, found none")
  return points


def table(curves):
  ends = sorted({end for _, points in curves for end in points})
  lines = ["| up to slot | " + " | ".join(name for name, _ in curves) + " |", "|---" * (len(curves) + 1) + "|"]
  return "\n".join(lines + [f"| {length(end)} | " + " | ".join(f"{points[end]:.4f}" if end in points else "" for _, points in curves) + " |" for end in ends])


def figure(curves):
  ends, losses = (sorted({value for _, points in curves for value in values(points)}) for values in (dict.keys, dict.values))
  return svg_curves([(name, sorted(points.items())) for name, points in curves], [(end, length(end)) for end in ends], losses[0], losses[-1], "slots before the end of a stretch")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("files", nargs="+", metavar="FILE", help="what eval printed")
  parser.add_argument("--out", metavar="SVG", help="the figure")
  options = parser.parse_args()
  try:
    curves = [(os.path.basename(path).removesuffix(".positions.txt"), read(path)) for path in options.files]
    print(table(curves))
    if options.out:
      svg_write(options.out, figure(curves))
  except OSError as error:
    sys.exit(f"plot_positions.py: {error}")


if __name__ == "__main__":
  main()
