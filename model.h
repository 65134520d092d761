// A DRT at work (drt.md; Hu et al., ICML 2025): its flat buffers, and forward and backward written once over a backend,
// Cpu (gca_cpu.h) or Gpu (gca_kernels.cuh), which have the same ops. Its sizes and its tensors stand in config.h.
#pragma once
#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "common.h"
#include "config.h"
#include "ops.h"
#include "base/arena.h"
#include "base/threads.h"
#include "ranks/collectives.h"
#include "ranks/shards.h"

namespace gca {

// ---- the model ----------------------------------------------------------------------------------------------------
enum class Use { training, inference };  // inference keeps nothing for backward
// What backward computes anew instead of keeping it, with the same bits: nothing; what comes out of norms and SwiGLU;
// all of a layer but its output and what gca_backward_memory reads.
enum class Recompute { none, norms, layers };
// Which of how many ranks trains this copy of a model, and elements of a bucket of its gradient, about: large enough
// for a link's full speed, small enough that little is left to send when backward ends.
struct Share {
  int rank = 0, ranks = 1;
  int64_t bucket_size = ranks > 1 ? 8 << 20 : 0;  // 0: one bucket
};

template <class Device>
struct DRT {
  using act = typename Device::act;
  using weight = typename Device::weight;
  using master = typename Device::master;
  using grad = typename Device::grad;
  using stat = typename Device::stat;
  using Row = SlotRow<act, stat>;
  enum class Kind { lower, encoder, upper };

  // A layer: where its tensors lie, and what its forward leaves for its backward. rows: slots of all rows together.
  //   a = x + Wo attended;  upper kind: mlp_in = a + Wo' fetched, else mlp_in = a;  out = a + MLP(Norm(mlp_in))
  struct Layer {
    LayerTensors tensors;
    int64_t number;  // among the lower and upper layers, whose windows have rings
    act* n1;         // (rows,D)    Norm(x)
    stat* rstd1;     // (rows)
    act* qkv;        // (rows,3D)   q | k | v
    act* attended;   // (rows,D)
    stat* lse;       // (B,H,T), in the encoder (N,H,S)
    act* a;          // (rows,D)
    act* n2;         // (rows,D)    Norm(mlp_in)
    stat* rstd2;     // (rows)
    act* gate_up;    // (rows,2F)   gate | up; in backward their gradient, and then q|k|v's
    act* h;          // (rows,F)    silu(gate) * up
    act* out;        // (rows,D)
    // Upper kind.
    act* gca_n;      // (B,T,D)     Norm(a)
    stat* gca_rstd;  // (B,T)
    act* q;          // (B,T,D)     of GCA
    act* fetched;    // (B,T,D)     the o of GCA; in backward its gradient
    act* mlp_in;     // (B,T,D)
    stat* gca_lse;   // (B,C,K,H,S)
    stat* delta;     // (B,C,K,H,S) rowsum(P dP), from gca_backward_query to gca_backward_memory
  };
  struct Group {
    std::vector<Layer> layers;
    int64_t lmk_norm;          // its gain in the flat buffers
    act* r;                    // (B,C,D)    Norm(x at the landmarks), the queries of the retrieval
    stat* r_rstd;              // (B,C)
    int32_t* pick;             // (B,C+1,K)  the pick table, see PickTable
    stat *w, *dw;              // (B,C+1,K)  weights of its picks
    int32_t *start, *fetches;  // (B,C+1), (B,C*K): who fetched each chunk, of invert_picks
  };
  // What B rows leave behind for their later slots, when they are read a segment at a time, all alike.
  struct StreamState {
    int64_t B = 1;
    Reach reach;              // the model's, when it was opened
    int64_t slots = 0;        // read so far, of each row
    int64_t capacity = 0;     // chunks of memory a row
    std::vector<act*> rings;  // (B,W,2D) a layer, lower ones first, all equally far apart: k | v of the window's slots
    std::vector<int32_t*> pick;  // (B,K) a group, likewise: what the last whole chunk picked, for the slots that follow
    std::vector<stat*> w;        // (B,K) a group, likewise: the weights of these
    act* kv = nullptr;           // (B,capacity,S,2D) CK | CV
    act* landmarks = nullptr;    // (B,capacity,D)
    act* unfinished_chunk = nullptr;  // (B,S,D) lower layers' output for the slots of a chunk that is not yet whole
    Row* rows = nullptr;              // (B) for who reads slot by slot: see slot_row()
    Arena arena;
  };
  // What one forward pass reads.
  struct Input {
    int64_t B, T;
    Selection selection;
    StreamState* stream = nullptr;
    double score_gradient = 1;  // backward multiplies the gradient of the retrieval's scores by it
  };

  // Where a pass finds what lies before its slots and leaves what comes from them: the model's own buffers (whole rows,
  // nothing before them), or a stream's. begin() decides; nothing after it asks which.
  struct Place {
    int64_t first_slot;       // number of the first slot in its row
    int64_t capacity;         // M, chunks of memory a row
    std::vector<act*> rings;  // (B,W,2D) a layer, or null: nothing before, nothing to leave
    const act* landmarks;     // landmark m of row b at b * landmark_row_stride + m * landmark_stride, (D)
    int64_t landmark_stride, landmark_row_stride;
    act *kept_kv, *kept_landmarks;  // (B,M,S,2D), (B,M,D) where a pass copies what it makes of both, or null: they stay
    act* unfinished_chunk;          // (B,S,D), or null: all chunks are whole
    StreamState* last_picks;        // whose pick and w serve the first slots, and get the last ones; or null: no pick
    // What the groups' layers read: chunk m of row b at kv + (b * kv_chunks + m) chunks, and a group's picks among
    // them.
    const act* kv;  // (..,S,2D)
    int64_t kv_chunks;
    struct Picks {
      const int32_t* pick;  // (B,C+1,K)
      const stat* w;        // (B,C+1,K)
    };
    std::vector<Picks> picks;  // a group
  };
  // One forward pass as far as it has come.
  struct Pass {
    Input in;
    Place place;
    const act* x;         // (B,T,D) what enters the next part
    Row* rows = nullptr;  // (B), T = 1, of read_slots(); or null
  };

  Device& device;
  const Config config;
  const TensorTable table;
  const Shards shards;
  // Of several ranks, what they do together; null where there is one. Set before initialise() and update().
  Collectives* collectives = nullptr;
  // Flat buffers, (shards.size) each; adam_m, adam_v and, where weights are apart, masters: (shards.share()).
  master *masters = nullptr, *adam_m = nullptr, *adam_v = nullptr;  // weights, Adam's first and second moments
  weight* weights = nullptr;                                        // the masters themselves where the backend says so
  grad* gradient = nullptr;
  StepState* state = nullptr;             // (1), on the device
  Reach reach;                            // of the passes that follow, at most config's: who needs K or W asks here
  Recompute recompute = Recompute::none;  // in training; before plan()
  // Called in backward order when a stretch of the gradient is final: where ranks reduce.
  std::function<void(int64_t begin, int64_t end)> grads_ready = [](int64_t, int64_t) {};

  std::vector<Layer> lower, encoder;
  std::vector<Group> groups;
  int32_t *token = nullptr, *target = nullptr;           // (B,T)
  float* slot_weight = nullptr;                          // (B,T)
  act* embedded = nullptr;                               // (B,T,D)
  act *enc_in = nullptr, *enc_out = nullptr;             // (B,C,S,D) before and after the encoder's layers, normed
  stat *enc_in_rstd = nullptr, *enc_out_rstd = nullptr;  // (B,C,S)
  act* kv = nullptr;                                     // (B,C,S,2D) CK | CV, the landmarks' rows zero
  const act* top = nullptr;                              // (B,T,D) the last layer's output
  act* final_n = nullptr;                                // (B,T,D) Norm(top)
  stat *final_rstd = nullptr, *loss = nullptr;           // (B,T)
  act* logits = nullptr;                                 // (logits_rows(),padded_vocab), of a piece of the slots

  DRT(Device& device_, const Config& config_, Use use_ = Use::training, const Share& share = {});
  ~DRT();
  DRT(const DRT&) = delete;
  DRT& operator=(const DRT&) = delete;

  // Allocates the model's own buffers, all zero. Before it, model_memory() tells what that takes.
  void allocate();
  const Arena& model_memory() const { return model_; }
  const Arena& activation_memory() const { return activations_; }

  // Lays out the activations for passes of up to B rows of T slots; commit_activations() then allocates them.
  void plan(int64_t B, int64_t T);
  void commit_activations() { activations_.commit(device); }

  // ---- forward ----------------------------------------------------------------------------------------------------
  // Tokens, targets (negative: none) and loss weights (null: all 1) of rows*slots, host to device; targets may be null.
  void upload(const int32_t* tokens, const int32_t* targets, const float* loss_weights, int64_t count);

  // The whole body: from the uploaded tokens to final_n = Norm(x), (B*T,D).
  void forward(const Input& in);
  // The same in parts, for a reader that has something to do between them: begin(); the lower layers, the encoder and
  // the first group's retrieval; then each group's layers and the next one's retrieval, after the last the final norm.
  // Two passes of one stream may be under way, each part in the order of the passes. A part uses the buffers of the
  // layer at work: where another pass comes in between, x and what place.picks names must be kept elsewhere.
  Pass begin(const Input& in);
  void lower_part(Pass& pass);
  void group_part(Pass& pass, size_t g);
  // One slot of each of B rows that may stand anywhere, as rows (B) in the device's memory say; they stand one slot
  // further afterwards. Nothing in it depends on where: the same work, done again, reads the next slots. From the
  // tokens in `token` to final_n, (B,D).
  void read_slots(Row* rows, int64_t B);
  // After it, where rows first .. of these are a stream's and their slots were landmarks: the chunks go into its
  // memory, and what they pick serves the slots that follow.
  void close_chunks(StreamState& stream, int64_t first, const Selection& selection);
  // Row b of a stream, for read_slots(): its slot is the next one.
  Row slot_row(const StreamState& stream, int64_t b) const;

  // Logits of rows first .. first + count - 1 into the piece `logits`, rows padded_vocab apart: logits = E Norm(x).
  void piece_of_logits(int64_t first, int64_t count);
  int64_t logits_rows() const { return logits_rows_; }

  // Loss of each slot into `loss`, and the sums scale * (weight) * loss into the step state; scale is 1/N, N the number
  // of slots with a target in the whole batch. with_gradient: also dE += and the gradient that backward() starts from.
  void head(double scale, bool with_gradient);

  // ---- backward ---------------------------------------------------------------------------------------------------
  // After forward() and head(scale, true): the gradients of all weights, +=.
  void backward();

  // ---- a step: begin_step, then (upload, forward, head, backward) for each micro-batch, then update ---------------
  void begin_step();
  // Of several ranks, all: stop is added up over them in the step state.
  void update(const AdamW& hyper, double stop = 0);
  StepState step_state() const;
  // Of several ranks, all: sums the buckets of the gradient that are final once it is so from element `begin` on. In
  // the last micro-batch from grads_ready, and with 0 at the latest before update().
  void reduce_gradient(int64_t begin);

  // ---- weights in and out -----------------------------------------------------------------------------------------
  // Matrices normal(0, 0.02), gains 1, the same for any backend.
  void initialise(uint64_t seed, ThreadPool& pool);
  // After masters were written from outside. Of several ranks, all.
  void weights_changed();
  // Elements first .. first + count - 1 of a model's whole buffer (masters, adam_m or adam_v) from the host. Of several
  // ranks each gives all of them, and keeps its share.
  void put(master* buffer, int64_t first, const master* values, int64_t count);
  // Whether a rank has no more of that buffer than its share.
  bool is_shared_out(const master* buffer) const {
    return shards.ranks > 1 && !(Device::weights_are_masters && buffer == masters);
  }

  // A stream of B rows that holds up to `chunks` chunks of each. plan() lays out its memory, open() allocates it too.
  // with_kv: CK | CV as well; without, who reads keeps those that each pass leaves in `kv`, and gives place.kv.
  void open(StreamState& stream, int64_t B, int64_t chunks, bool with_kv = true);
  void plan(StreamState& stream, int64_t B, int64_t chunks, bool with_kv = true);
  // Begins new rows: the chunk before them has picked nothing.
  void rewind(StreamState& stream);
  void close(StreamState& stream) { stream.arena.release(device); }

 private:
  const Use use;
  Arena model_, activations_;
  int64_t max_rows_ = 0, logits_rows_ = 0;
  bool has_weights_ = false;
  size_t reduced_ = 0;  // buckets of the gradient, in this step
  Pass pass_{};         // the one at work
  // Gradients, each dead after its layer but dx; rows: the larger of B*T and B*C*S.
  act *dx_ = nullptr, *dn_ = nullptr;           // (rows,D)
  act *dattended_ = nullptr, *denc_ = nullptr;  // (rows,D)
  act* dh_ = nullptr;                           // (rows,F), and then mlp_in's, (rows,D)
  act *dkv_ = nullptr, *dr_ = nullptr;          // (B,C,S,2D), (B,C,D)

  Place place_in(StreamState& stream) const;
  SlidingShape sliding_shape() const;
  SlotShape slot_shape() const;
  ChunkShape chunk_shape(int64_t rows) const;
  GcaShape gca_shape() const;
  RetrievalShape retrieval_shape() const;

  static const act* mlp_in(const Layer& l, Kind kind) { return kind == Kind::upper ? l.mlp_in : l.a; }
  double eps_of(Kind kind) const { return kind == Kind::encoder ? Config::encoder_eps : config.eps; }

  act* layer_forward(Layer& l, Kind kind, const act* x, int64_t rows, act* ring, Group* group);
  void layer_inside(Layer& l, Kind kind, const act* x, int64_t rows, act* ring, Group* group);
  void norm_product(act* y, act* n, stat* rstd, const act* x, int64_t gain, int64_t W, int64_t rows, int64_t out,
                    double eps);
  void attend(Layer& l, act* ring);
  void attend_fetched(Layer& l, Group& group);

  void layer_backward(Layer& l, Kind kind, const act* x, act* dx, int64_t rows, Group* group);
  // Of a norm over packed rows; gain: where its tensor lies.
  void norm_backward(int64_t gain, RmsnormBackward<act, weight, grad, stat> a, int64_t rows) {
    a.dgain = gradient + gain;
    a.gain = weights + gain;
    device.rmsnorm_backward(a, rows, config.width, config.width);
  }

  // Landmarks among the slots of this pass, in each row: the chunks that they complete.
  int64_t completed_chunks() const {
    return (pass_.place.first_slot + pass_.in.T) / config.chunk - pass_.place.first_slot / config.chunk;
  }

  void gather_weights();
  void finish(const act* x);
  void encode(const act* x);
  void encode_chunks(const act* chunks);
  void keep(int64_t first_chunk, int64_t done);

  void retrieve(Group& group, const act* x);
};

template <class Device>
DRT<Device>::DRT(Device& device_, const Config& config_, Use use_, const Share& share)
    : device(device_),
      config(config_.validated()),
      table(config_, Device::vocab_multiple, Device::alignment_bytes / static_cast<int64_t>(sizeof(weight))),
      shards(share.rank, share.ranks, table.size, table.padded_vocab * config.width,
             Device::alignment_bytes / static_cast<int64_t>(sizeof(weight)), share.bucket_size),
      use(use_) {
  reach = config.reach;
  model_.want(masters, "weights", Device::weights_are_masters ? shards.size : shards.share());
  if constexpr (!Device::weights_are_masters) model_.want(weights, "working weights", shards.size);
  if (use == Use::training) {
    model_.want(gradient, "gradients", shards.size);
    model_.want(adam_m, "Adam's first moment", shards.share());
    model_.want(adam_v, "Adam's second moment", shards.share());
  }
  model_.want(state, "step state", 1);
}
template <class Device>
DRT<Device>::~DRT() {
  activations_.release(device);
  model_.release(device);
}
template <class Device>
void DRT<Device>::allocate() {
  model_.commit(device);
  device.zero_bytes(masters, model_.total_bytes());
  if constexpr (Device::weights_are_masters) weights = masters;
}
template <class Device>
void DRT<Device>::plan(int64_t B, int64_t T) {
  activations_.release(device);
  const Config& c = config;
  const int64_t D = c.width, F = c.ffn, R = B * T, C = ceil_div(T, c.chunk), RC = B * C * c.chunk, K = c.reach.topk,
                V = table.padded_vocab;
  GCA_CHECK(use == Use::inference || T % c.chunk == 0, "training takes whole chunks, found ", T, " slots");
  // More than all numbers below together; so none of their products can pass 63 bits.
  const double slot =
      static_cast<double>(c.lower + c.upper() + c.encoder + 4) *
      (16.0 * static_cast<double>(D) + 4.0 * static_cast<double>(F) + 4.0 * static_cast<double>(c.heads * K));
  if (static_cast<double>(RC) * slot > 0x1p58)
    throw Error(str(B, " rows of ", T,
                    " slots of this model need over 2^58 numbers of memory: use fewer rows, shorter ones (--chunks) "
                    "or a smaller model"));
  max_rows_ = R;
  auto want = [&](auto*& pointer, const std::string& name, int64_t count) { activations_.want(pointer, name, count); };
  want(token, "tokens", R);
  want(target, "targets", R);
  want(slot_weight, "loss weights", R);
  want(embedded, "embedding", R * D);
  auto want_layer = [&](Layer& l, const LayerTensors& tensors, Kind kind, int64_t rows, const std::string& layers,
                        size_t i) {
    l = {};
    l.tensors = tensors;
    const std::string name = str(layers, " ", i);
    // Computed anew from that setting on, and in inference: then for the layer at work only.
    auto part = [&](auto*& pointer, Recompute anew_from, const char* what, int64_t count) {
      if (use == Use::training && recompute < anew_from) want(pointer, name + what, count);
      else activations_.want_shared(pointer, std::string("layer at work") + what, count);
    };
    auto kept = [&](auto*& pointer, const char* what, int64_t count) {
      if (use == Use::training) want(pointer, name + what, count);
      else activations_.want_shared(pointer, layers + what, count);
    };
    part(l.n1, Recompute::norms, " n1", rows * D);
    part(l.rstd1, Recompute::layers, " rstd1", rows);
    part(l.qkv, Recompute::layers, " q|k|v", rows * 3 * D);
    part(l.attended, Recompute::layers, " attention", rows * D);
    part(l.lse, Recompute::layers, " attention lse", rows * c.heads);
    part(l.a, Recompute::layers, " a", rows * D);
    part(l.n2, Recompute::norms, " n2", rows * D);
    part(l.rstd2, Recompute::layers, " rstd2", rows);
    part(l.gate_up, Recompute::layers, " gate|up", rows * std::max(2 * F, 3 * D));
    part(l.h, Recompute::norms, " h", rows * F);
    kept(l.out, " out", rows * D);
    if (kind != Kind::upper) return;
    part(l.gca_n, Recompute::norms, " gca norm", rows * D);
    part(l.gca_rstd, Recompute::layers, " gca rstd", rows);
    kept(l.q, " gca q", rows * D);
    kept(l.fetched, " gca out", rows * D);
    part(l.mlp_in, Recompute::layers, " mlp in", rows * D);
    if (use == Use::inference) return;
    kept(l.gca_lse, " gca lse", RC * c.heads * K);
    kept(l.delta, " gca delta", RC * c.heads * K);
  };
  int64_t number = 0;
  auto want_layers = [&](std::vector<Layer>& layers, const std::vector<LayerTensors>& of_table, Kind kind, int64_t rows,
                         const std::string& name) {
    layers.resize(of_table.size());
    for (size_t i = 0; i < of_table.size(); i++) {
      want_layer(layers[i], of_table[i], kind, rows, name, i);
      if (kind != Kind::encoder) layers[i].number = number++;
    }
  };
  want_layers(lower, table.lower, Kind::lower, R, "lower");
  groups.resize(c.groups.size());
  if (!groups.empty()) {
    want(enc_in, "encoder in", RC * D);
    want(enc_in_rstd, "encoder in rstd", RC);
    want_layers(encoder, table.encoder, Kind::encoder, RC, "encoder");
    want(enc_out, "encoder out", RC * D);
    want(enc_out_rstd, "encoder out rstd", RC);
    want(kv, "ck|cv", RC * 2 * D);
  }
  for (size_t g = 0; g < groups.size(); g++) {
    Group& group = groups[g];
    const std::string name = str("group ", g);
    group.lmk_norm = table.lmk_norms[g];
    want_layers(group.layers, table.upper[g], Kind::upper, R, name + " layer");
    want(group.r, name + " r", B * C * D);
    want(group.r_rstd, name + " r rstd", B * C);
    want(group.pick, name + " picks", PickTable{C, K}.size(B));
    want(group.w, name + " weights", PickTable{C, K}.size(B));
    want(group.dw, name + " dweights", PickTable{C, K}.size(B));
    want(group.start, name + " start", B * (C + 1));
    want(group.fetches, name + " fetches", B * C * K);
  }
  logits_rows_ = std::min(R, std::max<int64_t>(64, Device::logits_bytes / (V * static_cast<int64_t>(sizeof(act)))));
  want(final_n, "final norm", R * D);
  want(final_rstd, "final rstd", R);
  want(loss, "losses", R);
  want(logits, "logits", logits_rows_ * V);
  if (use == Use::inference) return;
  const int64_t rows = groups.empty() ? R : RC;
  want(dx_, "dx", rows * D);
  want(dn_, "dn", rows * D);
  want(dattended_, "dattention", rows * D);
  want(dh_, "dh", rows * std::max(F, D));
  if (groups.empty()) return;
  want(denc_, "dencoder", rows * D);
  want(dkv_, "dck|dcv", rows * 2 * D);
  want(dr_, "dr", B * C * D);
}

// ---- forward ----------------------------------------------------------------------------------------------------
template <class Device>
void DRT<Device>::upload(const int32_t* tokens, const int32_t* targets, const float* loss_weights, int64_t count) {
  GCA_CHECK(count <= max_rows_, "planned for ", max_rows_, " slots, found ", count);
  device.upload(token, tokens, count * 4);
  if (targets) device.upload(target, targets, count * 4);
  has_weights_ = loss_weights != nullptr;
  if (has_weights_) device.upload(slot_weight, loss_weights, count * 4);
}
template <class Device>
typename DRT<Device>::Pass DRT<Device>::begin(const Input& in) {
  const int64_t D = config.width, S = config.chunk;
  GCA_CHECK(in.B * in.T <= max_rows_, "planned for ", max_rows_, " slots, found ", in.B * in.T);
  GCA_CHECK(
      reach.topk >= 1 && reach.topk <= config.reach.topk && reach.window >= 0 && reach.window <= config.reach.window,
      "K is 1 to ", config.reach.topk, " and W 0 to ", config.reach.window, ", found ", reach.topk, " and ",
      reach.window);
  GCA_CHECK(!in.stream || in.stream->reach == reach, "a stream is read with the K and W that it was opened with");
  GCA_CHECK(in.stream ? in.B == in.stream->B : in.T % S == 0, "rows are whole chunks, or a stream's, read in segments");
  Pass pass{in, {}, nullptr};
  if (StreamState* stream = in.stream) {
    pass.place = place_in(*stream);
    GCA_CHECK(stream->slots % S + in.T <= S || (stream->slots % S == 0 && in.T % S == 0),
              "a segment is whole chunks, or slots of one chunk");
    GCA_CHECK(groups.empty() || (stream->slots + in.T) / S <= stream->capacity, "the stream holds ", stream->capacity,
              " chunks");
    stream->slots += in.T;
  } else {
    pass.place = {.first_slot = 0,
                  .capacity = in.T / S,
                  .rings = std::vector<act*>(config.lower + config.upper()),
                  .landmarks = groups.empty() ? nullptr : enc_out + (S - 1) * D,
                  .landmark_stride = S * D,
                  .landmark_row_stride = in.T * D,
                  .kept_kv = nullptr,
                  .kept_landmarks = nullptr,
                  .unfinished_chunk = nullptr,
                  .last_picks = nullptr,
                  .kv = kv,
                  .kv_chunks = in.T / S,
                  .picks = {}};
  }
  for (const Group& group : groups) pass.place.picks.push_back({group.pick, group.w});
  return pass;
}
template <class Device>
void DRT<Device>::forward(const Input& in) {
  Pass pass = begin(in);
  lower_part(pass);
  for (size_t g = 0; g < groups.size(); g++) group_part(pass, g);
}
template <class Device>
void DRT<Device>::lower_part(Pass& pass) {
  pass_ = pass;
  const int64_t R = pass.in.B * pass.in.T;
  auto ring = pass.place.rings.begin();
  device.embedding_forward(embedded, token, weights + table.embedding, R, config.width);
  const act* x = embedded;
  for (Layer& layer : lower) x = layer_forward(layer, Kind::lower, x, R, *ring++, nullptr);
  if (groups.empty()) return finish(x);
  pass.x = x;
  if (pass.rows) return device.keep_slot(x, pass.rows, slot_shape());
  encode(x);  // before anybody retrieves
  retrieve(groups[0], x);
}
template <class Device>
void DRT<Device>::group_part(Pass& pass, size_t g) {
  pass_ = pass;
  auto ring = pass.place.rings.begin() + config.lower;
  for (size_t before = 0; before < g; before++) ring += config.groups[before];
  const act* x = pass.x;
  for (Layer& layer : groups[g].layers)
    x = layer_forward(layer, Kind::upper, x, pass.in.B * pass.in.T, *ring++, &groups[g]);
  if (g + 1 == groups.size()) return finish(x);
  if (!pass.rows) retrieve(groups[g + 1], x);
  pass.x = x;
}
template <class Device>
void DRT<Device>::finish(const act* x) {
  top = x;
  device.rmsnorm_forward(final_n, final_rstd, x, weights + table.norm, pass_.in.B * pass_.in.T, config.width,
                         config.width, config.eps);
  if (pass_.rows) device.next_slot(pass_.rows, pass_.in.B);
}
template <class Device>
void DRT<Device>::piece_of_logits(int64_t first, int64_t count) {
  GCA_CHECK(count <= logits_rows_, "a piece holds ", logits_rows_, " rows");
  device.matmul_forward(logits, final_n + first * config.width, weights + table.embedding, nullptr, count, config.width,
                        table.padded_vocab);
}
template <class Device>
void DRT<Device>::head(double scale, bool with_gradient) {
  const int64_t D = config.width, V = table.padded_vocab, R = pass_.in.B * pass_.in.T;
  const float* slot_weights = has_weights_ ? slot_weight : nullptr;
  for (int64_t first = 0; first < R; first += logits_rows_) {
    const int64_t rows = std::min(logits_rows_, R - first);
    piece_of_logits(first, rows);
    device.cross_entropy(loss + first, logits, target + first, slot_weights ? slot_weights + first : nullptr,
                         with_gradient ? scale : 0.0, rows, config.vocab, V);
    if (!with_gradient) continue;
    device.matmul_backward_weight(gradient + table.embedding, logits, final_n + first * D, rows, D, V);
    device.matmul_backward_input(dn_ + first * D, logits, weights + table.embedding, false, rows, D, V);
  }
  device.add_loss(state, loss, slot_weights, scale, R);
}

// ---- weights in and out -----------------------------------------------------------------------------------------
template <class Device>
void DRT<Device>::initialise(uint64_t seed, ThreadPool& pool) {
  std::vector<master> values;
  for (const Tensor& t : table.tensors) {
    const uint32_t name = name_hash(t.name);  // not its place in the table: a new tensor leaves the others' start alone
    values.assign(t.size(), master(1));
    if (t.columns)
      pool.run(ceil_div(t.size(), 4096), [&](int64_t block, int) {
        for (int64_t j = block * 4096; j < std::min(t.size(), (block + 1) * 4096);
             j += 2) {  // Box and Muller: two at a time
          const Philox bits = philox(seed, Draw::init, static_cast<uint32_t>(j), static_cast<uint32_t>(j >> 32), name);
          const double radius = 0.02 * std::sqrt(-2 * std::log(static_cast<double>(uniform_open(bits.word[0])))),
                       angle = 6.283185307179586 * uniform_open(bits.word[1]);
          values[j] = static_cast<master>(static_cast<float>(radius * std::cos(angle)));
          if (j + 1 < t.size()) values[j + 1] = static_cast<master>(static_cast<float>(radius * std::sin(angle)));
        }
      });
    put(masters, t.offset, values.data(), t.size());
  }
  weights_changed();
}
template <class Device>
void DRT<Device>::weights_changed() {
  if constexpr (!Device::weights_are_masters) {
    for (const Shards::Bucket& b : shards.buckets) device.cast_weights(weights + b.flat, masters + b.place, b.size);
    gather_weights();
  }
}
template <class Device>
void DRT<Device>::put(master* buffer, int64_t first, const master* values, int64_t count) {
  const auto upload = [&](int64_t to, const master* from, int64_t n) {
    device.upload(buffer + to, from, n * static_cast<int64_t>(sizeof(master)));
  };
  if (!is_shared_out(buffer)) return upload(first, values, count);
  shards.owned(first, count, [&](int64_t flat, int64_t place, int64_t n) { upload(place, values + flat - first, n); });
}
template <class Device>
SlidingShape DRT<Device>::sliding_shape() const {
  return {pass_.in.B,
          pass_.in.T,
          static_cast<int>(config.heads),
          static_cast<int>(config.head_size()),
          reach.window,
          pass_.place.first_slot};
}
template <class Device>
ChunkShape DRT<Device>::chunk_shape(int64_t rows) const {
  return {rows / config.chunk, static_cast<int>(config.chunk), static_cast<int>(config.heads),
          static_cast<int>(config.head_size())};
}
template <class Device>
GcaShape DRT<Device>::gca_shape() const {
  return {pass_.in.B,
          pass_.in.T,
          static_cast<int>(config.heads),
          static_cast<int>(config.head_size()),
          static_cast<int>(config.chunk),
          static_cast<int>(reach.topk),
          pass_.place.kv_chunks,
          pass_.place.first_slot,
          config.null_slot};
}
template <class Device>
RetrievalShape DRT<Device>::retrieval_shape() const {
  return {pass_.in.B,
          completed_chunks(),
          static_cast<int>(config.width),
          static_cast<int>(reach.topk),
          pass_.place.first_slot / config.chunk,
          pass_.place.landmark_stride,
          pass_.place.landmark_row_stride};
}
// One layer of any kind over x (rows,D); returns its output, (rows,D). ring (W,2D): the window's slots before these, or
// null. What it computes is said at Layer.
template <class Device>
typename DRT<Device>::act* DRT<Device>::layer_forward(Layer& l, Kind kind, const act* x, int64_t rows, act* ring,
                                                      Group* group) {
  const int64_t D = config.width, F = config.ffn;
  layer_inside(l, kind, x, rows, ring, group);
  if (use == Use::inference) {
    device.swiglu_matmul_forward(l.out, l.h, l.gate_up, weights + l.tensors.down, l.a, rows, F, D);
  } else {
    device.swiglu_forward(l.h, l.gate_up, rows, F);
    device.matmul_forward(l.out, l.h, weights + l.tensors.down, l.a, rows, F, D);
  }
  return l.out;
}
// All up to gate | up = Wgate_up Norm(mlp_in).
template <class Device>
void DRT<Device>::layer_inside(Layer& l, Kind kind, const act* x, int64_t rows, act* ring, Group* group) {
  const int64_t D = config.width;
  const double eps = eps_of(kind);
  norm_product(l.qkv, l.n1, l.rstd1, x, l.tensors.norm1, l.tensors.qkv, rows, 3 * D, eps);
  if (kind == Kind::encoder) device.chunk_attention_forward(l.attended, l.lse, l.qkv, chunk_shape(rows));
  else attend(l, ring);
  device.matmul_forward(l.a, l.attended, weights + l.tensors.o, x, rows, D, D);
  if (kind == Kind::upper) {
    norm_product(l.q, l.gca_n, l.gca_rstd, l.a, l.tensors.gca_norm, l.tensors.gca_q, rows, D, eps);
    attend_fetched(l, *group);
    device.matmul_forward(l.mlp_in, l.fetched, weights + l.tensors.gca_o, l.a, rows, D, D);
  }
  norm_product(l.gate_up, l.n2, l.rstd2, mlp_in(l, kind), l.tensors.norm2, l.tensors.gate_up, rows, 2 * config.ffn,
               eps);
}
// y = Norm(x) W^T; n and rstd, the norm's, are there afterwards where something goes back through it.
// y (rows,out), n, x (rows,D), rstd (rows); gain (D), W (out,D): where they lie
template <class Device>
void DRT<Device>::norm_product(act* y, act* n, stat* rstd, const act* x, int64_t gain, int64_t W, int64_t rows,
                               int64_t out, double eps) {
  const int64_t D = config.width;
  if (use == Use::inference)
    return device.norm_matmul_forward(y, n, rstd, x, weights + gain, weights + W, rows, D, out, eps);
  device.rmsnorm_forward(n, rstd, x, weights + gain, rows, D, D, eps);
  device.matmul_forward(y, n, weights + W, nullptr, rows, D, out);
}
// Window attention; keys and values go into the ring, where there is one.
template <class Device>
void DRT<Device>::attend(Layer& l, act* ring) {
  if (pass_.rows) return device.slot_attention_forward(l.attended, l.qkv, pass_.rows, l.number, slot_shape());
  device.sliding_attention_forward(l.attended, l.lse, l.qkv, ring, sliding_shape());
  if (ring) device.ring_append(ring, l.qkv, sliding_shape());
}
template <class Device>
void DRT<Device>::attend_fetched(Layer& l, Group& group) {
  const int64_t g = &group - groups.data();
  if (pass_.rows) return device.slot_gca_forward(l.fetched, l.q, pass_.rows, g, slot_shape());
  const auto& picks = pass_.place.picks[g];
  device.gca_forward(l.fetched, l.gca_lse, l.q, pass_.place.kv, picks.pick, picks.w, gca_shape());
}
// The chunk encoder over the chunks that these slots complete. x (B,T,D): lower layers' output.
template <class Device>
void DRT<Device>::encode(const act* x) {
  const int64_t D = config.width, S = config.chunk, T = pass_.in.T, place = pass_.place.first_slot % S;
  if (place || T % S) {
    for (int64_t b = 0; b < pass_.in.B; b++)
      device.copy(pass_.place.unfinished_chunk + (b * S + place) * D, x + b * T * D, T * D);
    x = pass_.place.unfinished_chunk;
  }
  if (completed_chunks()) encode_chunks(x);
}
// enc_out, CK | CV into the memory, and the landmarks of chunks (N,S,D), those that these slots complete.
template <class Device>
void DRT<Device>::encode_chunks(const act* chunks) {
  const int64_t D = config.width, S = config.chunk, done = completed_chunks(), N = pass_.in.B * done, rows = N * S;
  device.rmsnorm_forward(enc_in, enc_in_rstd, chunks, weights + table.enc_prenorm, rows, D, D, config.eps);
  const act* h = enc_in;
  for (Layer& layer : encoder) h = layer_forward(layer, Kind::encoder, h, rows, nullptr, nullptr);
  device.rmsnorm_forward(enc_out, enc_out_rstd, h, weights + table.enc_norm, rows, D, D, Config::encoder_eps);
  device.matmul_forward(kv, enc_out, weights + table.chunk_kv, nullptr, rows, D, 2 * D);
  device.zero_landmarks(kv, N, S, D);
  keep(pass_.place.first_slot / S, done);
}
// What encode() has made, chunks first_chunk .. first_chunk + done - 1 of each row, where later slots find it.
template <class Device>
void DRT<Device>::keep(int64_t first_chunk, int64_t done) {
  const int64_t D = config.width, S = config.chunk, chunk = S * 2 * D;
  for (int64_t b = 0; b < pass_.in.B; b++) {
    const int64_t to = b * pass_.place.capacity + first_chunk;
    if (pass_.place.kept_kv) device.copy(pass_.place.kept_kv + to * chunk, kv + b * done * chunk, done * chunk);
    if (pass_.place.kept_landmarks)
      device.copy_rows(pass_.place.kept_landmarks + to * D, D, enc_out + (b * done * S + S - 1) * D, S * D, done, D);
  }
}
// The picks of the chunks that these slots complete, from x (B,T,D) at their landmarks as it enters the group.
template <class Device>
void DRT<Device>::retrieve(Group& group, const act* x) {
  const int64_t D = config.width, S = config.chunk, B = pass_.in.B, K = reach.topk, done = completed_chunks(),
                g = &group - groups.data();
  const PickTable picks = gca_shape().table();
  // What the chunk before these slots picked serves the first of them.
  if (const StreamState* last = pass_.place.last_picks)
    for (int64_t b = 0; b < B; b++) {
      device.copy(group.pick + picks.serving(b, 0), last->pick[g] + b * K, K);
      device.copy(group.w + picks.serving(b, 0), last->w[g] + b * K, K);
    }
  else device.no_pick(group.pick, group.w, B, picks.C, static_cast<int>(K));
  if (!done) return;
  const int64_t apart = std::min(S, pass_.in.T);  // slots from a landmark to the next, of this row or another
  device.rmsnorm_forward(group.r, group.r_rstd, x + (apart - 1) * D, weights + group.lmk_norm, B * done, D, apart * D,
                         config.eps);
  Selection selection = pass_.in.selection;
  selection.group = static_cast<int>(g);
  if (selection.given_noise) selection.given_noise += selection.group * B * done * done;
  if (selection.given_picks)
    for (int64_t b = 0; b < B; b++)
      device.copy(group.pick + picks.picked_by(b, 0),
                  selection.given_picks + (b * selection.given_chunks + pass_.place.first_slot / S) * K, done * K);
  device.chunk_retrieval_forward(group.pick, group.w, group.r, pass_.place.landmarks, retrieval_shape(), selection);
  if (StreamState* last = pass_.place.last_picks)
    for (int64_t b = 0; b < B; b++) {
      device.copy(last->pick[g] + b * K, group.pick + picks.picked_by(b, done - 1), K);
      device.copy(last->w[g] + b * K, group.w + picks.picked_by(b, done - 1), K);
    }
}

}  // namespace gca

#include "model_backward.h"
#include "model_stream.h"
