#!/usr/bin/env python3
"""Accuracy against length, from the files that `passkey --out` writes: a table in Markdown, and with --out a figure (SVG, by hand: no library).
A curve for each file and each kind of retrieval in it; bars are the 95% intervals that the figures have. Of a length tried twice the later figures count."""
import argparse
import html
import json
import math
import os
import sys

FIELDS = ("slots", "trials", "haystacks", "exact", "exact_low", "exact_high", "hit", "chance", "margin", "needle_weight", "retrieval")
COLOURS = ("#1769aa", "#c4541a", "#2e7d32", "#7b3f9d", "#8a6d00", "#5f6b73")


def read(path):
  """-> {retrieval: {slots: figures}} of a file's lines of figures; its lines of trials are passed over."""
  curves = {}
  with open(path, encoding="utf-8", errors="replace") as file:
    for line in file:
      try:
        entry = json.loads(line)
      except ValueError:
        continue  # the last line of a process that was killed
      if isinstance(entry, dict) and all(name in entry for name in FIELDS):
        curves.setdefault(entry["retrieval"], {})[entry["slots"]] = entry
  if not curves:
    sys.exit(f"plot_needles.py: {path}: expected figures as passkey --out writes them (lines of JSON with {', '.join(FIELDS[:4])} ...), found none")
  return curves


def length(slots):
  for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
    if slots % unit == 0:
      return f"{slots // unit}{name}"
  return str(slots)


def table(curves):
  lines = ["| | slots | right | of | haystacks | 95% interval | its chunk fetched | weight | margin | by chance |", "|---|---|---|---|---|---|---|---|---|---|"]
  for label, points in curves:
    for slots, f in sorted(points.items()):
      margin = "" if f["margin"] is None else f"{f['margin']:.2f}"
      lines.append(f"| {label} | {length(slots)} | {round(f['exact'] * f['trials'])} | {f['trials']} | {f['haystacks']} | {100 * f['exact_low']:.1f} to {100 * f['exact_high']:.1f}% | "
                   f"{100 * f['hit']:.1f}% | {f['needle_weight']:.2f} | {margin} | {100 * f['chance']:.2g}% |")
  return "\n".join(lines)


LEFT, TOP, WIDTH, HEIGHT = 56, 20, 560, 300  # of a figure's axes


def svg_text(at_x, at_y, words, more=""):
  return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{html.escape(words)}</text>'


def svg_axes(slots, levels, level_format, words, curves):
  """The lines of an SVG that has axes, its functions x(slots), by factors of two, and y(level). slots: (number, name) of each mark; levels: the lowest first."""
  low = math.floor(math.log2(slots[0][0]))
  high = max(math.floor(math.log2(slots[-1][0])), low + 1)
  x = lambda at: LEFT + WIDTH * (math.log2(at) - low) / (high - low)
  y = lambda level: TOP + HEIGHT * (1 - (level - levels[0]) / ((levels[-1] - levels[0]) or 1))
  out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 24}" height="{TOP + HEIGHT + 50 + 18 * curves}" font-family="sans-serif" font-size="13">',
         '<rect width="100%" height="100%" fill="white"/>']
  for level in levels:
    out.append(f'<path d="M{LEFT} {y(level):.1f}h{WIDTH}" stroke="#ddd"/>' + svg_text(LEFT - 6, y(level) + 4, level_format.format(level), 'text-anchor="end"'))
  for at, name in slots:
    out.append(f'<path d="M{x(at):.1f} {TOP + HEIGHT}v5" stroke="#444"/>' + svg_text(x(at), TOP + HEIGHT + 20, name, 'text-anchor="middle"'))
  return out + [svg_text(LEFT + WIDTH / 2, TOP + HEIGHT + 38, words, 'text-anchor="middle"')], x, y


def svg_legend(labels):
  lines = []
  for i, label in enumerate(labels):
    at_y = TOP + HEIGHT + 56 + 18 * i
    lines.append(f'<path d="M{LEFT} {at_y - 4}h24" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2"/>' + svg_text(LEFT + 32, at_y, label))
  return lines


def svg_line(i, places):
  """Curve i through places (x, y) of the figure."""
  corners = " ".join(f"{at_x:.1f},{at_y:.1f}" for at_x, at_y in places)
  return f'<polyline fill="none" stroke="{COLOURS[i % len(COLOURS)]}" stroke-width="2" points="{corners}"/>'


def svg_curves(curves, marks, low, high, words):
  """A figure of curves (name, [(at, loss)]) between losses low and high, without its end tag; marks: svg_axes' slots."""
  out, x, y = svg_axes(marks, [low + (high - low) * i / 4 for i in range(5)], "{:.2f}", words, len(curves))
  out += [svg_line(i, [(x(at), y(loss)) for at, loss in points]) for i, (_, points) in enumerate(curves)]
  return out + svg_legend([name for name, _ in curves])


def svg_write(path, lines):
  with open(path + ".partial", "w", encoding="utf-8") as file:
    file.write("\n".join(lines + ["</svg>\n"]))
  os.replace(path + ".partial", path)


def figure(curves):
  """The lines of the SVG: x by factors of two, y from 0 to 100%."""
  every = sorted({slots for _, points in curves for slots in points})
  out, x, y = svg_axes([(slots, length(slots)) for slots in every], (0, 0.25, 0.5, 0.75, 1), "{:.0%}", "slots", len(curves))
  for i, (label, points) in enumerate(curves):
    colour, ordered = COLOURS[i % len(COLOURS)], sorted(points.items())
    shift = 2.0 * (i - (len(curves) - 1) / 2)  # bars beside each other
    places = [(x(slots) + shift, f) for slots, f in ordered]
    out.append(svg_line(i, [(at, y(f["exact"])) for at, f in places]))
    for at, f in places:
      out.append(f'<path d="M{at:.1f} {y(f["exact_low"]):.1f}V{y(f["exact_high"]):.1f}" stroke="{colour}"/><circle cx="{at:.1f}" cy="{y(f["exact"]):.1f}" r="3.5" fill="{colour}"/>')
  return out + svg_legend([label for label, _ in curves])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("files", nargs="+", metavar="FILE", help="of passkey --out")
  parser.add_argument("--out", metavar="SVG", help="the figure")
  options = parser.parse_args()
  try:
    files = [(os.path.splitext(os.path.basename(path))[0], read(path)) for path in options.files]
    curves = [(f"{name}, {kind} picks" if kind != "none" else f"{name}, no retrieval", points) for name, kinds in files for kind, points in kinds.items()]
    print(table(curves))
    if options.out:
      svg_write(options.out, figure(curves))
  except OSError as error:
    sys.exit(f"plot_needles.py: {error}")


if __name__ == "__main__":
  main()
