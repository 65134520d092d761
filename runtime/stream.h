// A row read a segment at a time: window caches, the chunk memory and the picks go on from segment to segment
// (DRT::StreamState), so a text of any length needs the activations of one segment only.
#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "model.h"

namespace gca {

template <class Device>
class TokenReader {
 public:
  // model: for inference, allocated. Reads up to max_tokens real tokens; prefill goes by segments of segment_chunks
  // chunks.
  TokenReader(DRT<Device>& model, int32_t landmark, int64_t max_tokens, int64_t segment_chunks = 16)
      : model_(model), landmark_(landmark), S_(model.config.chunk), segment_chunks_(segment_chunks) {
    model_.plan(1, segment_chunks * S_);
    model_.commit_activations();
    model_.open(stream_, ceil_div(std::max<int64_t>(max_tokens, 1), S_ - 1));
  }
  // What one takes beside the model's own buffers, before anything is allocated.
  static int64_t memory_bytes(DRT<Device>& model, int64_t max_tokens, int64_t segment_chunks = 16) {
    model.plan(1, segment_chunks * model.config.chunk);
    typename DRT<Device>::StreamState stream;
    model.plan(stream, ceil_div(std::max<int64_t>(max_tokens, 1), model.config.chunk - 1));
    return model.activation_memory().total_bytes() + stream.arena.total_bytes();
  }
  ~TokenReader() { model_.close(stream_); }

  // Reads real tokens. Landmarks are put in where a chunk ends: before the first token that comes after it.
  void read(std::span<const int32_t> tokens) {
    while (!tokens.empty()) {
      std::vector<int32_t> slots;
      if (stream_.slots % S_ == S_ - 1) {
        pass({landmark_});
        continue;
      }
      const int64_t place = stream_.slots % S_, left = static_cast<int64_t>(tokens.size());
      int64_t taken = std::min(left, S_ - 1 - place);
      if (place == 0 && left >= S_ - 1) {  // whole chunks, each with its landmark
        const int64_t chunks = std::min(left / (S_ - 1), segment_chunks_);
        taken = chunks * (S_ - 1);
        for (int64_t i = 0; i < taken; i++) {
          slots.push_back(tokens[i]);
          if ((i + 1) % (S_ - 1) == 0) slots.push_back(landmark_);
        }
        last_row_ = static_cast<int64_t>(slots.size()) - 2;
      } else {
        slots.assign(tokens.begin(), tokens.begin() + taken);
        last_row_ = taken - 1;
      }
      pass(slots);
      tokens = tokens.subspan(taken);
      model_.piece_of_logits(last_row_, 1);
    }
  }

  // Logits of the token after the last one read, (V).
  std::vector<float> logits() {
    std::vector<typename DRT<Device>::act> raw(model_.config.vocab);
    model_.device.download(raw.data(), model_.logits, static_cast<int64_t>(raw.size() * sizeof(raw[0])));
    std::vector<float> out;
    for (const auto& x : raw) out.push_back(static_cast<float>(x));
    return out;
  }
  int64_t slots() const { return stream_.slots; }

 private:
  void pass(const std::vector<int32_t>& slots) {
    model_.upload(slots.data(), nullptr, nullptr, static_cast<int64_t>(slots.size()));
    model_.forward({1, static_cast<int64_t>(slots.size()), {}, &stream_});
  }

  DRT<Device>& model_;
  int32_t landmark_;
  int64_t S_, segment_chunks_, last_row_ = 0;
  typename DRT<Device>::StreamState stream_;
};

// The next token. temperature 0: the largest logit, the lowest id among equals. Otherwise a draw from the smallest set
// of tokens whose probability reaches top_p, by the random number of (seed, index).
int32_t sample_token(const std::vector<float>& logits, double temperature, double top_p, uint64_t seed, int64_t index);

}  // namespace gca
