// That ranks have a card each, and one run together.
#include "runtime/parallel.h"

namespace gca {

void check_cards(const std::vector<std::string>& cards) {
  for (size_t r = 0; r < cards.size(); r++)
    if (const size_t other = static_cast<size_t>(std::find(cards.begin(), cards.end(), cards[r]) - cards.begin());
        other != r)
      throw Error(str("ranks ", other, " and ", r, " have the same GPU (", cards[r],
                      "): expected one each; start as many ranks on a host as it has GPUs, and let each see all of "
                      "them or its own (CUDA_VISIBLE_DEVICES)"));
}

void check_same_run(Ranks& ranks, const std::string& run) {
  const std::vector<std::string> all = ranks.gather(run);
  for (size_t r = 1; r < all.size(); r++) {
    if (all[r] == all[0]) continue;
    size_t at = 0;
    while (at < all[0].size() && at < all[r].size() && all[0][at] == all[r][at]) at++;
    const size_t from = at < 40 ? 0 : at - 40;
    throw Error(str("rank ", r, " was started with other settings, weights or data than rank 0: expected ...",
                    all[0].substr(from, 80), "..., found ...", all[r].substr(from, 80),
                    "...; give all ranks the same command, and the same files under the same names"));
  }
}

}  // namespace gca
