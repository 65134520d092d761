// The next token, from the logits of one row: what the op of Cpu does for each row, on any floats.
#pragma once
#include <cstdint>
#include <span>

namespace gca {

// temperature 0: the largest logit, the lowest id among equals. Otherwise a draw, by a random number in (0,1), from the
// smallest set of tokens whose probability reaches top_p: the likeliest first, the lowest id among equals. Never
// `excluded`, and no logit that is not a number; where there is nothing else, the lowest id that is not excluded.
int32_t choose_token(std::span<const float> logits, double temperature, double top_p, float random, int32_t excluded);

}  // namespace gca
