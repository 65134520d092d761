// A row read a segment at a time: window caches, the chunk memory and the picks go on from segment to segment
// (DRT::StreamState), so a text of any length needs the activations of one segment only.
#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "model.h"

namespace gca {

// Rows of slots, all alike, read from their beginning.
template <class Device>
class RowReader {
 public:
  // model: for inference, allocated; its activations become this reader's. Holds up to `chunks` chunks of each of B
  // rows, and reads segments of up to segment_slots slots of all rows together (a chunk of each row at least).
  RowReader(DRT<Device>& model, int64_t B, int64_t chunks, int64_t segment_slots)
      : model_(model), segment_(segment_of(model.config.chunk, B, chunks, segment_slots)) {
    model_.plan(B, segment_);
    model_.commit_activations();
    model_.open(stream_, B, chunks);
  }
  ~RowReader() { model_.close(stream_); }
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;

  // What one takes beside the model's own buffers, before anything is allocated.
  static int64_t memory_bytes(DRT<Device>& model, int64_t B, int64_t chunks, int64_t segment_slots) {
    model.plan(B, segment_of(model.config.chunk, B, chunks, segment_slots));
    typename DRT<Device>::StreamState stream;
    model.plan(stream, B, chunks);
    return model.activation_memory().total_bytes() + stream.arena.total_bytes();
  }

  // To the beginning of new rows.
  void rewind() { model_.rewind(stream_); }
  int64_t slots() const { return stream_.slots; }
  const typename DRT<Device>::StreamState& state() const { return stream_; }

  // The next `count` slots of each row, whole chunks from a chunk's beginning, or slots of one chunk: row b's at slots
  // + b * stride, and so their targets where there are some. After each segment, after(first, T): the model holds what
  // comes out of slots first .. first + T - 1 of each row (final_n, (B,T,D); the groups' tables).
  template <class After>
  void read(const int32_t* slots, const int32_t* targets, int64_t stride, int64_t count, const Selection& selection,
            After after) {
    const int64_t B = stream_.B;
    std::vector<int32_t> piece, piece_targets;
    for (int64_t at = 0; at < count; at += segment_) {
      const int64_t T = std::min(segment_, count - at), first = stream_.slots;
      piece.clear();
      piece_targets.clear();
      for (int64_t b = 0; b < B; b++) {
        const int64_t from = b * stride + at;
        piece.insert(piece.end(), slots + from, slots + from + T);
        if (targets) piece_targets.insert(piece_targets.end(), targets + from, targets + from + T);
      }
      model_.upload(piece.data(), targets ? piece_targets.data() : nullptr, nullptr, B * T);
      model_.forward({B, T, selection, &stream_});
      after(first, T);
    }
  }

 private:
  // Slots of a row at once: whole chunks.
  static int64_t segment_of(int64_t S, int64_t B, int64_t chunks, int64_t segment_slots) {
    return std::clamp<int64_t>(segment_slots / B / S, 1, std::max<int64_t>(chunks, 1)) * S;
  }

  DRT<Device>& model_;
  int64_t segment_;
  typename DRT<Device>::StreamState stream_;
};

// Slots that are read at once where nobody says otherwise: enough to fill a GPU.
inline constexpr int64_t default_segment_slots = 16384;

// One row of real tokens; the landmarks are put in.
template <class Device>
class TokenReader {
 public:
  // Up to max_tokens real tokens; the rest as for RowReader.
  TokenReader(DRT<Device>& model, int32_t landmark, int64_t max_tokens, int64_t segment_slots = default_segment_slots)
      : model_(model),
        landmark_(landmark),
        S_(model.config.chunk),
        rows_(model, 1, chunks_of(model, max_tokens), segment_slots) {}
  static int64_t memory_bytes(DRT<Device>& model, int64_t max_tokens, int64_t segment_slots = default_segment_slots) {
    return RowReader<Device>::memory_bytes(model, 1, chunks_of(model, max_tokens), segment_slots);
  }

  // Reads real tokens. A chunk's landmark is put in at the latest before the first token that comes after it.
  void read(std::span<const int32_t> tokens) {
    int64_t last_row = 0;  // of the last real token among a segment's slots
    const auto pass = [&](const std::vector<int32_t>& slots) {
      rows_.read(slots.data(), nullptr, 0, std::ssize(slots), {},
                 [&](int64_t first, int64_t T) { last_row = T - 1 - ((first + T) % S_ == 0); });
    };
    const auto take = [&](std::vector<int32_t>& slots, int64_t count) {
      slots.insert(slots.end(), tokens.begin(), tokens.begin() + count);
      tokens = tokens.subspan(count);
    };
    if (const int64_t place = slots() % S_; place && !tokens.empty()) {  // the rest of a chunk that was begun
      std::vector<int32_t> slots;
      take(slots, std::min(S_ - 1 - place, std::ssize(tokens)));
      if (!tokens.empty()) slots.push_back(landmark_);
      pass(slots);
    }
    std::vector<int32_t> chunks;
    while (std::ssize(tokens) >= S_ - 1) {
      take(chunks, S_ - 1);
      chunks.push_back(landmark_);
    }
    if (!chunks.empty()) pass(chunks);
    if (!tokens.empty()) pass({tokens.begin(), tokens.end()});
    model_.piece_of_logits(last_row, 1);
  }

  // Logits of the token after the last one read, (V).
  std::vector<float> logits() {
    std::vector<typename DRT<Device>::act> raw(model_.config.vocab);
    model_.device.download(raw.data(), model_.logits, static_cast<int64_t>(raw.size() * sizeof(raw[0])));
    std::vector<float> out;
    for (const auto& x : raw) out.push_back(static_cast<float>(x));
    return out;
  }
  int64_t slots() const { return rows_.slots(); }

 private:
  static int64_t chunks_of(const DRT<Device>& model, int64_t max_tokens) {
    return ceil_div(std::max<int64_t>(max_tokens, 1), model.config.chunk - 1);
  }

  DRT<Device>& model_;
  int32_t landmark_;
  int64_t S_;
  RowReader<Device> rows_;
};

// The next token. temperature 0: the largest logit, the lowest id among equals. Otherwise a draw from the smallest set
// of tokens whose probability reaches top_p, by the random number of (seed, index).
int32_t sample_token(const std::vector<float>& logits, double temperature, double top_p, uint64_t seed, int64_t index);

}  // namespace gca
