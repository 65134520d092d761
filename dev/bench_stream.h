// A row of many slots: how fast it is read, how fast tokens follow it, and what one costs that ends a chunk.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "base/progress.h"
#include "runtime/decode.h"

namespace gca {

// Reading a row of that many slots, and tokens chosen after it. Bytes of a token: the working weights, which each reads
// once, and the chunks that it fetches; copied: bytes a second that a copy reads and writes.
template <class Device>
void bench_stream(Device& device, double peak, double copied, const Config& config, int64_t slots, int64_t tokens,
                  bool on_host) {
  DRT model(device, config, Use::inference);
  model.allocate();
  ThreadPool pool;
  model.initialise(1, pool);
  const int64_t S = config.chunk, V = config.vocab, chunks = slots / S;
  RowReader<Device> rows(
      model, {.chunks = chunks + ceil_div(2 * tokens, S - 1) + 9, .segment_slots = 16384, .on_host = on_host});
  if (rows.host_memory()) rows.host_memory()->ready();
  std::vector<int32_t> row(chunks * S);
  for (size_t i = 0; i < row.size(); i++) {
    const uint32_t word = philox(1, Draw::task, static_cast<uint32_t>(i)).word[0];
    row[i] = static_cast<int32_t>(static_cast<int64_t>(i) % S == S - 1 ? V - 1 : word % static_cast<uint32_t>(V - 1));
  }
  double read_seconds = 0;
  for (int round = 0; round < 2; round++) {  // the first one sets up
    rows.rewind();
    device.synchronize();
    const double start = monotonic_seconds();
    rows.read(row.data(), nullptr, 0, chunks * S, {}, [](int64_t, int64_t) {});
    device.synchronize();
    read_seconds = monotonic_seconds() - start;
  }
  model.piece_of_logits(0, 1);
  double seconds = 0;
  {
    Decoder<Device> decoder(model, 1, static_cast<int32_t>(V - 1), {});
    decoder.begin(0, rows, 2 * tokens);
    for (int64_t i = 0; i < tokens; i++) decoder.next();
    const double start = monotonic_seconds();
    for (int64_t i = 0; i < tokens; i++) decoder.next();
    seconds = (monotonic_seconds() - start) / static_cast<double>(tokens);
  }
  // The token that closes a chunk and the one before it, each until all is done.
  std::vector<double> inside, closing;
  for (int64_t i = 0; i < 8 * S; i++) {
    const int32_t token = rows.slot_closes() ? static_cast<int32_t>(V - 1) : 1;
    model.upload(&token, nullptr, nullptr, 1);
    device.synchronize();
    const bool closes = rows.slot_closes();
    const double start = monotonic_seconds();
    rows.read_slot({});
    device.synchronize();
    (closes ? closing : inside).push_back(monotonic_seconds() - start);
  }
  std::sort(closing.begin(), closing.end());
  std::sort(inside.begin(), inside.end());
  int64_t numbers = config.upper() * config.reach.topk * S * 2 * config.width;
  for (const Tensor& t : model.table.tensors)  // the encoder's are read once a chunk
    if (t.name.find("encoder") == std::string::npos && t.name.find("chunk_") == std::string::npos) numbers += t.size();
  const double n_bytes = static_cast<double>(numbers) * sizeof(typename Device::act);
  print("width ", right(config.width, 4), ", a row of ", slots, " slots, memory on the ", on_host ? "host" : "device",
        ": ", fixed(static_cast<double>(slots) / read_seconds, 0), " slots/s (",
        fixed(100 * forward_flops_per_slot(config, config.reach) * static_cast<double>(slots) / read_seconds / peak, 0),
        "% of the peak), then ", fixed(1 / seconds, 0), " tokens/s (", fixed(100 * n_bytes / seconds / copied, 0),
        "% of a copy's bandwidth), alone and waited for ", fixed(inside[inside.size() / 2] * 1e3, 2),
        " ms, at a chunk's end ", fixed(closing[closing.size() / 2] * 1e3, 2), " ms\n");
}

}  // namespace gca
