// The arguments that a backend's ops share, so that Cpu (gca_cpu.h) and Gpu (gca_kernels.cuh) are called alike by
// model.h. Letters as in the paper: B rows, C chunks, S slots a chunk, T = C*S slots, D width, H heads, d = D/H, F
// feed-forward width, K chunks fetched, M chunks of memory, V vocabulary. Row-major, last index fastest.
#pragma once
#include <cstddef>

#include "common.h"

namespace gca {

// How the GPU lays out a model: here, so that its memory can be planned without one.
struct GpuLayout {
  using grad = float;  // gradients of weights
  using stat = float;  // softmax and norm statistics, weights of picks, losses
  static constexpr int64_t alignment_bytes = 256;
  static constexpr int64_t vocab_multiple = 128;  // V is rounded up to it in memory: whole tiles of the head's product
  static constexpr int64_t logits_bytes = 512 << 20;  // of a piece of logits
};

// Sliding-window attention. qkv is (B,T,3D): q | k | v. The T slots are numbers first_slot.. of their row; the window's
// earlier slots lie in a ring (B,W,2D) of k | v, slot j at place j mod W (no ring: the row starts here).
struct SlidingShape {
  int64_t B, T;
  int H, d;
  int64_t W, first_slot = 0;
};

// ALiBi: what head h subtracts from a logit for each slot of distance.
GCA_HD inline double alibi_slope(int64_t h, int H) { return exp2(-8.0 * static_cast<double>(h + 1) / H); }

// Rotary embedding: what columns t and t + d/2 of a head turn by in slot p.
GCA_HD inline double rotary_angle(int p, int t, int d) { return p * pow(10000.0, -2.0 * t / d); }

// The encoder's attention inside each of N chunks. qkv is (N,S,3D).
struct ChunkShape {
  int64_t N;
  int S, H, d;
};

// What chunk c may fetch for chunk c+1: the chunks m <= c - e, that is 0 .. candidates(c) - 1. e is 1, all that lie
// before c: here for learned and random picks, CPU and GPU, training, streams and the tasks' own arithmetic; the models
// that these are checked against (dev/by_hand.h, dev/make_oracle.py, dev/drt_torch.py) say it once more each.
GCA_HD inline int64_t candidates(int64_t c) {
  constexpr int64_t e = 1;
  return c < e ? 0 : c - e + 1;
}

// The pick table of a group is (B,C+1,K): row c+1 holds what chunk c picked, row c therefore what serves the slots of
// chunk c. Row 0 comes from before these slots (at the start of a row: no pick). -1 stands where there is no pick; its
// weight is 0.
struct PickTable {
  int64_t C, K;
  GCA_HD int64_t size(int64_t B) const { return B * (C + 1) * K; }
  // Place of pick k of those that serve chunk c of row b ...
  GCA_HD int64_t serving(int64_t b, int64_t c, int64_t k = 0) const { return (b * (C + 1) + c) * K + k; }
  // ... and of those that it made.
  GCA_HD int64_t picked_by(int64_t b, int64_t c, int64_t k = 0) const { return serving(b, c + 1, k); }
};

// Causal chunk retrieval. C queries a row, the landmarks of chunks first_chunk..; of the memory's chunks 0 ..
// candidates(c) - 1 may be picked. Landmark m of row b lies at landmark + b*row_stride + m*stride, and so does its
// gradient.
struct RetrievalShape {
  int64_t B, C;
  int D, K;
  int64_t first_chunk, stride, row_stride;
  GCA_HD PickTable table() const { return {C, K}; }
};

// uniform, none: ablations; given: given_picks, or without them what stands in the table, and weights are made; newest:
// the last chunks that newest_distance allows, the newest first
enum class Picking { learned, uniform, none, given, newest };

struct Selection {
  Picking picking = Picking::learned;
  bool noise = false;                  // add Gumbel noise (training)
  float noise_scale = 1;               // times this
  const float* given_noise = nullptr;  // (B,C,C) a group, in the device's memory: this noise instead of drawn one
  uint64_t seed = 0;                   // noise of (seed, step, group, first_row + b, fetching chunk, fetched chunk)
  int64_t step = 0, first_row = 0;  // first_row: number of row 0 in the whole batch, micro-batches and ranks together
  int group = 0;
  int64_t newest_distance = 1;           // newest: chunk c fetches chunks m <= c - newest_distance
  const int32_t* given_picks = nullptr;  // (B,given_chunks,K), in the device's memory: what chunk c fetches, each group
  int64_t given_chunks = 0;
  bool equal_weights = false;  // each pick weighs 1 / their number, whatever its score (forward only)
};
// newest: pick k of chunk c, or -1.
GCA_HD inline int32_t newest_pick(const Selection& s, int64_t c, int64_t k) {
  const int64_t past = candidates(c), near = c - s.newest_distance + 1, m = (near < past ? near : past) - 1 - k;
  return static_cast<int32_t>(m < 0 ? -1 : m);
}
// Four draws at once: word i belongs to fetched chunk 4*quad + i. The same bits on CPU and GPU.
GCA_HD inline Philox selection_draw(const Selection& s, int64_t b, int64_t chunk, int64_t quad) {
  return philox(s.seed, s.picking == Picking::uniform ? Draw::uniform_pick : Draw::gumbel, static_cast<uint32_t>(quad),
                static_cast<uint32_t>(chunk) | static_cast<uint32_t>(s.group) << 24,
                static_cast<uint32_t>(s.first_row + b), static_cast<uint32_t>(s.step));
}

// Grouped cross attention. q is (B,T,D); the memory is (B,M,S,2D): CK | CV, its landmark slots zero (see
// zero_landmarks). T slots from first_slot on (whole chunks in training; any slots of one chunk in decoding); table
// rows as in RetrievalShape.
struct GcaShape {
  int64_t B, T;
  int H, d, S, K;
  int64_t M, first_slot = 0;
  bool null_slot = true;  // the zero row takes part in the softmax; otherwise it is left out
  GCA_HD int64_t first_chunk() const { return first_slot / S; }
  GCA_HD int64_t chunks() const {
    return (first_slot + T - 1) / S - first_slot / S + 1;
  }  // chunks that the slots touch
  GCA_HD int keys() const { return null_slot ? S : S - 1; }
  GCA_HD PickTable table() const { return {chunks(), K}; }
};
// Place of a saved statistic (log-sum-exp, delta), (B,C,K,H,S), of chunk c (of C), pick k, head h.
GCA_HD inline int64_t gca_stat(const GcaShape& s, int64_t b, int64_t c, int k, int h) {
  return (((b * s.chunks() + c) * s.K + k) * s.H + h) * s.S;
}
// What to do where memory does not suffice; a command has some of these flags.
inline constexpr const char* ask_for_less =
    "use fewer rows at once or shorter ones (--batch, --micro-batch, --batch-slots, --chunks, --length)";

inline constexpr int max_topk = 32;  // K at most

// What the large backwards take, by name: whole rows; which outputs are = and which += stands at each.
template <class act, class weight, class grad, class stat>
struct RmsnormBackward {
  act* dx;                                              // (rows,D), stride apart, =
  grad* dgain = nullptr;                                // (D), +=
  const act *dn, *x;                                    // (rows,D) packed; (rows,D), stride apart
  const stat* rstd;                                     // (rows)
  const weight* gain = nullptr;                         // (D)
  const act *residual = nullptr, *residual2 = nullptr;  // (rows,D), stride apart, added to dx
  act* n = nullptr;                                     // (rows,D) packed, = the norm's output once more, or null
};
template <class act, class stat>
struct RetrievalBackward {
  act *dr, *dlandmark;                    // (B,C,D), =; see RetrievalShape, +=
  stat* dw;                               // (B,C+1,K), overwritten with the gradient of the scores / sqrt(D)
  const stat* w;                          // (B,C+1,K)
  const int32_t *pick, *start, *fetches;  // (B,C+1,K); (B,C+1), (B,C*K), of invert_picks
  const act *r, *landmark;                // (B,C,D); see RetrievalShape
  double scale = 1;                       // of dscore; 1: the slope of the loss
};
// One upper layer, by query.
template <class act, class stat>
struct GcaBackward {
  act* dq;                   // (B,T,D), =
  stat *dw, *delta;          // (B,C+1,K), +=; (B,C,K,H,S), =
  const act *dout, *q, *kv;  // (B,T,D), (B,T,D), (B,M,S,2D)
  const stat* lse;           // (B,C,K,H,S)
  const int32_t* pick;       // (B,C+1,K)
  const stat* w;             // (B,C+1,K)
};
// One upper layer, as the memory's gradient needs it; start and fetches come from invert_picks.
template <class act, class stat>
struct FetchingLayer {
  const act *q, *dout;             // (B,T,D)
  const stat *lse, *delta;         // (B,C,K,H,S)
  const stat* w;                   // (B,C+1,K)
  const int32_t *start, *fetches;  // (B,M+1), (B,C*K)
};

// A row that is read slot by slot, as the ops of one slot find it in the device's memory: what changes from slot to
// slot lies there too, so that the same work, done again, reads the next one. Rows of one call may stand anywhere, each
// with its own past.
template <class act, class stat>
struct SlotRow {
  int64_t slot;  // number of the slot that is read
  act* ring;     // (W,2D) of layer 0, as in SlidingShape; of layer l at ring + l * ring_stride
  int64_t ring_stride;
  act* unfinished_chunk;  // (S,D) lower layers' output for the slots of this chunk
  const act* kv;          // (..,S,2D) CK | CV, as in GcaShape
  const int32_t* pick;    // (K) the chunks of kv that serve this slot in group 0; of group g at pick + g * pick_stride
  int64_t pick_stride;
  const stat* w;  // (K) their weights; of group g at w + g * w_stride
  int64_t w_stride;
};
struct SlotShape {
  int64_t B;
  int H, d, S, K;
  int64_t W;
  bool null_slot = true;
};

// How the next token is chosen from logits: temperature 0: the largest; otherwise by a draw from the smallest set of
// tokens whose probability reaches top_p. What changes from token to token lies in the device's memory.
struct Choice {
  double temperature = 0, top_p = 1;
  uint64_t seed = 0;                  // the draw of (seed, index, sequence)
  const int64_t* index = nullptr;     // (rows), of a draw: the number of the token in its sequence
  const int32_t* sequence = nullptr;  // (rows) or null: 0 each; rows of one index and sequence draw the same number
  int32_t excluded = -1;              // a token that is never chosen; -1: none
};
// The random word of row r; its upper 23 bits are uniform_open's.
GCA_HD inline uint32_t choice_draw(const Choice& c, int64_t r) {
  const uint64_t index = static_cast<uint64_t>(c.index[r]);
  return philox(c.seed, Draw::sample, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                c.sequence ? static_cast<uint32_t>(c.sequence[r]) : 0)
      .word[0];
}

struct AdamW {
  double lr, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0, clip = 1;  // clip 0: none
};

// The figures of a step, in the device's memory: the optimiser reads them there, the host a step late.
struct StepState {
  double loss;         // sum over slots of weight * cross entropy / N
  double plain_loss;   // the same with every weight 1
  double squares;      // sum over parameters of the gradient's squares
  double stop;         // ranks that were asked to stop
  double broken;       // ranks whose own part of the loss is not finite,
  double broken_rank;  // and the sum of their numbers
  double grad_norm;    // before clipping, over all parameters
  double grad_scale;   // what clipping multiplies gradients by
  int64_t adam_steps;  // updates made: Adam's own count, which a skipped step does not advance
  int64_t skipped, skipped_in_a_row;
  int32_t skip;  // loss or norm of this step is not finite: no weight and no optimiser state changes

  static constexpr int64_t sums = 6;  // the first of these, which ranks add up
};
static_assert(offsetof(StepState, loss) == 0 && offsetof(StepState, grad_norm) == StepState::sums * sizeof(double));

// The step's rule, on either device, once the squares of all gradients are summed: how clipping scales them, and
// whether the step counts. One with a loss or a norm that is not finite changes nothing.
GCA_HD inline void finish_gradient(StepState& state, double clip) {
  state.grad_norm = sqrt(state.squares);
  state.grad_scale = clip > 0 ? fmin(1.0, clip / (state.grad_norm + 1e-6)) : 1.0;
  state.skip = !std::isfinite(state.grad_norm) || !std::isfinite(state.loss);
  state.skipped += state.skip;
  state.skipped_in_a_row = state.skip ? state.skipped_in_a_row + 1 : 0;
  state.adam_steps += !state.skip;
}

// A stretch of the flat buffer that the optimiser treats alike.
struct Segment {
  int64_t offset, size;
  bool decay;
};

}  // namespace gca
