#!/usr/bin/env python3
"""Training loss against the seconds of training, by factors of two: a table in Markdown, and with --out a figure (SVG).
A curve is NAME=RUN or, for trainings that followed each other, NAME=RUN+RUN+RUN; each point the mean of the steps since the one before."""
import argparse
import json
import os
import sys

from plot_needles import COLOURS, svg_axes, svg_legend

UNITS = 64  # of a second: the axis counts in whole numbers
FIRST, A_DOUBLING = 8, 8  # seconds before the first point; points for twice the time


def read(runs):
  """-> [(seconds, mean loss of the steps since the point before)]."""
  points, seconds, losses, end = [], 0.0, [], float(FIRST)
  for run in runs.split("+"):
    with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as file:
      for line in file:
        step = json.loads(line)
        if "ms" not in step:
          continue  # a validation
        seconds += step["ms"] / 1e3
        losses.append(step["loss"])
        if seconds >= end:
          points.append((seconds, sum(losses) / len(losses)))
          losses, end = [], end * 2 ** (1 / A_DOUBLING)
  if losses:
    points.append((seconds, sum(losses) / len(losses)))
  if not points:
    sys.exit(f"plot_time.py: {runs}: expected lines of steps, with ms and loss, found none")
  return points


def doublings(curves):
  marks = [FIRST]
  while marks[-1] < max(seconds for _, points in curves for seconds, _ in points):
    marks.append(marks[-1] * 2)
  return marks


def table(curves):
  """The loss at each doubling of the time: of the last point before it."""
  lines = ["| seconds | " + " | ".join(name for name, _ in curves) + " |", "|---" * (len(curves) + 1) + "|"]
  for mark in doublings(curves)[1:]:
    cells = [[loss for seconds, loss in points if mark / 2 < seconds <= mark][-1:] for _, points in curves]
    lines.append(f"| {mark} | " + " | ".join(f"{cell[0]:.3f}" if cell else "" for cell in cells) + " |")
  return "\n".join(lines)


def figure(curves):
  losses = [loss for _, points in curves for seconds, loss in points]
  low, high = min(losses), min(max(losses), min(losses) + 2)  # what lies above is cut off: the beginning is of no interest
  marks = [(mark * UNITS, f"{mark} s") for mark in doublings(curves)]
  out, x, y = svg_axes(marks, [low + (high - low) * i / 4 for i in range(5)], "{:.2f}", "seconds of training", len(curves))
  for i, (_, points) in enumerate(curves):
    corners = " ".join(f"{x(int(seconds * UNITS)):.1f},{y(min(loss, high)):.1f}" for seconds, loss in points)
    out.append(f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2" points="{corners}"/>')
  return "\n".join(out + svg_legend([name for name, _ in curves]) + ["</svg>\n"])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("curves", nargs="+", metavar="NAME=RUN[+RUN...]", help="folders of runs")
  parser.add_argument("--out", metavar="SVG", help="the figure")
  options = parser.parse_args()
  try:
    curves = [(name, read(runs)) for name, _, runs in (curve.rpartition("=") for curve in options.curves)]
    print(table(curves))
    if options.out:
      with open(options.out + ".partial", "w", encoding="utf-8") as file:
        file.write(figure(curves))
      os.replace(options.out + ".partial", options.out)
  except (OSError, ValueError, KeyError, TypeError) as error:
    sys.exit(f"plot_time.py: {type(error).__name__}: {error}")


if __name__ == "__main__":
  main()
