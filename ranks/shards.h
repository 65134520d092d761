// How rows and the flat buffers of a model are shared out among ranks. Of the buffers: gradients are summed bucket by
// bucket, and of each bucket every rank keeps one slice, for which it has the optimiser's state.
//
//     flat buffer   [ bucket n: slice 0 | slice 1 | .. ][ bucket n-1: slice 0 | slice 1 | .. ] ..
//     a rank's share  [ its slice of bucket n ][ its slice of bucket n-1 ] ..
//
// All bounds of buckets are multiples of the number of ranks, so the slice of a bucket that begins at b lies at
// b / ranks of the share: shares have no gaps, and whatever the number of ranks the files' order is that of the flat
// buffer.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common.h"

namespace gca {

// Of rows that ranks share, those of one: so many each, and one more for the first ones where they do not divide.
struct RowRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};
inline RowRange rows_of_rank(int64_t rows, int rank, int ranks) {
  const int64_t each = rows / ranks, more = rows % ranks;
  const auto begin_of = [&](int64_t r) { return r * each + std::min(r, more); };
  return {begin_of(rank), begin_of(rank + 1)};
}

struct Shards {
  // A bucket, and this rank's slice of it: size elements from flat on in a flat buffer, from place on in a share.
  struct Bucket {
    int64_t begin, end;
    int64_t flat, place, size;
  };
  int rank = 0, ranks = 1;
  int64_t size = 0;             // of a flat buffer, rounded up to whole slices
  std::vector<Bucket> buckets;  // from the buffer's end to its beginning, as backward completes them
  int64_t share() const { return size / ranks; }

  Shards() = default;
  // used: elements of a flat buffer. first_end: where its first tensor ends, whose gradient is complete last, and
  // which has the last bucket. alignment: elements that slices begin at multiples of. bucket_size: elements, about; 0:
  // one bucket.
  Shards(int rank_, int ranks_, int64_t used, int64_t first_end, int64_t alignment, int64_t bucket_size)
      : rank(rank_), ranks(ranks_), size(round_up(used, ranks_ * alignment)) {
    const int64_t unit = ranks * alignment, first = bucket_size ? std::min(size, round_up(first_end, unit)) : 0;
    for (int64_t begin, end = size; end > 0; end = begin) {
      begin = end > first ? std::max(first, (end - bucket_size) / unit * unit) : 0;
      if (!bucket_size || begin - first < bucket_size / 2) begin = end > first ? first : 0;  // no small rest
      add(begin, end);
    }
  }

  // body(flat, place, count) for each stretch of this rank's slices that lies in flat elements first .. first + count
  // - 1.
  template <class Body>
  void owned(int64_t first, int64_t count, Body body) const {
    for (const Bucket& b : buckets) {
      const int64_t from = std::max(first, b.flat), to = std::min(first + count, b.flat + b.size);
      if (from < to) body(from, b.place + from - b.flat, to - from);
    }
  }
  // The same buckets as another rank sees them.
  Shards of_rank(int other) const {
    Shards shards = *this;
    shards.rank = other;
    for (Bucket& b : shards.buckets) b.flat = b.begin + other * b.size;
    return shards;
  }

 private:
  void add(int64_t begin, int64_t end) {
    const int64_t slice = (end - begin) / ranks;
    buckets.push_back({begin, end, begin + rank * slice, begin / ranks, slice});
  }
};

}  // namespace gca
