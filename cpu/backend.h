// Backend Cpu: its ops, declared. gca_cpu.h, beside it, has each as loops with its shapes, and the CPU's memory
// and threads are in cpu/device.h.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "cpu/device.h"
#include "cpu/rows.h"
#include "ops.h"

namespace gca {

// Cpu<real> computes in real (float or double). Cpu<float, true> rounds what a GPU stores or feeds to tensor cores in
// bf16 (every op's output and every product's operand) and is otherwise Cpu<float>: the naive bf16 twin. These three
// are compiled once, in cpu/float.cpp, cpu/double.cpp and cpu/bf16.cpp.
template <class real, bool bf16 = false>
class Cpu : public CpuDevice {
 public:
  using act = real;     // activations and their gradients
  using weight = real;  // weights as the products read them
  using master = real;  // weights as the optimiser keeps them
  using grad = real;    // gradients of weights
  using stat = real;    // softmax and norm statistics, weights of picks, losses
  static constexpr bool weights_are_masters = !bf16;

  explicit Cpu(int threads = 0) : CpuDevice(threads), scratch_(pool_.size()) {}
  std::string description() const;
  double peak_flops();
  // rows x D from src, rows src_stride apart, to dst, rows dst_stride apart.
  void copy_rows(act* dst, int64_t dst_stride, const act* src, int64_t src_stride, int64_t rows, int64_t D);
  // Working weights from masters, n of each.
  void cast_weights(weight* weights, const master* masters, int64_t n);

  // ---- embedding: x[r] = E[token[r]] ------------------------------------------------------------------------------
  void embedding_forward(act* x, const int32_t* token, const weight* E, int64_t rows, int64_t D);
  void embedding_backward(grad* dE, const act* dx, const int32_t* token, int64_t rows, int64_t D);
  // ---- RMSNorm: out = gain * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) -------------------------------------------
  void rmsnorm_forward(act* out, stat* rstd, const act* x, const weight* gain, int64_t rows, int64_t D, int64_t stride,
                       double eps);
  void rmsnorm_backward(const RmsnormBackward<act, weight, grad, stat>& a, int64_t rows, int64_t D, int64_t stride);
  // ---- matrix products: y = x W^T (+ residual) --------------------------------------------------------------------
  void matmul_forward(act* y, const act* x, const weight* W, const act* residual, int64_t rows, int64_t in,
                      int64_t out);
  void matmul_backward_input(act* dx, const act* dy, const weight* W, bool accumulate, int64_t rows, int64_t in,
                             int64_t out);
  void matmul_backward_weight(grad* dW, const act* dy, const act* x, int64_t rows, int64_t in, int64_t out);
  // ---- SwiGLU: h = silu(gate) * up, silu(z) = z / (1 + e^-z) ------------------------------------------------------
  void swiglu_forward(act* h, const act* gate_up, int64_t rows, int64_t F);
  void swiglu_backward(act* dgate_up, act* h, const act* dh, const act* gate_up, int64_t rows, int64_t F);
  // ---- sliding-window attention with ALiBi (drt.md SWA) -----------------------------------------------------------
  void sliding_attention_forward(act* out, stat* lse, const act* qkv, const act* ring, const SlidingShape& s);
  void sliding_attention_backward(act* dqkv, const act* dout, const act* qkv, const act* out, const stat* lse,
                                  const SlidingShape& s);
  void ring_append(act* ring, const act* qkv, const SlidingShape& s);
  // ---- chunk attention: bidirectional inside a chunk, rotary embedding on q and k (drt.md, chunk encoder) ---------
  void chunk_attention_forward(act* out, stat* lse, const act* qkv, const ChunkShape& s);
  void chunk_attention_backward(act* dqkv, const act* dout, const act* qkv, const act* out, const stat* lse,
                                const ChunkShape& s);
  // ---- causal chunk retrieval (drt.md, retrieval) -----------------------------------------------------------------
  void no_pick(int32_t* pick, stat* w, int64_t B, int64_t C, int K);
  void chunk_retrieval_forward(int32_t* pick, stat* w, const act* r, const act* landmark, const RetrievalShape& s,
                               const Selection& selection);
  void chunk_retrieval_backward(const RetrievalBackward<act, stat>& a, const RetrievalShape& s);
  static void score_row(real* scores, const real* query, const real* landmark, int64_t n, const RetrievalShape& s);
  void invert_picks(int32_t* start, int32_t* fetches, const int32_t* pick, int64_t B, int64_t C, int K);
  // ---- grouped cross attention (drt.md, upper layer) --------------------------------------------------------------
  void zero_landmarks(act* kv, int64_t N, int64_t S, int64_t D);
  void gca_forward(act* out, stat* lse, const act* q, const act* kv, const int32_t* pick, const stat* w,
                   const GcaShape& s);
  void gca_backward_query(const GcaBackward<act, stat>& a, const GcaShape& s);
  void gca_backward_memory(act* dkv, const FetchingLayer<act, stat>* layers, int n_layers, const act* kv,
                           const GcaShape& s);
  // ---- one slot of each row, where ops.h's SlotRow says ------------------------------------------------------------
  void norm_matmul_forward(act* y, act* n, stat* rstd, const act* x, const weight* gain, const weight* W, int64_t rows,
                           int64_t in, int64_t out, double eps);
  void swiglu_matmul_forward(act* y, act* h, const act* gate_up, const weight* W, const act* residual, int64_t rows,
                             int64_t F, int64_t out);
  void slot_attention_forward(act* out, const act* qkv, const SlotRow<act, stat>* rows, int64_t layer,
                              const SlotShape& s);
  void slot_gca_forward(act* out, const act* q, const SlotRow<act, stat>* rows, int64_t group, const SlotShape& s);
  void keep_slot(const act* x, const SlotRow<act, stat>* rows, const SlotShape& s);
  void next_slot(SlotRow<act, stat>* rows, int64_t B);
  // ---- cross entropy, a piece of logits at a time -----------------------------------------------------------------
  void cross_entropy(stat* loss, act* logits, const int32_t* target, const float* weight, double scale, int64_t rows,
                     int64_t V, int64_t stride);
  void add_loss(StepState* state, const stat* loss, const float* weight, double scale, int64_t rows);
  // ---- the next token ---------------------------------------------------------------------------------------------
  void feed_tokens(int32_t* token, const int32_t* chosen, const SlotRow<act, stat>* rows, int32_t landmark, int64_t B,
                   int64_t S);
  void note_tokens(int32_t* noted, int64_t* index, int32_t* token, const int32_t* fresh, const SlotRow<act, stat>* rows,
                   int64_t B, int64_t S, int64_t places);
  void choose_token(int32_t* token, const act* logits, int64_t rows, int64_t V, int64_t stride, const Choice& c);
  // ---- optimiser (drt.md) -----------------------------------------------------------------------------------------
  void begin_step(StepState* state);
  void tell_broken(StepState* state, int rank);
  void add_squares(StepState* state, const grad* gradient, int64_t n);
  void end_gradient(StepState* state, double clip);
  void adamw(master* masters, weight* weights, master* m, master* v, const grad* gradient, const Segment* segments,
             int64_t n_segments, const StepState* state, const AdamW& hyper);

 private:
  using Row = CpuRows<real, bf16>;
  static constexpr int64_t query_block = 64;  // slots that one attention task answers

  GCA_INLINE static real attention_scale(int d) { return real(1) / std::sqrt(static_cast<real>(d)); }

  static void fetched_softmax(real* p, real* lse, real w, int64_t rows, const GcaShape& s);

  struct Slots {
    int64_t first, count;
  };
  static Slots slots_of(int64_t c, const GcaShape& s);

  // ---- rotary embedding: pair (t, t + d/2) of slot p turns by sign * p * 10000^(-2t/d) ----
  void prepare_rotation(const ChunkShape& s);
  void rotate(real* to, int64_t to_stride, const real* from, int64_t from_stride, const ChunkShape& s, real sign) const;

  // ---- work ----
  // body(begin, end) over [0, n) in stretches of about 16K elements, each index being width of them.
  template <class Body>
  void over(int64_t n, int64_t width, Body body) {
    const int64_t stretch = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width));
    pool_.run(ceil_div(n, stretch), [=](int64_t i, int) { body(i * stretch, std::min(n, (i + 1) * stretch)); });
  }
  void round_all(real* x, int64_t n);
  static void round_tile(real* x, int64_t stride, int64_t rows, int64_t columns);
  static void grow(std::vector<real>& buffer, int64_t n) {
    if (static_cast<int64_t>(buffer.size()) < n) buffer.resize(n);
  }
  // A thread's own tile memory: grows to the largest tile in the first step, and stays.
  real* scratch(int worker, int64_t n) {
    std::vector<real>& mine = scratch_[worker];
    grow(mine, n);
    return mine.data();
  }

  std::vector<std::vector<real>> scratch_;
  std::vector<real> partial_, rotation_;
  int rotation_S_ = 0, rotation_d_ = 0;
};

}  // namespace gca
