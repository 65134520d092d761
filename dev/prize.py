#!/usr/bin/env python3
"""What fetching past chunks could be worth on a text, and which picks, before anything is trained: minutes on one core (numpy).

  prize.py PREFIX...    of shards as `train_gca tokenize --out PREFIX` writes them (16-bit tokens)

A Kneser-Ney n-gram model stands for the weights, caches of n-grams for what is read in the row: one over the last W slots, one over
K picked chunks that do not lie in the window. Their mixture is fitted on rows kept back from training, for every kind of picks by
itself, and scored on rows of validation text, second halves only. Picks as `eval` names them: random, newest, lexical (by words that
chunk c has, for chunk c+1), hindsight (by those of c+1: a ceiling of picks by words), and all past chunks. Random ones are drawn from
those that the others choose among. A trained model understands more than n-grams and gets less out of copies: compare columns and
texts, take no number as what a training will gain.
"""
import argparse
import glob
import sys
import time
import numpy as np

CHUNK = 64
TEXT = CHUNK - 1  # tokens of text a chunk; the landmark takes a slot of the window and is no token here
CONTEXTS = (0, 1, 2, 3, 5, 8)  # lengths of the contexts that a cache looks for
LEVELS = len(CONTEXTS)
KINDS = ("random", "newest", "lexical", "hindsight", "all")

def read_tokens(prefix, split):
  shards = []
  for path in sorted(glob.glob(f"{glob.escape(prefix)}_{split}_[0-9]*.bin")):
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
      sys.exit(f"{path}: expected a shard of 16-bit tokens (magic 20240520, version 1), found {header[:2].tolist()}")
    shards.append(np.fromfile(path, "<u2", header[2], offset=1024).astype(np.int32))
  return np.concatenate(shards) if shards else sys.exit(f"no shards {prefix}_{split}_000000.bin ...: write them with train_gca tokenize")

def keep_back(train):
  """-> text to count, text to fit the mixture on: every twentieth document, the last of fewer, the last twentieth of a single one."""
  starts = np.flatnonzero(train == train[0])  # a stream begins with the end-of-text token, and so does each document
  if len(starts) == 1:
    return np.split(train, [len(train) - len(train) // 20])
  document = np.cumsum(train == train[0]) - 1
  kept = document % 20 == 19 if len(starts) >= 20 else document == len(starts) - 1
  return train[~kept], train[kept]

def find(keys, values, wanted):
  """The value of each wanted key in a sorted table, 0 where it has none."""
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, values[at], 0)

class KneserNey:
  """Interpolated, one discount an order: c(w h) is how often at the highest order, below it after how many words. N-grams are 64-bit hashes."""

  def __init__(self, tokens, order, seed):
    self.vocab = int(tokens.max()) + 1
    self.factors = np.random.default_rng(seed).integers(1, 2**63, order, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    grams, at, self.tables = self.hashes(tokens), None, []
    for n in range(order, 0, -1):
      if at is None:
        keys, at, counts = np.unique(grams[n - 1][order - 1:], return_index=True, return_counts=True)
        at += order - 1
      else:  # one for each kind of (n+1)-gram that ends so
        keys, first, counts = np.unique(grams[n - 1][at], return_index=True, return_counts=True)
        at = at[first]
      ones, twos = np.sum(counts == 1), np.sum(counts == 2)
      contexts, which = np.unique(grams[n - 1][at] - self.factors[0] * tokens[at].astype(np.uint64), return_inverse=True)
      self.tables.insert(0, (keys, counts, contexts, np.bincount(which, counts), np.bincount(which), ones / max(1, ones + 2 * twos)))

  def hashes(self, tokens):  # [n-1][i]: of the n tokens that end at i; right from i = n-1 on
    sums, one = [self.factors[0] * tokens.astype(np.uint64)], np.uint64(1)
    for n in range(1, len(self.factors)):
      sums.append(sums[-1].copy())
      sums[-1][n:] += self.factors[n] * (tokens[:-n].astype(np.uint64) + one)
    return sums

  def __call__(self, row, first):
    """-> probability of each token of a row from `first` on, and how long a context of it was ever seen."""
    p, seen = np.full(len(row) - first, 1 / self.vocab), np.zeros(len(row) - first, np.int64)
    for n, (gram, (keys, counts, contexts, totals, kinds, discount)) in enumerate(zip(self.hashes(row), self.tables)):
      context = gram[first:] - self.factors[0] * row[first:].astype(np.uint64)
      total = find(contexts, totals, context)
      known = total > 0
      left = discount * find(contexts, kinds, context)
      p = np.where(known, (np.maximum(find(keys, counts, gram[first:]) - discount, 0) + left * p) / np.maximum(total, 1), p)
      seen[known] = n
    return p, seen

def orders_of_picks(row, chunks, random):
  """For each c whose next chunk is scored: its past 0 .. c-1 in the order in which each kind picks, as runtime/overlap_picks.h says."""
  words, ids = np.unique(row, return_inverse=True)
  has = np.zeros((chunks, len(words)), np.float32)
  has[np.arange(len(row)) // TEXT, ids] = 1
  holders, orders = np.cumsum(has, 0), []
  for c in range(chunks // 2 - 1, chunks - 1):
    weight = np.log((c + 1) / np.maximum(holders[c], 1))
    newest = np.arange(c)[::-1]
    by_words = [newest[np.argsort(-(has[newest] @ (weight * has[q])), kind="stable")] for q in (c, c + 1)]
    orders.append((random.permutation(c), newest, *by_words, newest))
  return orders

def evidence(row, chunks, windows, combinations, random):
  """How often, by length of context, what stands before a token stood before (and before that token: hits) in each source.
  -> two arrays (source, target, LEVELS, [seen, hits]): the windows, and the picks of each combination (W, K, kind)."""
  first, T = chunks // 2 * TEXT, len(row)
  x, y = [], []  # all y < x with the same token
  for a in range(first - 1, T, TEXT):
    block = row[a:a + TEXT]
    r, k = np.nonzero(block[:, None] == row[None, :a + len(block)])
    x.append((r + a)[k < r + a])
    y.append(k[k < r + a])
  x, y = np.concatenate(x), np.concatenate(y)
  pairs = [(x[x >= first], y[x >= first])]  # of length 0 every earlier token matches: these are the hits alone
  i, j = x[x < T - 1] + 1, y[x < T - 1] + 1
  for length in range(1, CONTEXTS[-1] + 1):
    if length > 1:
      same = (j >= length) & (row[i - length] == row[j - length])
      i, j = i[same], j[same]
    if length in CONTEXTS:
      pairs.append((i, j))
  targets, slots = T - first, np.arange(T) + np.arange(T) // TEXT
  by_chunk = np.zeros((targets, LEVELS, 2, chunks), np.float32)
  in_window = np.zeros((len(windows), targets, LEVELS, 2), np.uint32)
  starts = [np.searchsorted(slots, slots - 1 - W) for W in windows]  # token i is predicted at the slot before it, which sees W back
  for level, (i, j) in enumerate(pairs):
    for what in (0, 1):
      if what:
        hit = row[i] == row[j]
        i, j = i[hit], j[hit]
      if level == 0 and not what:
        by_chunk[:, 0, 0] = TEXT
        for w, start in enumerate(starts):
          in_window[w, :, 0, 0] = (np.arange(T) - start)[first:]
        continue
      by_chunk[:, level, what] = np.bincount((i - first) * chunks + j // TEXT, minlength=targets * chunks).reshape(targets, chunks)
      for w, start in enumerate(starts):
        in_window[w, :, level, what] = np.bincount(i[j >= start[i]] - first, minlength=targets)
  picked = np.zeros((chunks - chunks // 2, chunks, len(combinations)), np.float32)
  for q, orders in enumerate(orders_of_picks(row, chunks, random)):
    for n, (W, K, kind) in enumerate(combinations):
      order = orders[KINDS.index(kind)]
      newest = chunks // 2 - 1 + q - max(1, (W + 1) // CHUNK - 1)  # not wholly in the window of every slot of chunk c+1
      picked[q, order[order <= newest][:K], n] = 1
  sums = by_chunk.reshape(len(picked), -1, chunks) @ picked
  return in_window, np.moveaxis(sums, 2, 0).reshape(len(combinations), targets, LEVELS, 2).astype(np.uint32)

def fit(P, bucket, prior, strength, steps=15):
  """EM: weights (bucket, part) of a mixture of the parts P (token, part), drawn to a prior that counts as `strength` tokens."""
  order = np.argsort(bucket, kind="stable")
  P, bucket, weights = P[order], bucket[order], prior.copy()
  there, starts = np.unique(bucket, return_index=True)
  for _ in range(steps):
    shares = P * weights[bucket]
    shares /= shares.sum(1, keepdims=True)
    total = np.add.reduceat(shares, starts) + strength * prior[there]
    weights[there] = total / total.sum(1, keepdims=True)
  return weights

def losses(fitted, scored):
  """Both (p, seen, window counts, pick counts): a mixture fitted on one, its loss on each token of the other. Its weights depend on the
  longest context that each part knows: first on the two caches' alone, which are the prior where the n-gram model's counts too."""
  def parts(p, seen, *caches):
    longest = [np.maximum((c[..., 0] > 0) * np.arange(1, LEVELS + 1), 0).max(1) for c in caches]
    return np.hstack([p[:, None]] + [c[..., 1] / np.maximum(c[..., 0], 1.0) for c in caches]), longest[0] * (LEVELS + 1) + longest[1], seen
  P, caches, seen = parts(*fitted)
  n, size = np.arange((LEVELS + 1)**2), P.shape[1]
  usable = np.hstack([np.ones((len(n), 1)), np.arange(LEVELS) < (n // (LEVELS + 1))[:, None], np.arange(LEVELS) < (n % (LEVELS + 1))[:, None]])
  prior = usable * fit(P, np.zeros(len(P), int), np.full((1, size), 1 / size), 0)
  prior = fit(P, caches, prior / prior.sum(1, keepdims=True), 20)
  orders = int(seen.max()) + 1
  weights = fit(P, caches * orders + seen, np.repeat(prior, orders, 0), 20)
  P, caches, seen = parts(*scored)
  return -np.log((P * weights[caches * orders + np.minimum(seen, orders - 1)]).sum(1))

def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  number_list = lambda text: [int(part) for part in text.split(",")]
  parser.add_argument("prefixes", nargs="+", metavar="PREFIX")
  parser.add_argument("--chunks", type=number_list, default=[64, 256], help="rows of so many chunks of 64 slots [64,256]")
  parser.add_argument("--window", type=number_list, default=[128, 512], help="[128,512]")
  parser.add_argument("--topk", type=number_list, default=[8, 32], help="[8,32]")
  parser.add_argument("--order", type=int, default=5, help="of the n-gram model [5]")
  parser.add_argument("--tokens", type=float, default=320e3, help="at most so many scored, and as many to fit on [320e3]")
  parser.add_argument("--seed", type=int, default=1)
  a = parser.parse_args()
  print("| text | chunks (rows) | W | K | n-grams alone | with the window | random | newest | lexical | hindsight | all past | newest over random "
        "| lexical over random | hindsight over random | lexical over newest |\n|" + "---|" * 15, flush=True)
  for prefix in a.prefixes:
    began, (counted, kept) = time.time(), keep_back(read_tokens(prefix, "train"))
    model, name = KneserNey(counted, a.order, a.seed), prefix.split("/")[-1]
    for chunks in a.chunks:
      length, made = chunks * TEXT, []
      targets = (chunks - chunks // 2) * TEXT
      combinations = [(W, K, kind) for W in a.window for K in a.topk for kind in KINDS[:-1]] + [(W, chunks, "all") for W in a.window]
      for text in (kept, read_tokens(prefix, "val")):
        rows = text[:len(text) // length * length].reshape(-1, length)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), max(2, int(a.tokens) // targets))).astype(int)]
        if len(rows) < 2:
          sys.exit(f"{name}: needs two rows of {length} tokens, found {len(text)} tokens; take fewer --chunks")
        random = np.random.default_rng(a.seed)
        found = [model(row, chunks // 2 * TEXT) + evidence(row, chunks, a.window, combinations, random) for row in rows]
        made.append([np.concatenate([part[n] for part in found], axis=n // 2) for n in range(4)])
      def row_losses(w, pick):
        data = [(p, seen, window[w], np.zeros_like(window[w]) if pick is None else picks[pick]) for p, seen, window, picks in made]
        return losses(*data).reshape(-1, targets).mean(1)
      alone = -np.log(made[1][0]).mean()
      for w, W in enumerate(a.window):
        none, everything = row_losses(w, None), row_losses(w, combinations.index((W, chunks, "all")))
        for K in a.topk:
          got = [row_losses(w, combinations.index((W, K, kind))) for kind in KINDS[:-1]]
          over = [got[0] - other for other in got[1:]] + [got[1] - got[2]]
          print(f"| {name} | {chunks} ({len(none)}) | {W} | {K} | {alone:.3f} | {none.mean():.3f} | " +
                " | ".join(f"{(none - each).mean():.3f}" for each in got + [everything]) + " | " +
                " | ".join(f"{each.mean():+.3f} ± {each.std(ddof=1) / len(each)**0.5:.3f}" for each in over) + " |", flush=True)
    print(f"{name}: {len(counted)} tokens counted, {len(kept)} kept back to fit on, {time.time() - began:.0f} s", file=sys.stderr)

if __name__ == "__main__":
  main()
