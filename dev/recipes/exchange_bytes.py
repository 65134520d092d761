#!/usr/bin/env python3
"""Text with its bytes exchanged, for a model of bytes that shall be asked about text of another kind than it was trained on: in every
stretch each byte stands for another one. Words and lines stay words and lines, and no byte is new to the model.

  exchange_bytes.py TEXT... --out FILE [--stretches 512] [--bytes 16384] [--seed 1]

The stretches lie evenly in the texts, one after the other. The same arguments give the same file.
"""
import argparse
import random


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("text", nargs="+")
  parser.add_argument("--out", required=True)
  parser.add_argument("--stretches", type=int, default=512)
  parser.add_argument("--bytes", type=int, default=16384)
  parser.add_argument("--seed", type=int, default=1)
  options = parser.parse_args()
  text = b""
  for path in options.text:
    with open(path, "rb") as file:
      text += file.read()
  if options.stretches < 1 or len(text) < options.bytes:
    raise SystemExit(f"expected a stretch or more and texts of at least {options.bytes} bytes, found {options.stretches} and {len(text)}")
  draws = random.Random(options.seed)
  with open(options.out, "wb") as file:
    for stretch in range(options.stretches):
      order = list(range(1, 256))  # a zero byte would be no text
      draws.shuffle(order)
      begin = (len(text) - options.bytes) * stretch // max(1, options.stretches - 1)
      file.write(text[begin:begin + options.bytes].translate(bytes([0] + order)))


if __name__ == "__main__":
  main()
