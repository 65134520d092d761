// The next token, drawn from logits.
#include "runtime/stream.h"

#include <vector>

#include "cpu/choose_token.h"

namespace gca {

int32_t sample_token(const std::vector<float>& logits, double temperature, double top_p, uint64_t seed, int64_t index) {
  const Choice choice{.seed = seed, .index = &index};
  return choose_token(logits, temperature, top_p, temperature > 0 ? uniform_open(choice_draw(choice, 0)) : 0, -1);
}

}  // namespace gca
