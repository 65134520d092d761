// Streams on the GPU: the memory of chunks on the host holds the bits that the GPU's own would, in float and bf16, and
// retrieval in segments of any length picks what one call picks (test_gpu_retrieval.cpp).
#include "dev/test/gpu_test.h"
#include "dev/test/decode_check.h"
#include "runtime/memory_file.h"
#include "runtime/stream.h"

namespace gca::test {
namespace {

Config two_heads(std::vector<int64_t> groups, int64_t chunk, int64_t window) {
  return {.vocab = 67,
          .width = 64,
          .heads = 2,
          .ffn = 96,
          .lower = 1,
          .groups = std::move(groups),
          .encoder = 1,
          .chunk = chunk,
          .reach = {.topk = 3, .window = window}};
}

template <class Device>
void check_host_memory(const Config& config, int64_t C) {
  using act = typename Device::act;
  Device& device = *shared_device<Device>();
  DRT<Device> net(device, config, Use::inference);
  ThreadPool pool(2);
  net.allocate();
  net.initialise(3, pool);
  const int64_t S = config.chunk, D = config.width;
  for (const int64_t B : {1, 2}) {
    const Batch batch(config, B, C);
    const auto read = [&](bool on_host, int64_t segment, int64_t places) {
      RowReader<Device> reader(
          net, {.B = B, .chunks = C, .segment_slots = segment * S * B, .on_host = on_host, .places = places});
      std::vector<act> out(B * batch.T * D), piece;
      for (int again = 0; again < 2; again++) {
        reader.rewind();
        reader.read(batch.tokens.data(), nullptr, batch.T, batch.T, {}, [&](int64_t first, int64_t T) {
          piece.resize(B * T * D);
          device.download(piece.data(), net.final_n, static_cast<int64_t>(piece.size() * sizeof(act)));
          for (int64_t b = 0; b < B; b++)
            std::copy_n(piece.begin() + b * T * D, T * D, out.begin() + (b * batch.T + first) * D);
        });
      }
      return out;
    };
    for (const int64_t segment : {1, 3, 16}) {
      CAPTURE(B);
      CAPTURE(segment);
      const std::vector<act> want = read(false, segment, 0);
      CHECK(same_bits(read(true, segment, 0), want));
      const int64_t fewest = ChunkRounds::fewest_places(
          ReaderPlan{.B = B, .chunks = C, .segment_slots = segment * S * B}.of_round(config));
      CHECK(same_bits(read(true, segment, fewest), want));
    }
  }
}

// Rows that went further, and back to a place that was kept, go on as rows that never did; so do rows whose memory came
// out of a file.
template <class Device>
void check_kept(const Config& config, int64_t C, int64_t place) {
  using act = typename Device::act;
  Device& device = *shared_device<Device>();
  DRT<Device> net(device, config, Use::inference);
  ThreadPool pool(2);
  net.allocate();
  net.initialise(3, pool);
  const int64_t S = config.chunk, D = config.width;
  const Batch first(config, 1, C), second(config, 1, C, 9);
  const TempFolder folder;
  const auto read = [&](RowReader<Device>& reader, const Batch& batch, int64_t from, int64_t last) {
    std::vector<act> out, piece;
    reader.read(batch.tokens.data() + from, nullptr, 0, last - from, {}, [&](int64_t, int64_t T) {
      piece.resize(T * D);
      device.download(piece.data(), net.final_n, static_cast<int64_t>(piece.size() * sizeof(act)));
      out.insert(out.end(), piece.begin(), piece.end());
    });
    return out;
  };
  std::vector<act> want;
  for (const bool on_host : {false, true}) {
    CAPTURE(on_host);
    RowReader<Device> reader(net, {.chunks = C, .segment_slots = 4 * S, .on_host = on_host, .kept = 1});
    reader.rewind();
    read(reader, first, 0, place);
    if (want.empty()) want = read(reader, second, place, C * S);
    reader.rewind();
    read(reader, first, 0, place);
    reader.keep();
    save_memory(folder.path + "/memory", memory_fields(net, 1), "", net, reader);
    read(reader, first, place, C * S);
    for (int again = 0; again < 2; again++) {
      reader.back();
      CHECK(same_bits(read(reader, second, place, C * S), want));
    }
    for (const bool loads_to_host : {false, true}) {
      RowReader<Device> other(net, {.chunks = C, .segment_slots = 4 * S, .on_host = loads_to_host});
      other.rewind();
      read(other, second, 0, C * S);
      load_memory(MemoryFile(folder.path + "/memory", memory_fields(net, 1)), net, other);
      CHECK(same_bits(read(other, second, place, C * S), want));
    }
  }
}

TEST_CASE("GPU: rows go back to a place that was kept, and on after a memory out of a file, with the same bits") {
  if (no_gpu()) return;
  Config config = two_heads({2, 1}, 64, 70);
  check_kept<Gpu<__nv_bfloat16>>(config, 40, 24 * 64);
  config.chunk = 16;
  check_kept<Gpu<__nv_bfloat16>>(config, 50, 32 * 16);
  check_kept<Gpu<float>>(config, 50, 32 * 16);
}

TEST_CASE("GPU: a stream with its memory on the host has the bits of one with its memory here") {
  if (no_gpu()) return;
  Config config = two_heads({1}, 64, 70);
  check_host_memory<Gpu<__nv_bfloat16>>(config, 40);
  config.groups = {2, 1};
  config.chunk = 16;
  check_host_memory<Gpu<__nv_bfloat16>>(config, 50);
  check_host_memory<Gpu<float>>(config, 50);
}

TEST_CASE("GPU: decoding gives the tokens that reading and choosing by turns gives, memory here or on the host") {
  if (no_gpu()) return;
  for (const int64_t window : {32, 40, 1000}) {
    Config config = two_heads({2, 1}, 16, window);
    CAPTURE(window);
    check_decoder(*shared_device<Gpu<float>>(), config, 50, 200, false);
    check_decoder(*shared_device<Gpu<__nv_bfloat16>>(), config, 50, 200, false);
    check_slots(*shared_device<Gpu<float>>(), config, 50, 100, 1e-5);
    check_slots(*shared_device<Gpu<__nv_bfloat16>>(), config, 50, 100, 0.02);
    config.groups = {};
    config.encoder = 0;
    check_decoder(*shared_device<Gpu<__nv_bfloat16>>(), config, 50, 100, false);
    check_slots(*shared_device<Gpu<__nv_bfloat16>>(), config, 50, 100, 0.02);
  }
}

TEST_CASE("GPU: texts that go on at once have the tokens that each has alone") {
  if (no_gpu()) return;
  const Config config = two_heads({2, 1}, 16, 40);
  check_texts_at_once(*shared_device<Gpu<float>>(), config, 100, 1e-3);
  check_texts_at_once(*shared_device<Gpu<__nv_bfloat16>>(), config, 100, 1e-3);
}

}  // namespace
}  // namespace gca::test
