// Decoding on any backend: what a Decoder gives is what reading and choosing by turns gives, whatever goes on beside
// it.
#pragma once
#include <memory>

#include "dev/test/small_model.h"
#include "dev/test/test.h"
#include "runtime/decode.h"

namespace gca::test {

// A model with weights, for readers of texts.
template <class Device>
struct DecodedModel {
  DRT<Device> net;
  int32_t landmark;
  DecodedModel(Device& device, const Config& config)
      : net(device, config, Use::inference), landmark(static_cast<int32_t>(config.vocab - 1)) {
    ThreadPool pool(1);
    net.allocate();
    net.initialise(5, pool);
  }
  std::vector<int32_t> prompt(int64_t tokens) const { return random_ids(tokens, 9, landmark); }
  ReaderPlan plan(int64_t tokens, bool on_host, int64_t readers = 1) const {
    return {.chunks = ceil_div(tokens, net.config.chunk - 1),
            .segment_slots = 2 * net.config.chunk,
            .on_host = on_host,
            .readers = readers};
  }
  // One token by a pass of one slot, its chunk's landmark before it where that is next.
  void read_slot(RowReader<Device>& rows, int32_t token) {
    const auto read = [&](int32_t id) {
      net.upload(&id, nullptr, nullptr, 1);
      rows.read_slot({});
    };
    if (rows.slot_closes()) read(landmark);
    read(token);
    net.piece_of_logits(0, 1);
  }
  // Tokens after a prompt, chosen by sample_token() from logits that come to the host; read slot by slot, or in pieces
  // of one. logits: those of each, where they are wanted.
  std::vector<int32_t> by_turns(RowReader<Device>& rows, const std::vector<int32_t>& prompt, int64_t count,
                                const Choice& choice, bool slots, std::vector<float>* all_logits = nullptr,
                                const std::vector<int32_t>* given = nullptr) {
    rows.rewind();
    TokenReader<Device> reader(net, rows, landmark);
    reader.read(prompt);
    std::vector<int32_t> tokens;
    for (int64_t i = 0; i < count; i++) {
      std::vector<float> logits = reader.logits();
      logits[landmark] = -INFINITY;
      tokens.push_back(given ? (*given)[i] : sample_token(logits, choice.temperature, choice.top_p, choice.seed, i));
      if (all_logits) all_logits->insert(all_logits->end(), logits.begin(), logits.end() - 1);
      if (slots) read_slot(rows, tokens.back());
      else reader.read({&tokens.back(), 1});
    }
    return tokens;
  }
};

// One text. same_bits: a pass of one slot has the bits of a piece of one slot.
template <class Device>
void check_decoder(Device& device, const Config& config, int64_t prompt_tokens, int64_t count, bool same_bits) {
  DecodedModel model(device, config);
  const std::vector<int32_t> prompt = model.prompt(prompt_tokens);
  for (const double temperature : {0.0, 0.9})
    for (const bool on_host : {false, true}) {
      CAPTURE(temperature);
      CAPTURE(on_host);
      const Choice choice{.temperature = temperature, .top_p = 0.8, .seed = 11};
      RowReader<Device> rows(model.net, model.plan(prompt_tokens + count, on_host));
      const std::vector<int32_t> want = model.by_turns(rows, prompt, count, choice, true);
      if (same_bits) CHECK(model.by_turns(rows, prompt, count, choice, false) == want);
      rows.rewind();
      TokenReader<Device>(model.net, rows, model.landmark).read(prompt);
      Decoder<Device> decoder(model.net, 1, model.landmark, choice);
      decoder.begin(0, rows, count);
      std::vector<int32_t> found;
      for (Chosen chosen; (chosen = decoder.next()).text >= 0;) found.push_back(chosen.token);
      CHECK(found == want);
      CHECK(decoder.next().text == -1);
    }
}

// Slot by slot, the logits are those of pieces of one slot, to within `tolerance` of the largest.
template <class Device>
void check_slots(Device& device, const Config& config, int64_t prompt_tokens, int64_t count, double tolerance) {
  DecodedModel model(device, config);
  const std::vector<int32_t> prompt = model.prompt(prompt_tokens), given = random_ids(count, 10, model.landmark);
  RowReader<Device> rows(model.net, model.plan(prompt_tokens + count, false));
  std::vector<float> slots, pieces;
  model.by_turns(rows, prompt, count, {}, true, &slots, &given);
  model.by_turns(rows, prompt, count, {}, false, &pieces, &given);
  double largest = 0, apart = 0;
  for (size_t i = 0; i < slots.size(); i++) {
    largest = std::max<double>(largest, std::fabs(pieces[i]));
    apart = std::max<double>(apart, std::fabs(slots[i] - pieces[i]));
  }
  CHECK(largest > 0);
  CHECK(apart <= tolerance * largest);
}

// Several texts at once, one of them ended early, another in its place: each has the tokens that it has alone, and the
// weights of what its last whole chunk picked to within `tolerance`.
template <class Device>
void check_texts_at_once(Device& device, const Config& config, int64_t count, double tolerance) {
  DecodedModel model(device, config);
  const std::vector<int64_t> prompt_tokens = {1, 5, 3 * config.chunk, 70, config.chunk - 1, 31};
  const int64_t at_once = std::ssize(prompt_tokens) - 1;
  for (const bool on_host : {false, true}) {
    CAPTURE(on_host);
    const Choice choice{.temperature = 0.9, .top_p = 0.9, .seed = 3};
    const ReaderPlan plan = model.plan(70 + count, on_host, at_once);
    std::vector<std::unique_ptr<RowReader<Device>>> readers;
    for (int64_t i = 0; i < at_once; i++)
      readers.push_back(std::make_unique<RowReader<Device>>(model.net, plan, i > 0));
    const auto begin = [&](Decoder<Device>& decoder, int64_t place, int64_t text) {
      readers[place]->rewind();
      TokenReader<Device>(model.net, *readers[place], model.landmark).read(model.prompt(prompt_tokens[text]));
      decoder.begin(place, *readers[place], count - text, static_cast<int32_t>(text));
    };
    const auto weights = [&](int64_t place) {
      std::vector<typename Device::stat> all;
      const int64_t K = config.reach.topk;
      for (const auto* w : readers[place]->state().w) {
        all.resize(all.size() + static_cast<size_t>(K));
        device.download(&*(all.end() - K), w, K * static_cast<int64_t>(sizeof(all[0])));
      }
      return all;
    };
    std::vector<std::vector<typename Device::stat>> want_weights(at_once + 1);
    std::vector<std::vector<int32_t>> want(at_once + 1), found(at_once + 1);
    for (int64_t text = 0; text <= at_once; text++) {
      Decoder<Device> decoder(model.net, 1, model.landmark, choice);
      begin(decoder, 0, text);
      for (Chosen chosen; (chosen = decoder.next()).text >= 0;) want[text].push_back(chosen.token);
      CHECK(std::ssize(want[text]) == count - text);
      want_weights[text] = weights(0);
    }
    want[1].resize(7);
    std::vector<int64_t> text_at = {0, 1, 2, 3, 4};
    Decoder<Device> decoder(model.net, at_once, model.landmark, choice);
    for (int64_t i = 0; i < at_once; i++) begin(decoder, i, i);
    for (Chosen chosen; (chosen = decoder.next()).text >= 0;) {
      std::vector<int32_t>& tokens = found[text_at[chosen.text]];
      tokens.push_back(chosen.token);
      if (text_at[chosen.text] != 1 || tokens.size() < 7) continue;
      decoder.end(chosen.text);
      text_at[chosen.text] = at_once;
      begin(decoder, chosen.text, at_once);
    }
    for (int64_t place = 0; place < at_once; place++) {
      const auto now = weights(place), before = want_weights[text_at[place]];
      double apart = 0;
      for (size_t i = 0; i < now.size(); i++) apart = std::max<double>(apart, std::fabs(now[i] - before[i]));
      CAPTURE(place);
      CHECK(apart <= tolerance);
    }
    for (int64_t text = 0; text <= at_once; text++) {
      const int64_t alike =
          std::mismatch(found[text].begin(), found[text].end(), want[text].begin(), want[text].end()).first -
          found[text].begin();
      CAPTURE(text);
      CHECK(found[text].size() == want[text].size());
      CHECK(alike == std::ssize(want[text]));
    }
  }
}

}  // namespace gca::test
