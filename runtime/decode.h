// Texts that go on token by token, several at once: tokens are chosen and read again on the device, and the host puts
// steps on its stream ahead of the tokens that it has seen, so that neither waits for the other.
#pragma once
#include <algorithm>
#include <thread>
#include <vector>

#include "model.h"
#include "runtime/stream.h"

namespace gca {

struct Chosen {
  int64_t text;
  int32_t token;
};

// A step: a slot of each text is read, all in one pass, and the next tokens are chosen. Texts may stand anywhere: where
// a chunk ends, a text's slot is the landmark's, its token waits for the next step, and the chunk is closed after this
// one. What a step does depends on nothing that changes from step to step but what lies in the device's memory: it is
// captured once.
template <class Device>
class Decoder {
 public:
  // texts: how many may go on at once. landmark: put in where a chunk ends, never chosen. choice: without its index and
  // sequence.
  Decoder(DRT<Device>& model, int64_t texts, int32_t landmark, Choice choice)
      : model_(model), choice_(choice), landmark_(landmark), texts_(texts) {
    Device& device = model_.device;
    arena_.want(rows_, "places of texts", texts);
    arena_.want(index_, "numbers of the tokens", texts);
    arena_.want(sequence_, "numbers of the texts", texts);
    arena_.want(token_, "the next tokens", texts);
    arena_.want(fresh_, "tokens as they are chosen", texts);
    arena_.commit(device);
    noted_bytes_ = texts * ahead * static_cast<int64_t>(sizeof(int32_t));
    noted_ = static_cast<int32_t*>(device.allocate_host(noted_bytes_));
    choice_.excluded = landmark;
  }
  ~Decoder() {
    graph_ = {};
    arena_.release(model_.device);  // waits for the steps under way
    model_.device.release_host(noted_, noted_bytes_);
    for (Text& text : texts_)
      if (text.reader) text.reader->keep_rows_at(text.reader->state().rows);
  }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // Text i goes on from here, as number `sequence` of all: reader, of one row and made for as many readers as there are
  // texts, has just read its last token, and row 0 of model.logits says what may follow. At most `count` tokens.
  void begin(int64_t i, RowReader<Device>& reader, int64_t count, int32_t sequence = 0) {
    Device& device = model_.device;
    device.synchronize();  // steps under way still note tokens of the text before it
    Text& text = texts_[i];
    text = {&reader, count, 1, 0};
    std::fill_n(noted_ + i * ahead, ahead, none);
    const int64_t index = 0;
    device.upload(index_ + i, &index, sizeof index);
    device.upload(sequence_ + i, &sequence, sizeof sequence);
    reader.keep_rows_at(rows_ + i);
    choose(i, 1, nullptr);
  }
  // It goes no further.
  void end(int64_t i) { texts_[i].count = 0; }

  // The next token of a text, of those that have one by turns; text -1 when none goes on. What is read ahead of it
  // stays read.
  Chosen next() {
    const int64_t n = std::ssize(texts_);
    while (can_step()) step();
    for (int64_t tried = 0; tried < n; tried++, turn_ = (turn_ + 1) % n) {
      Text& text = texts_[turn_];
      if (text.seen >= std::min(text.chosen, text.count)) continue;
      const Chosen chosen{turn_, wait_for(noted_[turn_ * ahead + text.seen % ahead])};
      text.seen++;
      turn_ = (turn_ + 1) % n;
      return chosen;
    }
    return {-1, none};
  }

 private:
  static constexpr int64_t ahead = Device::runs_ahead ? 32 : 1;  // tokens of a text, chosen and not seen, at most
  static constexpr int32_t none = -1;

  struct Text {
    RowReader<Device>* reader = nullptr;
    int64_t count = 0, chosen = 0, seen = 0;  // tokens: wanted, chosen so far, given to the caller
  };

  bool goes_on(const Text& text) const { return text.chosen < text.count; }
  // Whether some text has a token to come, and none that goes on would have its unseen ones written over.
  bool can_step() const {
    return std::any_of(texts_.begin(), texts_.end(), [&](const Text& t) { return goes_on(t); }) &&
           std::none_of(texts_.begin(), texts_.end(),
                        [&](const Text& t) { return t.seen < t.count && t.chosen - t.seen >= ahead; });
  }
  int32_t wait_for(int32_t& noted) {
    int32_t token = none;  // std::atomic_ref would do, where every library had it
    for (int64_t tries = 0; (token = __atomic_load_n(&noted, __ATOMIC_ACQUIRE)) == none; tries++) {
      if (tries % 4096 == 4095) model_.device.look_for_errors();
      std::this_thread::yield();
    }
    __atomic_store_n(&noted, none, __ATOMIC_RELAXED);
    return token;
  }

  void step() {
    Device& device = model_.device;
    const int64_t n = std::ssize(texts_), S = model_.config.chunk;
    for (Text& text : texts_) {
      GCA_CHECK(text.reader, "all texts begin before the first token is asked for");
      if (goes_on(text)) text.reader->prepare_slot();
    }
    const auto work = [&] {
      device.feed_tokens(model_.token, token_, rows_, landmark_, n, S);
      model_.read_slots(rows_, n);
      for (int64_t first = 0; first < n; first += model_.logits_rows()) {
        const int64_t count = std::min(model_.logits_rows(), n - first);
        model_.piece_of_logits(first, count);
        choose(first, count, rows_ + first);
      }
    };
    bool done = false;
    if constexpr (Device::captures) {
      // Once by calls: each op sets itself up at its first one.
      if (steps_ == 1) graph_ = device.capture(work);
      if ((done = steps_ >= 1)) device.replay(graph_);
    }
    if (!done) work();
    steps_++;
    for (int64_t i = 0; i < n; i++) {
      Text& text = texts_[i];
      if (!goes_on(text)) {
        text.chosen++;  // at most: the device goes on noting tokens of it
        continue;
      }
      text.chosen += !text.reader->slot_closes();
      text.reader->slot_was_read(i, {});
    }
  }
  // The tokens of texts first .. first + count - 1, from as many rows of logits; of those only whose slot was no
  // landmark's, where rows say where they stand now.
  void choose(int64_t first, int64_t count, const typename DRT<Device>::Row* rows) {
    Choice choice = choice_;
    choice.index = index_ + first;
    choice.sequence = sequence_ + first;
    model_.device.choose_token(fresh_ + first, model_.logits, count, model_.config.vocab, model_.table.padded_vocab,
                               choice);
    model_.device.note_tokens(noted_ + first * ahead, index_ + first, token_ + first, fresh_ + first, rows, count,
                              model_.config.chunk, ahead);
  }

  DRT<Device>& model_;
  Choice choice_;
  int32_t landmark_;
  std::vector<Text> texts_;
  int64_t turn_ = 0, steps_ = 0;
  Arena arena_;
  typename DRT<Device>::Row* rows_ = nullptr;       // (texts)
  int64_t* index_ = nullptr;                        // (texts)
  int32_t *sequence_ = nullptr, *token_ = nullptr;  // (texts) token: to be read next, landmarks aside
  int32_t* fresh_ = nullptr;                        // (texts) what the last logits say, a landmark's too
  int32_t* noted_ = nullptr;                        // (texts,ahead), the host's: tokens as they come, none before
  int64_t noted_bytes_ = 0;
  typename Device::Graph graph_;  // of a step
};

}  // namespace gca
