// Several ranks at one training: what joins their devices, and the check that they are at the same one.
#pragma once
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "ranks/collectives.h"

namespace gca {

// An Error where two of these names of cards, by rank, are the same.
void check_cards(const std::vector<std::string>& cards);
// An Error where a rank was started with other settings, weights or data than rank 0; run: all of these in words.
void check_same_run(Ranks& ranks, const std::string& run);

// What the ranks' devices do together: null for a world of one.
template <class Device>
std::unique_ptr<Collectives> collectives_of(Ranks& ranks, Device& device) {
  if (ranks.size() == 1) return nullptr;
  if constexpr (requires { device.card(); }) {
    check_cards(ranks.gather(device.card()));
    return nccl_collectives(ranks, device.side_stream());
  } else return tcp_collectives(ranks);
}

}  // namespace gca
