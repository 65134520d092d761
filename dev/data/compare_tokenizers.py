#!/usr/bin/env python3
"""Our GPT-2 encodings beside those of tiktoken and Hugging Face's tokenizers (pip install tiktoken tokenizers): the same ids, and speeds.

  compare_tokenizers.py --tokenizer tokenizer.json [--program build/cpu/train_gca] TEXT...

Each text is encoded once, cold, by one thread. Ours is `train_gca tokenize --threads 1`, reading and writing included. Bytes that are
no UTF-8 are made U+FFFD first, since the others take strings only. Ends with 1 if any id differs.
"""
import argparse
import array
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import tiktoken
import tokenizers

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = 50256


def tiktoken_gpt2(path):
  printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
  bytes_of = {chr(byte): byte for byte in printing}
  bytes_of.update({chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printing)})
  with open(path, encoding="utf-8") as file:
    vocab = json.load(file)["model"]["vocab"]
  ranks = {bytes(bytes_of[c] for c in token): i for token, i in vocab.items() if i < END_OF_TEXT}
  return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": END_OF_TEXT})


def timed(call):
  start = time.perf_counter()
  result = call()
  return result, time.perf_counter() - start


def ours(program, tokenizer, text):
  with tempfile.TemporaryDirectory() as folder:
    path, prefix = os.path.join(folder, "text"), os.path.join(folder, "x")
    with open(path, "wb") as file:
      file.write(text)
    command = [program, "tokenize", "--tokenizer", tokenizer, "--threads", "1", "--val", "0", "--out", prefix, path]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
      sys.exit(run.stderr)
    ids = array.array("H")
    for name in sorted(os.listdir(folder)):
      if name.endswith(".bin"):
        with open(os.path.join(folder, name), "rb") as file:
          ids.frombytes(file.read()[1024:])
    return ids[1:].tolist(), float(re.search(r"([\d.]+) MB/s", run.stdout).group(1))  # the first is end-of-text


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--program", default="build/cpu/train_gca")
  parser.add_argument("texts", nargs="+", metavar="TEXT")
  options = parser.parse_args()
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  peers = {"tiktoken": tiktoken_gpt2(options.tokenizer).encode_ordinary}
  huggingface = tokenizers.Tokenizer.from_file(options.tokenizer)
  peers["tokenizers"] = lambda text: huggingface.encode(text).ids
  same = True
  for path in options.texts:
    with open(path, "rb") as file:
      text = file.read().decode("utf-8", errors="replace").replace("<|endoftext|>", "<|end of text|>")
    size = len(text.encode()) / 1e6
    ids, speed = ours(options.program, options.tokenizer, text.encode())
    line = f"{path}: {size:.1f} MB, {len(ids)} ids; ours {speed:.1f} MB/s"
    for name, encode in peers.items():
      theirs, seconds = timed(lambda: encode(text))
      same = same and theirs == ids
      line += f"; {name} {size / seconds:.1f} MB/s, {'the same ids' if theirs == ids else 'OTHER IDS'}"
    print(line, flush=True)
  sys.exit(0 if same else 1)


main()
