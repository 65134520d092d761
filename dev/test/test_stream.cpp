// Rows read in segments: by several at once, with the memory of chunks in the device's memory and on the host's, as one
// whole pass has them; and the places of chunks in fast memory.
#include <chrono>
#include <deque>
#include <thread>

#include "dev/test/decode_check.h"
#include "runtime/stream.h"

namespace gca::test {
namespace {

TEST_CASE("chunk memory: what is fetched lies where its places say, whatever was there before") {
  Cpu<double> cpu(1);
  const int64_t chunks = 200, bytes = 64, most = 6;
  for (const int64_t places : {ChunkRounds::fewest_places(3 + most), int64_t{40}, int64_t{200}}) {
    CAPTURE(places);
    std::vector<char> fast(places * bytes);
    ChunkMemory<Cpu<double>> memory(cpu, chunks, bytes, fast.data(), places);
    const auto content = [&](int64_t chunk) { return std::vector<char>(bytes, static_cast<char>(chunk + 1)); };
    struct Fetched {
      std::vector<int32_t> picks, places;
    };
    std::deque<Fetched> last;  // of this round and the one before it
    int64_t known = 0, wrong = 0;
    for (int64_t round = 0; known < chunks; round++) {
      memory.next_round();
      const int64_t n = std::min<int64_t>(3, chunks - known);
      std::vector<char> fresh;
      for (int64_t i = 0; i < n; i++) {
        const std::vector<char> one = content(known + i);
        fresh.insert(fresh.end(), one.begin(), one.end());
      }
      memory.append(fresh.data(), known, n);
      memory.store(known, n);
      known += n;
      memory.arrive();
      // What the round before this one fetched is read now.
      const auto read = [&](const Fetched& fetched) {
        for (size_t i = 0; i < fetched.picks.size(); i++)
          if (fetched.picks[i] < 0) wrong += fetched.places[i] != -1;
          else wrong += memcmp(&fast[fetched.places[i] * bytes], content(fetched.picks[i]).data(), bytes) != 0;
      };
      if (!last.empty()) read(last.back());
      Fetched fetched{random_ids(most, 7 + static_cast<uint64_t>(round), known + 1), std::vector<int32_t>(most)};
      for (int32_t& pick : fetched.picks) pick--;
      memory.fetch(fetched.places.data(), fetched.picks.data(), most, 0);
      read(fetched);
      last.push_back(fetched);
    }
    CHECK(wrong == 0);
    const MemoryFigures figures = memory.figures();
    CHECK(figures.stored_bytes == chunks * bytes);
    if (places == chunks) CHECK(figures.fetched_bytes == 0);
    else CHECK(figures.fetched_bytes > 0);
    CHECK(figures.fetched_bytes <= figures.asked * bytes);
    CHECK(figures.copy_seconds > 0);
  }
  std::vector<char> fast(4 * bytes);
  ChunkMemory<Cpu<double>> memory(cpu, chunks, bytes, fast.data(), 4);
  memory.next_round();
  std::vector<char> fresh(5 * bytes);
  CHECK_THROWS_AS(memory.append(fresh.data(), 0, 5), Error);
}

// Whose host memory is made ready slowly.
struct SlowDevice : Cpu<double> {
  using Cpu::Cpu;
  void* allocate_host(int64_t n_bytes) {
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    return Cpu::allocate_host(n_bytes);
  }
};

TEST_CASE("chunk memory: what was waited for is counted once, and copies of the memory itself") {
  SlowDevice cpu(1);
  const int64_t bytes = 64;
  std::vector<char> fast(8 * bytes), fresh(bytes);
  ChunkMemory<SlowDevice> memory(cpu, 4, bytes, fast.data(), 8);
  memory.next_round();
  memory.append(fresh.data(), 0, 1);
  memory.store(0, 1);
  const MemoryFigures first = memory.figures();
  CHECK(first.wait_seconds > 0);
  CHECK(first.wait_seconds < 100);
  CHECK(first.copy_seconds > 0);
  memory.append(fresh.data(), 1, 1);
  memory.store(1, 1);
  CHECK(memory.figures().wait_seconds == first.wait_seconds);
  CHECK(memory.figures().copy_seconds > first.copy_seconds);
  ChunkMemory<SlowDevice> other(cpu, 4, bytes, fast.data(), 8);
  CHECK(other.figures().copy_seconds == 0);
}

// What a reader gives for rows of C chunks: final_n of all slots, (B,T,D), and each group's picks and weights, (B,C,K).
struct Read {
  Vec out;
  std::vector<std::vector<int32_t>> pick;
  std::vector<Vec> w;
};
Read read_all(Model<Cpu<double>>& model, const Batch& batch, const ReaderPlan& plan, const Selection& selection) {
  auto& net = model.net;
  const int64_t D = net.config.width, S = net.config.chunk, C = batch.T / S, K = net.reach.topk, B = batch.B;
  RowReader<Cpu<double>> reader(net, plan);
  Read all{Vec(B * batch.T * D), {}, {}};
  all.pick.assign(net.groups.size(), std::vector<int32_t>(B * C * K));
  all.w.assign(net.groups.size(), Vec(B * C * K));
  for (int again = 0; again < 2; again++) {  // a second row leaves nothing of the first
    reader.rewind();
    reader.read(batch.tokens.data(), nullptr, batch.T, batch.T, selection, [&](int64_t first, int64_t T) {
      for (int64_t b = 0; b < B; b++)
        std::copy_n(net.final_n + b * T * D, T * D, all.out.begin() + (b * batch.T + first) * D);
      const std::vector<FetchedChunks> fetched = reader.fetched();
      for (size_t g = 0; g < fetched.size(); g++)
        for (int64_t b = 0; b < B; b++)
          for (int64_t c = 0; c < T / S; c++) {
            const FetchedFor one = fetched[g].serving(b, c);
            std::copy(one.pick.begin(), one.pick.end(), all.pick[g].begin() + (b * C + first / S + c) * K);
            std::copy(one.w.begin(), one.w.end(), all.w[g].begin() + (b * C + first / S + c) * K);
          }
    });
  }
  return all;
}

TEST_CASE("stream: several rows, segments of any length, memory here or on the host: the bits of one whole pass") {
  for (const std::vector<int64_t>& groups : {std::vector<int64_t>{2}, {1, 1}, {1, 2, 1}, {}}) {
    const Config c = small(groups, 5, 3);
    const int64_t C = 14, S = c.chunk, K = c.reach.topk, D = c.width;
    for (const int64_t B : {1, 3}) {
      const Batch batch(c, B, C);
      for (const Picking picking : {Picking::learned, Picking::uniform}) {
        const Selection selection = of_kind(picking);
        Model<Cpu<double>> model(c, B, batch.T, Use::inference);
        forward(model.net, batch, selection);
        const Vec whole = copied(model.net.final_n, B * batch.T * D);
        std::vector<std::vector<int32_t>> picks;
        for (const auto& group : model.net.groups) {
          picks.emplace_back();
          for (int64_t b = 0; b < B; b++)
            for (int64_t i = 0; i < C * K; i++) picks.back().push_back(group.pick[PickTable{C, K}.serving(b, 0) + i]);
        }
        for (const bool on_host : {false, true})
          for (const int64_t segment : {1, 3, 4, 14, 100}) {
            CAPTURE(groups.size());
            CAPTURE(B);
            CAPTURE(on_host);
            CAPTURE(segment);
            ReaderPlan plan{.B = B, .chunks = C, .segment_slots = segment * S * B, .on_host = on_host};
            plan.places = ChunkRounds::fewest_places(plan.of_round(c));
            const Read read = read_all(model, batch, plan, selection);
            CHECK(same_bits(read.out, whole));
            for (size_t g = 0; g < picks.size(); g++) CHECK(read.pick[g] == picks[g]);
          }
      }
    }
  }
}

TEST_CASE("stream: tokens one at a time with the memory on the host, as with it here") {
  const Config c = small({1, 1}, 5, 2);
  const std::vector<int32_t> tokens = random_ids(43, 3, c.vocab - 1);
  const auto logits = [&](bool on_host, size_t at_once) {
    Model<Cpu<double>> model(c, 1, c.chunk, Use::inference);
    RowReader<Cpu<double>> rows(model.net, {.chunks = 12, .segment_slots = 10, .on_host = on_host});
    rows.rewind();
    TokenReader reader(model.net, rows, static_cast<int32_t>(c.vocab - 1));
    for (size_t at = 0; at < tokens.size(); at += at_once)
      reader.read(std::span(tokens).subspan(at, std::min(at_once, tokens.size() - at)));
    return reader.logits();
  };
  const std::vector<float> want = logits(false, 1);
  for (const size_t at_once : {1, 2, 3, 4, 5, 17, 43}) {
    CAPTURE(at_once);
    CHECK(logits(true, at_once) == want);
    CHECK(logits(false, at_once) == want);
  }
}

TEST_CASE("decoding: the tokens that reading and choosing by turns gives, memory here or on the host") {
  Cpu<float> cpu(1);
  for (const std::vector<int64_t>& groups : {std::vector<int64_t>{1, 1}, {}}) {
    check_decoder(cpu, small(groups), 11, 30, true);
    check_slots(cpu, small(groups), 11, 30, 0);
  }
}

TEST_CASE("decoding: texts that go on at once have the tokens that each has alone") {
  Cpu<float> cpu(1);
  for (const std::vector<int64_t>& groups : {std::vector<int64_t>{1, 1}, {}})
    check_texts_at_once(cpu, small(groups), 40, 0);
}

// Slots first .. last - 1 of each row of a batch, read on; final_n of these, (B,last-first,D), and what was fetched.
Read read_part(Model<Cpu<double>>& model, RowReader<Cpu<double>>& reader, const Batch& batch, int64_t first,
               int64_t last) {
  const int64_t D = model.net.config.width, T = last - first;
  Read part{Vec(batch.B * T * D), {}, {}};
  reader.read(batch.tokens.data() + first, nullptr, batch.T, T, {}, [&](int64_t at, int64_t n) {
    for (int64_t b = 0; b < batch.B; b++)
      std::copy_n(model.net.final_n + b * n * D, n * D, part.out.begin() + (b * T + at - first) * D);
    for (const FetchedChunks& fetched : reader.fetched()) {
      part.pick.push_back(fetched.pick);
      part.w.push_back(fetched.w);
    }
  });
  return part;
}

TEST_CASE("stream: a row goes on from a place that was kept with the bits of one that never went further") {
  for (const std::vector<int64_t>& groups : {std::vector<int64_t>{2}, {1, 1}, {}})
    for (const int64_t B : {1, 3}) {
      const Config c = small(groups, 5, 3);
      const int64_t C = 30, S = c.chunk;
      const Batch batch(c, B, C, 1), other(c, B, C, 40), third(c, B, C, 70);
      // Places at a chunk's end and inside one, whose chunk then becomes another.
      for (const int64_t place : {20 * S, 20 * S + 2})
        for (const bool on_host : {false, true})
          for (const int64_t segment : {1, 4}) {
            CAPTURE(groups.size());
            CAPTURE(B);
            CAPTURE(place);
            CAPTURE(on_host);
            CAPTURE(segment);
            ReaderPlan plan{.B = B, .chunks = C, .segment_slots = segment * S * B, .on_host = on_host, .kept = 2};
            plan.places = ChunkRounds::fewest_places(plan.of_round(c)) + 7;
            Model<Cpu<double>> model(c, B, S, Use::inference);
            RowReader<Cpu<double>> reader(model.net, plan);
            const int64_t whole = place / S * S, next = std::min(ceil_div(place + 1, S) * S, C * S);
            const auto begin = [&](const Batch& row) {
              read_part(model, reader, row, 0, whole);
              if (place > whole) read_part(model, reader, row, whole, place);
            };
            const auto rest = [&](const Batch& row) {
              std::vector<Read> all;
              if (place > whole) all.push_back(read_part(model, reader, row, place, next));
              const int64_t from = place > whole ? next : place;
              all.push_back(read_part(model, reader, row, from, (C - 1) * S));
              all.push_back(
                  read_part(model, reader, row, (C - 1) * S, C * S - 3));  // into the unfinished chunk's place
              all.push_back(read_part(model, reader, row, C * S - 3, C * S));
              return all;
            };
            const auto alone = [&](const Batch& tail) {
              reader.rewind();
              begin(batch);
              return rest(tail);
            };
            const std::vector<Read> want_other = alone(other), want_third = alone(third);
            reader.rewind();
            read_part(model, reader, batch, 0, 10 * S);
            reader.keep(1);
            read_part(model, reader, batch, 10 * S, whole);
            if (place > whole) read_part(model, reader, batch, whole, place);
            reader.keep(0);
            const auto check = [&](const Batch& tail, const std::vector<Read>& want) {
              const std::vector<Read> found = rest(tail);
              for (size_t i = 0; i < want.size(); i++) {
                CHECK(same_bits(found[i].out, want[i].out));
                CHECK(found[i].pick == want[i].pick);
                CHECK(found[i].w == want[i].w);
              }
            };
            check(other, want_other);
            CHECK(!same_bits(want_other.back().out, want_third.back().out));
            for (int again = 0; again < 3; again++) {
              reader.back();
              CHECK(reader.slots() == place);
              check(again % 2 ? other : third, again % 2 ? want_other : want_third);
            }
            // Further back, and what was kept beyond is gone; a new row keeps nothing of the old one.
            reader.back(1);
            CHECK(reader.slots() == 10 * S);
            CHECK_THROWS_AS(reader.back(0), Error);
            read_part(model, reader, batch, 10 * S, whole);
            if (place > whole) read_part(model, reader, batch, whole, place);
            check(third, want_third);
            reader.rewind();
            CHECK_THROWS_AS(reader.back(1), Error);
          }
    }
}

TEST_CASE("chunk memory: chunks that were forgotten are appended anew, whatever places they had") {
  Cpu<double> cpu(1);
  const int64_t chunks = 40, bytes = 64, most = 4;
  std::vector<char> fast(24 * bytes);
  ChunkMemory<Cpu<double>> memory(cpu, chunks, bytes, fast.data(), 24);
  std::vector<char> content(chunks);
  int64_t wrong = 0;
  uint64_t seed = 3;
  const auto round = [&](int64_t first, char value) {
    memory.next_round();
    const std::vector<char> fresh(2 * bytes, value);
    memory.append(fresh.data(), first, 2);
    memory.store(first, 2);
    content[first] = content[first + 1] = value;
    memory.arrive();
    std::vector<int32_t> picks = random_ids(most, seed++, first + 2), places(most);
    memory.fetch(places.data(), picks.data(), most, 0);
    for (int64_t i = 0; i < most; i++) wrong += fast[places[i] * bytes] != content[picks[i]];
  };
  char value = 1;
  for (int64_t first = 0; first < 30; first += 2) round(first, value++);
  for (int again = 0; again < 12; again++) {
    memory.forget(20, chunks);
    for (int64_t first = 20; first < 20 + 2 * (again % 5 + 1); first += 2) round(first, value++);
  }
  CHECK(wrong == 0);
  memory.next_round();
  const std::vector<char> fresh(bytes);
  CHECK_THROWS_AS(memory.append(fresh.data(), 20, 1), Error);  // it is there
}

}  // namespace
}  // namespace gca::test
