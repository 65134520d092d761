#!/usr/bin/env python3
"""Training loss against the seconds of training, by factors of two: a table in Markdown, and with --out a figure (SVG).
A curve is NAME=RUN or, for trainings that followed each other, NAME=RUN+RUN+RUN; a point is the mean of the steps since the one before.
The figure begins where the loss comes within 2 nats of the lowest."""
import argparse
import json
import os
import sys

from plot_needles import svg_curves, svg_write

FIRST, A_DOUBLING = 1, 8  # seconds before the first point; points for twice the time


def read(runs):
  """-> [(seconds, mean loss of the steps since the point before)]."""
  points, seconds, losses, end = [], 0.0, [], float(FIRST)
  for run in runs.split("+"):
    with open(os.path.join(run, "log.jsonl"), encoding="utf-8") as file:
      for line in file:
        try:
          step = json.loads(line)
        except ValueError:
          continue  # the last line of a process that was killed
        if step.get("ms") is None or step.get("loss") is None:
          continue  # a validation, or a loss that is not finite
        seconds += step["ms"] / 1e3
        losses.append(step["loss"])
        if seconds >= end:
          points.append((seconds, sum(losses) / len(losses)))
          losses, end = [], end * 2 ** (1 / A_DOUBLING)
  if losses:
    points.append((seconds, sum(losses) / len(losses)))
  if seconds < 2 * FIRST:
    sys.exit(f"plot_time.py: {runs}: expected steps (lines of JSON with ms and loss) of {2 * FIRST} s at least, found {seconds:.1f} s")
  return points


def doublings(curves):
  times, marks = [seconds for _, points in curves for seconds, _ in points], [FIRST]
  while marks[-1] < max(times):
    marks.append(marks[-1] * 2)
  return [mark for mark in marks if mark * 2 > min(times)]


def table(curves):
  """The loss at each doubling of the time: of the last point before it; and at the end."""
  lines = ["| seconds | " + " | ".join(name for name, _ in curves) + " |", "|---" * (len(curves) + 1) + "|"]
  for mark in doublings(curves)[1:-1]:
    cells = [[loss for seconds, loss in points if mark / 2 < seconds <= mark][-1:] for _, points in curves]
    lines.append(f"| {mark} | " + " | ".join(f"{cell[0]:.3f}" if cell else "" for cell in cells) + " |")
  return "\n".join(lines + ["| end | " + " | ".join(f"{points[-1][1]:.3f} ({points[-1][0]:.0f} s)" for _, points in curves) + " |"])


def figure(curves):
  losses = [loss for _, points in curves for _, loss in points]
  low, high = min(losses), min(max(losses), min(losses) + 2)
  curves = [(name, [point for point in points if point[1] <= high]) for name, points in curves]
  return svg_curves(curves, [(mark, f"{mark} s") for mark in doublings(curves)], low, high, "seconds of training")


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("curves", nargs="+", metavar="NAME=RUN[+RUN...]", help="folders of runs")
  parser.add_argument("--out", metavar="SVG", help="the figure")
  options = parser.parse_args()
  if nameless := [curve for curve in options.curves if "=" not in curve]:
    parser.error(f"expected NAME=RUN, found '{nameless[0]}'")
  try:
    curves = [(name, read(runs)) for name, _, runs in (curve.rpartition("=") for curve in options.curves)]
    print(table(curves))
    if options.out:
      svg_write(options.out, figure(curves))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    sys.exit(f"plot_time.py: {type(error).__name__}: {error}")


if __name__ == "__main__":
  main()
