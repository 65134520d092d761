// Tokens one after another, chosen and read again on the device: the host puts steps on its stream ahead of the tokens
// that it has seen, so that neither waits for the other.
#pragma once
#include <algorithm>
#include <atomic>
#include <map>
#include <thread>

#include "model.h"
#include "runtime/stream.h"

namespace gca {

template <class Device>
class Decoder {
 public:
  // rows: a reader of one row, which has read at least one token, whose logits model.logits holds (TokenReader).
  // choice: without its index; the landmark is never chosen: it is put in where a chunk ends. count: tokens at most.
  Decoder(DRT<Device>& model, RowReader<Device>& rows, int32_t landmark, Choice choice, int64_t count)
      : model_(model), rows_(rows), choice_(choice), count_(count) {
    Device& device = model_.device;
    arena_.want(index_, "number of the token", 1);
    arena_.want(token_, "the next token", 1);
    arena_.want(landmark_, "the landmark", 1);
    arena_.commit(device);
    noted_ = static_cast<int32_t*>(device.allocate_host(noted_bytes));
    std::fill_n(noted_, ahead, none);
    device.zero(index_, 1);
    device.upload(landmark_, &landmark, sizeof landmark);
    choice_.index = index_;
    choice_.excluded = landmark;
  }
  ~Decoder() {
    graphs_.clear();
    arena_.release(model_.device);  // waits for the steps under way
    model_.device.release_host(noted_, noted_bytes);
  }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // The next token, or -1 after `count` of them. What is read ahead of it stays read.
  int32_t next() {
    if (seen_ == count_) return -1;
    while (begun_ < std::min(count_, seen_ + ahead)) step();
    std::atomic_ref<int32_t> place(noted_[seen_ % ahead]);
    int32_t token = none;
    for (int64_t tries = 0; (token = place.load(std::memory_order_acquire)) == none; tries++) {
      if (tries % 4096 == 4095) model_.device.look_for_errors();
      std::this_thread::yield();
    }
    place.store(none, std::memory_order_relaxed);
    seen_++;
    return token;
  }

 private:
  static constexpr int64_t ahead = Device::runs_ahead ? 32 : 1;  // steps under way at most
  static constexpr int64_t noted_bytes = ahead * static_cast<int64_t>(sizeof(int32_t));
  static constexpr int32_t none = -1;

  // Chooses a token by the logits that are there, and reads it.
  void step() {
    const int64_t S = model_.config.chunk;
    if (rows_.slots() % S == S - 1) {
      model_.device.copy(model_.token, landmark_, 1);
      rows_.read_slot({});
    }
    rows_.prepare_slot();
    const int64_t like = rows_.slot_like(rows_.slots());
    if constexpr (Device::captures) {
      if (like >= 0 && begun_ >= warm) {
        auto graph = graphs_.find(like);
        if (graph == graphs_.end()) graph = graphs_.emplace(like, model_.device.capture([&] { work(like); })).first;
        else rows_.slot_was_read();
        model_.device.replay(graph->second);
        begun_++;
        return;
      }
    }
    work(rows_.slots());
    begun_++;
  }
  void work(int64_t slot) {
    model_.device.choose_token(token_, model_.logits, 1, model_.config.vocab, model_.table.padded_vocab, choice_);
    model_.device.note_tokens(noted_, index_, token_, 1, ahead);
    model_.device.copy(model_.token, token_, 1);
    rows_.read_slot({}, slot);
    model_.piece_of_logits(0, 1);
  }
  static constexpr int64_t warm = 2;  // steps before work is captured: each op sets itself up at its first call

  DRT<Device>& model_;
  RowReader<Device>& rows_;
  Choice choice_;
  int64_t count_, begun_ = 0, seen_ = 0;
  Arena arena_;
  int64_t* index_ = nullptr;                          // (1)
  int32_t *token_ = nullptr, *landmark_ = nullptr;    // (1)
  int32_t* noted_ = nullptr;                          // (ahead), the host's: tokens as they come, none before
  std::map<int64_t, typename Device::Graph> graphs_;  // by slot_like()
};

}  // namespace gca
