// What the chunks of a row would fetch by their words: what a retriever that learned nothing can do, and a ceiling.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "base/arena.h"
#include "ops.h"

namespace gca {

// For each chunk c, serving chunk c+1: the K chunks m <= c - distance (distance at least 1) whose tokens overlap most
// with chunk c's or, in hindsight, with chunk c+1's, which are still to be predicted (the last chunk takes its own). A
// token that both have counts once, by log((c+1) / the chunks 0 .. c that have it); of equals the newer chunk goes
// first. tokens (C*S): the landmark in slot S-1 of each chunk is left out. -> (C,K), -1 where there are fewer chunks.
std::vector<int32_t> overlap_picks(std::span<const int32_t> tokens, int64_t S, int64_t K, int64_t distance,
                                   bool hindsight);

// They lie on the device, for rows that are read there.
template <class Device>
class OverlapPicks {
 public:
  OverlapPicks(Device& device, int64_t B, int64_t C, int64_t K) : device_(device), K_(K) {
    arena_.want(picks_, "picks by words", B * C * K);
    arena_.commit(device);
  }
  ~OverlapPicks() { arena_.release(device_); }
  OverlapPicks(const OverlapPicks&) = delete;
  OverlapPicks& operator=(const OverlapPicks&) = delete;

  // The selection that fetches them, for B rows of T slots; it counts until the next rows come. tokens (B,T).
  Selection of(Selection selection, const int32_t* tokens, int64_t B, int64_t T, int64_t S, bool hindsight) {
    selection.given_picks = picks_;
    selection.given_chunks = T / S;
    for (int64_t b = 0; b < B; b++) {
      const auto picks = overlap_picks(std::span(tokens + b * T, T), S, K_, selection.newest_distance, hindsight);
      device_.upload(picks_ + b * std::ssize(picks), picks.data(),
                     std::ssize(picks) * static_cast<int64_t>(sizeof picks[0]));
    }
    return selection;
  }

 private:
  Device& device_;
  const int64_t K_;
  Arena arena_;
  int32_t* picks_ = nullptr;  // (B,C,K)
};

}  // namespace gca
