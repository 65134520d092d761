// Decoding on any backend: what Decoder gives is what reading and choosing by turns gives.
#pragma once
#include "dev/test/small_model.h"
#include "dev/test/test.h"
#include "runtime/decode.h"

namespace gca::test {

// Tokens after a prompt, chosen by sample_token() from logits that come to the host, or by a Decoder.
template <class Device>
void check_decoder(Device& device, const Config& config, int64_t prompt_tokens, int64_t count) {
  DRT<Device> net(device, config, Use::inference);
  ThreadPool pool(1);
  net.allocate();
  net.initialise(5, pool);
  const std::vector<int32_t> prompt = random_ids(prompt_tokens, 9, config.vocab - 1);
  const int32_t landmark = static_cast<int32_t>(config.vocab - 1);
  for (const double temperature : {0.0, 0.9})
    for (const bool on_host : {false, true}) {
      RowReader<Device> rows(net, {.chunks = ceil_div(prompt_tokens + count, config.chunk - 1),
                                   .segment_slots = 2 * config.chunk,
                                   .on_host = on_host});
      rows.rewind();
      TokenReader<Device> by_turns(net, rows, landmark);
      by_turns.read(prompt);
      std::vector<int32_t> want, found;
      for (int64_t i = 0; i < count; i++) {
        std::vector<float> logits = by_turns.logits();
        logits[landmark] = -INFINITY;
        want.push_back(sample_token(logits, temperature, 0.8, 11, i));
        by_turns.read({&want.back(), 1});
      }
      rows.rewind();
      TokenReader<Device>(net, rows, landmark).read(prompt);
      Decoder<Device> decoder(net, rows, landmark, {.temperature = temperature, .top_p = 0.8, .seed = 11}, count);
      for (int32_t token; (token = decoder.next()) >= 0;) found.push_back(token);
      CAPTURE(temperature);
      CAPTURE(on_host);
      CHECK(found == want);
      CHECK(decoder.next() == -1);
    }
}

}  // namespace gca::test
