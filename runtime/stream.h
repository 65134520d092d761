// A row read a segment at a time: window caches, the chunk memory and the picks go on from segment to segment
// (DRT::StreamState), so a text of any length needs the activations of one segment only.
#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "model.h"
#include "runtime/chunk_memory.h"

namespace gca {

// How rows are read.
struct ReaderPlan {
  int64_t B = 1, chunks = 1;  // rows at once, all alike; chunks of each at most
  int64_t segment_slots = 1;  // slots at once, of all rows together (a chunk of each row at least)
  bool on_host = false;       // the memory of chunks lies in host memory
  int64_t places = 0;         // on_host: chunks that the device's memory holds; 0: twice what rounds need
  int64_t kept = 0;           // how many places in the rows can be kept at once, to go back to
  int64_t readers = 1;        // of one model, by turns, whose rows Decoder reads on with at once

  int64_t segment_chunks(const Config& c) const {
    return std::clamp<int64_t>(segment_slots / B / c.chunk, 1, std::max<int64_t>(chunks, 1));
  }
  // Chunks that a segment makes and asks for, at most.
  int64_t of_round(const Config& c) const {
    const int64_t n = segment_chunks(c);
    return B * n * (1 + std::ssize(c.groups) * c.reach.topk);
  }
  int64_t places_for(const Config& c) const {
    return std::min(places ? places : 2 * ChunkRounds::fewest_places(of_round(c)),
                    std::max(B * chunks, ChunkRounds::fewest_places(of_round(c))));
  }
};

// Of the device's memory and of the host's.
struct ReaderBytes {
  int64_t device, host;
};

// What a group fetched for one chunk: picks (-1: none) and their weights, (K).
struct FetchedFor {
  std::vector<int32_t> pick;
  std::vector<double> w;
};
// What a group fetched for B rows of C chunks: picks (-1: none) and their weights, by table.
struct FetchedChunks {
  PickTable table;
  std::vector<int32_t> pick;
  std::vector<double> w;
  FetchedFor serving(int64_t b, int64_t c) const {
    const int64_t first = table.serving(b, c);
    return {{pick.begin() + first, pick.begin() + first + table.K}, {w.begin() + first, w.begin() + first + table.K}};
  }
};

// Rows of slots, all alike, read from their beginning. With the memory of chunks on the host, what a segment's groups
// fetch is copied while the segments before and after it are computed: in round t the lower part of segment t, then
// what group g does for segment t - 1 - g.
template <class Device>
class RowReader {
 public:
  using Net = DRT<Device>;
  using act = typename Net::act;
  using stat = typename Net::stat;

  // model: for inference, allocated; its activations become this reader's, or those of all readers of that plan,
  // of which each from the second on finds them laid out.
  RowReader(Net& model, const ReaderPlan& plan, bool laid_out = false)
      : model_(model), segment_(plan.segment_chunks(model.config) * model.config.chunk), kept_(plan.kept) {
    if (!laid_out) {
      lay_out(model, plan);
      model_.commit_activations();
    }
    const bool on_host = plan.on_host && !model_.groups.empty();
    model_.open(stream_, plan.B, plan.chunks, !on_host);
    for (auto& kept : kept_) model_.open(kept, plan.B, 0, false);
    forget_kept(-1);
    rows_ = stream_.rows;
    if (!on_host) return;
    held_.plan(model_, plan);
    held_.allocate(model_);
    memory_ = std::make_unique<ChunkMemory<Device>>(model_.device, plan.B * plan.chunks, chunk_bytes(model_.config),
                                                    held_.places, plan.places_for(model_.config));
  }
  ~RowReader() {
    memory_.reset();
    held_.release(model_);
    for (auto& kept : kept_) model_.close(kept);
    model_.close(stream_);
  }
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;

  // What all readers of a plan take beside the model's own buffers, of the device's memory and of the host's, before
  // anything is allocated.
  static ReaderBytes memory_bytes(Net& model, const ReaderPlan& plan) {
    lay_out(model, plan);
    const bool on_host = plan.on_host && !model.groups.empty();
    typename Net::StreamState stream;
    model.plan(stream, plan.B, plan.chunks, !on_host);
    typename Net::StreamState kept;
    model.plan(kept, plan.B, 0, false);
    Held held;
    if (on_host) held.plan(model, plan);
    return {model.activation_memory().total_bytes() +
                plan.readers *
                    (stream.arena.total_bytes() + plan.kept * kept.arena.total_bytes() + held.arena.total_bytes()),
            on_host ? plan.readers * plan.B * plan.chunks * chunk_bytes(model.config) : 0};
  }

  // What it and the model have taken.
  ReaderBytes bytes() const {
    int64_t kept = 0;
    for (const auto& state : kept_) kept += state.arena.total_bytes();
    return {model_.model_memory().total_bytes() + model_.activation_memory().total_bytes() +
                stream_.arena.total_bytes() + kept + held_.arena.total_bytes(),
            memory_ ? stream_.B * stream_.capacity * chunk_bytes(model_.config) : 0};
  }

  // To the beginning of new rows.
  void rewind() {
    model_.rewind(stream_);
    forget_kept(-1);
    if (memory_) memory_->clear();
    serving_stale_ = true;
  }
  // The place where the rows are now, as number i of plan.kept: all that later slots read but the memory of chunks,
  // which stays where it is.
  void keep(size_t i = 0) { copy_state(kept_.at(i), stream_); }
  // To that place, as if nothing had been read after it: other slots may follow. Places kept further on are lost.
  void back(size_t i = 0) {
    const auto& kept = kept_.at(i);
    GCA_CHECK(kept.slots >= 0, "place ", i, " was kept of these rows, and nothing before it was gone back to");
    copy_state(stream_, kept);
    forget_kept(stream_.slots);
    serving_stale_ = true;
    if (!memory_) return;
    for (int64_t b = 0; b < stream_.B; b++)
      memory_->forget(b * stream_.capacity + stream_.slots / model_.config.chunk, (b + 1) * stream_.capacity);
  }
  int64_t slots() const { return stream_.slots; }
  // What state() points at, and host_memory(), have been written from outside: the rows go on after so many slots.
  void go_on_after(int64_t slots) {
    stream_.slots = slots;
    forget_kept(-1);
    serving_stale_ = true;
    if (memory_) memory_->clear();
  }
  const typename Net::StreamState& state() const { return stream_; }
  // Where the memory of chunks lies on the host; or null.
  ChunkMemory<Device>* host_memory() { return memory_.get(); }

  // The next `count` slots of each row, whole chunks from a chunk's beginning, or slots of one chunk: row b's at slots
  // + b * stride, and so their targets where there are some. For each segment: picked(g, first, T) when group g has
  // picked for it (its r and pick table, and the landmarks up to there, are in the model and the stream); after(first,
  // T) when the model holds what comes out of slots first .. first + T - 1 of each row (final_n, (B,T,D)).
  template <class Picked, class After>
  void read(const int32_t* slots, const int32_t* targets, int64_t stride, int64_t count, const Selection& selection,
            Picked picked, After after) {
    const int64_t segments = ceil_div(count, segment_), G = std::ssize(model_.groups), lag = memory_ ? 1 : 0;
    std::vector<Segment> at_work(segments);  // those that are begun and not done
    for (int64_t t = 0; t < segments + G * lag; t++) {
      if (memory_) memory_->next_round();
      if (t < segments) {
        Segment& segment = at_work[t];
        segment.T = std::min(segment_, count - t * segment_);
        segment.from = t * segment_;
        segment.number = t;
        begin(segment, slots, stride, selection);
        if (G) picked(size_t{0}, segment.first(), segment.T);
        if (G && memory_) hold(segment, 0);
        if (!G) give(segment, targets, stride, after);
      }
      if (memory_) memory_->arrive();
      for (int64_t g = 0; g < G; g++) {
        const int64_t number = t - (1 + g) * lag;
        if (number < 0 || number >= segments) continue;
        Segment& segment = at_work[number];
        if (memory_) take(segment.pass);
        model_.group_part(segment.pass, g);
        if (g + 1 < G) picked(static_cast<size_t>(g + 1), segment.first(), segment.T);
        if (g + 1 < G && memory_) hold(segment, g + 1);
        if (g + 1 == G) give(segment, targets, stride, after);
      }
      if (memory_)
        for (int64_t g = 0; g < G; g++)
          if (const int64_t number = t - g; number >= 0 && number < segments) fetch(at_work[number], g);
    }
  }
  template <class After>
  void read(const int32_t* slots, const int32_t* targets, int64_t stride, int64_t count, const Selection& selection,
            After after) {
    read(
        slots, targets, stride, count, selection, [](size_t, int64_t, int64_t) {}, after);
  }

  // One more slot of each row, whose token is in model.token already: what read() does for it, put on the device's
  // stream without a wait after prepare_slot(). The last one of a chunk is a landmark.
  void read_slot(const Selection& selection) {
    prepare_slot();
    model_.read_slots(rows_, stream_.B);
    slot_was_read(0, selection);
  }
  // Whether the next slot is a landmark's.
  bool slot_closes() const { return stream_.slots % model_.config.chunk == model_.config.chunk - 1; }
  // What read_slot() may have to wait for, so that nothing in it does; the device is told where the rows stand.
  void prepare_slot() {
    if (memory_ && serving_stale_) refresh_serving();
    if (rows_slot_ == stream_.slots) return;
    std::vector<typename Net::Row> rows;
    for (int64_t b = 0; b < stream_.B; b++) {
      rows.push_back(model_.slot_row(stream_, b));
      if (!memory_) continue;
      rows.back().kv = reinterpret_cast<const act*>(held_.places);
      rows.back().pick = held_.serving + b * model_.reach.topk;
      rows.back().pick_stride = stream_.B * model_.reach.topk;
    }
    model_.device.upload(rows_, rows.data(), std::ssize(rows) * static_cast<int64_t>(sizeof rows[0]));
    rows_slot_ = stream_.slots;
  }
  // What the ops of one slot read of the rows lies there on the device from now on, (B).
  void keep_rows_at(typename Net::Row* rows) {
    rows_ = rows;
    rows_slot_ = -1;
  }
  // A slot of each row has been read by model.read_slots(), as rows first .. of those. A landmark's closes the chunk:
  // before model.read_slots() is called again.
  void slot_was_read(int64_t first, const Selection& selection) {
    const bool closed = slot_closes();
    rows_slot_ = ++stream_.slots;
    if (!closed) return;
    if (memory_) memory_->next_round();
    model_.close_chunks(stream_, first, selection);
    if (memory_) put_away(stream_.slots / model_.config.chunk - 1, 1);
    serving_stale_ = true;
  }

  // In after(): what each group fetched for the segment.
  std::vector<FetchedChunks> fetched() const {
    std::vector<FetchedChunks> all;
    for (size_t g = 0; g < model_.groups.size(); g++) {
      const PickTable table = given_->table(model_);
      if (memory_) {
        all.push_back({table, given_->pick[g], {given_->w[g].begin(), given_->w[g].end()}});
        continue;
      }
      std::vector<int32_t> pick(table.size(stream_.B));
      std::vector<stat> w(pick.size());
      const auto& tables = given_->pass.place.picks[g];
      model_.device.download(pick.data(), tables.pick, static_cast<int64_t>(pick.size() * sizeof(int32_t)));
      model_.device.download(w.data(), tables.w, static_cast<int64_t>(w.size() * sizeof(stat)));
      all.push_back({table, std::move(pick), {w.begin(), w.end()}});
    }
    return all;
  }

 private:
  // A segment on its way: slots from .. from + T - 1 of those that read() got.
  struct Segment {
    int64_t number, from, T;
    typename Net::Pass pass;
    // With the memory on the host, a group: (B,C+1,K) both.
    std::vector<std::vector<int32_t>> pick;
    std::vector<std::vector<stat>> w;
    int64_t first() const { return pass.place.first_slot; }
    PickTable table(const Net& model) const {
      const int64_t S = model.config.chunk;
      return {(first() + T - 1) / S - first() / S + 1, model.reach.topk};
    }
  };
  // What is kept of two segments between their parts, a group: by the number of the segment, even or odd.
  struct Held {
    Arena arena;
    char* places = nullptr;                      // of ChunkMemory
    std::vector<std::array<act*, 2>> x;          // (B,T,D)
    std::vector<std::array<int32_t*, 2>> place;  // (B,C+1,K) where the picks lie
    std::vector<std::array<stat*, 2>> w;         // (B,C+1,K)
    int32_t* serving = nullptr;                  // (groups,B,K) where the picks for the next slots lie
    // The same in host memory, where a copy of them arrives.
    std::vector<std::array<int32_t*, 2>> host_pick;
    std::vector<std::array<stat*, 2>> host_w;
    char* host = nullptr;
    int64_t host_bytes = 0;

    void plan(const Net& model, const ReaderPlan& plan) {
      const Config& c = model.config;
      const int64_t C = plan.segment_chunks(c), table = PickTable{C, c.reach.topk}.size(plan.B);
      const size_t G = c.groups.size();
      arena.want(places, "chunks in fast memory", plan.places_for(c) * chunk_bytes(c));
      x.resize(G);
      place.resize(G);
      w.resize(G);
      host_pick.resize(G);
      host_w.resize(G);
      host_bytes = std::ssize(c.groups) * 2 * table * static_cast<int64_t>(sizeof(int32_t) + sizeof(stat));
      arena.want(serving, "places of the last picks", std::ssize(c.groups) * plan.B * c.reach.topk);
      for (size_t g = 0; g < G; g++)
        for (size_t i = 0; i < 2; i++) {
          arena.want(x[g][i], "x between parts", plan.B * C * c.chunk * c.width);
          arena.want(place[g][i], "places of picks", table);
          arena.want(w[g][i], "weights of picks", table);
        }
    }
    void allocate(Net& model) {
      arena.commit(model.device);
      host = static_cast<char*>(model.device.allocate_host(host_bytes));
      char* at = host;
      const int64_t table = host_bytes / std::ssize(x) / 2 / static_cast<int64_t>(sizeof(int32_t) + sizeof(stat));
      for (size_t g = 0; g < x.size(); g++)
        for (size_t i = 0; i < 2; i++) {
          host_w[g][i] = reinterpret_cast<stat*>(at);
          at += table * static_cast<int64_t>(sizeof(stat));
        }
      for (size_t g = 0; g < x.size(); g++)
        for (size_t i = 0; i < 2; i++) {
          host_pick[g][i] = reinterpret_cast<int32_t*>(at);
          at += table * static_cast<int64_t>(sizeof(int32_t));
        }
    }
    void release(Net& model) {
      arena.release(model.device);
      if (host) model.device.release_host(host, host_bytes);
      host = nullptr;
    }
  };
  static void lay_out(Net& model, const ReaderPlan& plan) {
    model.plan(plan.B, std::max(plan.segment_chunks(model.config) * model.config.chunk, plan.readers));
  }
  static int64_t chunk_bytes(const Config& c) { return c.chunk * 2 * c.width * static_cast<int64_t>(sizeof(act)); }

  // The lower part of the next segment; with the memory on the host, the chunks that it makes go there.
  void begin(Segment& segment, const int32_t* slots, int64_t stride, const Selection& selection) {
    const int64_t B = stream_.B, S = model_.config.chunk;
    std::vector<int32_t> piece;
    for (int64_t b = 0; b < B; b++) {
      const int32_t* from = slots + b * stride + segment.from;
      piece.insert(piece.end(), from, from + segment.T);
    }
    model_.upload(piece.data(), nullptr, nullptr, B * segment.T);
    segment.pass = model_.begin({B, segment.T, selection, &stream_});
    model_.lower_part(segment.pass);
    const int64_t first_chunk = segment.first() / S;
    if (memory_) put_away(first_chunk, (segment.first() + segment.T) / S - first_chunk);
    serving_stale_ = true;
  }
  // The chunks that the last lower part has made, into the memory on the host.
  void put_away(int64_t first_chunk, int64_t done) {
    const int64_t chunk = model_.config.chunk * 2 * model_.config.width;
    for (int64_t b = 0; b < stream_.B; b++)
      memory_->append(model_.kv + b * done * chunk, b * stream_.capacity + first_chunk, done);
    for (int64_t b = 0; b < stream_.B; b++) memory_->store(b * stream_.capacity + first_chunk, done);
  }
  // The chunks that serve the slots after a whole chunk: where they lie, once the picks are known.
  void refresh_serving() {
    const int64_t B = stream_.B, K = model_.reach.topk;
    memory_->next_round();
    for (size_t g = 0; g < model_.groups.size(); g++) {
      std::vector<int32_t> picks(B * K), places(B * K, -1);
      const int64_t n_bytes = B * K * static_cast<int64_t>(sizeof(int32_t));
      model_.device.download(picks.data(), stream_.pick[g], n_bytes);
      for (int64_t b = 0; b < B; b++) memory_->fetch(&places[b * K], &picks[b * K], K, b * stream_.capacity);
      model_.device.upload(held_.serving + static_cast<int64_t>(g) * B * K, places.data(), n_bytes);
    }
    memory_->arrive();
    serving_stale_ = false;
  }
  // What group g will read of a segment is put where the next one's parts leave it alone.
  void hold(Segment& segment, size_t g) {
    const size_t i = segment.number % 2;
    const int64_t table = segment.table(model_).size(stream_.B);
    auto& picks = segment.pass.place.picks[g];
    model_.device.copy(held_.x[g][i], segment.pass.x, stream_.B * segment.T * model_.config.width);
    model_.device.copy(held_.w[g][i], picks.w, table);
    model_.device.side_waits();
    model_.device.side_download(held_.host_pick[g][i], picks.pick, table * static_cast<int64_t>(sizeof(int32_t)));
    model_.device.side_download(held_.host_w[g][i], picks.w, table * static_cast<int64_t>(sizeof(stat)));
    segment.pass.x = held_.x[g][i];
    picks = {held_.place[g][i], held_.w[g][i]};
  }
  // Its picks are known: the chunks that are not there are copied.
  void fetch(Segment& segment, size_t g) {
    const size_t i = segment.number % 2;
    const int64_t of_row = segment.table(model_).size(1), B = stream_.B;
    model_.device.side_synchronize();
    segment.pick.emplace_back(held_.host_pick[g][i], held_.host_pick[g][i] + B * of_row);
    segment.w.emplace_back(held_.host_w[g][i], held_.host_w[g][i] + B * of_row);
    std::vector<int32_t> places(B * of_row, -1);
    const int64_t serving = of_row - model_.reach.topk;  // the last row of the table is for the segment after this
    for (int64_t b = 0; b < B; b++)
      memory_->fetch(&places[b * of_row], &segment.pick[g][b * of_row], serving, b * stream_.capacity);
    model_.device.upload(held_.place[g][i], places.data(), B * of_row * 4);
  }
  void take(typename Net::Pass& pass) const {
    pass.place.kv = reinterpret_cast<const act*>(held_.places);
    pass.place.kv_chunks = 0;  // all rows' chunks lie among the same places
  }
  // All of a stream but its memory of chunks.
  void copy_state(typename Net::StreamState& to, const typename Net::StreamState& from) {
    const int64_t B = from.B, D = model_.config.width;
    to.slots = from.slots;
    for (size_t l = 0; l < from.rings.size(); l++)
      model_.device.copy(to.rings[l], from.rings[l], B * from.reach.window * 2 * D);
    for (size_t g = 0; g < from.pick.size(); g++) {
      model_.device.copy(to.pick[g], from.pick[g], B * from.reach.topk);
      model_.device.copy(to.w[g], from.w[g], B * from.reach.topk);
    }
    if (from.unfinished_chunk)
      model_.device.copy(to.unfinished_chunk, from.unfinished_chunk, B * model_.config.chunk * D);
  }
  // Kept places of more than so many slots.
  void forget_kept(int64_t slots) {
    for (auto& kept : kept_)
      if (kept.slots > slots) kept.slots = -1;
  }
  template <class After>
  void give(const Segment& segment, const int32_t* targets, int64_t stride, After after) {
    if (targets) {
      std::vector<int32_t> piece;
      for (int64_t b = 0; b < stream_.B; b++) {
        const int32_t* from = targets + b * stride + segment.from;
        piece.insert(piece.end(), from, from + segment.T);
      }
      model_.device.upload(model_.target, piece.data(), std::ssize(piece) * 4);
    }
    given_ = &segment;
    after(segment.first(), segment.T);
    given_ = nullptr;
  }

  Net& model_;
  int64_t segment_;  // slots of a row at once: whole chunks
  typename Net::StreamState stream_;
  std::vector<typename Net::StreamState> kept_;  // of no chunks; slots -1: nothing is kept there
  Held held_;
  std::unique_ptr<ChunkMemory<Device>> memory_;
  const Segment* given_ = nullptr;     // the one that after() is called for
  bool serving_stale_ = true;          // held_.serving is not that of the last whole chunk
  typename Net::Row* rows_ = nullptr;  // (B) on the device, stream_.rows or wherever keep_rows_at() says
  int64_t rows_slot_ = -1;             // the slot where they stand there; -1: they do not say
};

// One row of real tokens; the landmarks are put in.
template <class Device>
class TokenReader {
 public:
  // rows: a reader of one row, at its beginning.
  TokenReader(DRT<Device>& model, RowReader<Device>& rows, int32_t landmark)
      : model_(model), rows_(rows), landmark_(landmark), S_(model.config.chunk) {}

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
  DRT<Device>& model_;
  RowReader<Device>& rows_;
  int32_t landmark_;
  int64_t S_;
};

// The next token. temperature 0: the largest logit, the lowest id among equals. Otherwise a draw from the smallest set
// of tokens whose probability reaches top_p, by the random number of (seed, index).
int32_t sample_token(const std::vector<float>& logits, double temperature, double top_p, uint64_t seed, int64_t index);

}  // namespace gca
