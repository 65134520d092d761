// Backend Gpu: the ops of Cpu (gca_cpu.h) on an NVIDIA GPU: same names, same arguments, same meaning. Declared here
// with shapes, for any C++ compiler; implemented in kernels/*.cu, one file a layer, the kernels of attentions
// and retrieval in kernels/plain/ and kernels/mma/. A gradient dx has the shape of x.
//
// Gpu<float> computes in float throughout. Gpu<__nv_bfloat16> keeps activations and working weights in bf16 and
// computes in float: masters, gradients of weights, statistics and sums are float in both. Attention in bf16 takes
// tensor cores where the shape is theirs (heads of 32, 64 or 128 columns, fetched chunks of 64 slots), and so does
// retrieval (a width that is a multiple of 8), plain kernels elsewhere, and everywhere with GCA_PLAIN_ATTENTION=1 in
// the environment.
//
// On cards of compute capability 9.0 ops of few rows begin while the one before them ends, and wait for it inside:
// GCA_EARLY_LAUNCH=0 in the environment makes them wait outside.
//
// Every op is put on one stream and returns at once: nothing in it waits for the GPU or allocates. The same bits on
// every run. Written (=): everything, but these, which are added to (+=): gradients of weights (dgain, dW, dE), dw of
// the picks, dlandmark, the sums in StepState, and dx of matmul_backward_input when it says so. Letters: see ops.h.
// Limits: heads of up to 256 columns, an even number; chunks of up to 128 slots where they are fetched.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <deque>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"

namespace gca {

// GPUs that answer; 0 where there is no driver, no card, or only cards hidden from this process. Never throws.
int gpu_count() noexcept;

// ---- what does not depend on the type of activations --------------------------------------------------------------
class GpuDevice : public GpuLayout {
 public:
  // Takes the GPU of that number. An Error says what to do where there is none, its driver or the card is too old, or
  // its memory is full.
  explicit GpuDevice(int ordinal = 0);
  ~GpuDevice();
  GpuDevice(const GpuDevice&) = delete;
  GpuDevice& operator=(const GpuDevice&) = delete;

  std::string description() const;  // one line: card, memory, compute capability, driver
  int64_t free_bytes() const;       // of the card's memory, now
  cudaStream_t stream() const { return stream_; }
  std::string card() const;  // what tells this card from all others
  void look_for_errors();    // of work that is done; waits for nothing
  void synchronize();        // waits for all work; an error of a kernel comes out here, or in download()

  // ---- memory ----
  void* allocate(int64_t n_bytes);  // a multiple of 256 as address; undefined content
  void release(void* memory);
  void zero_bytes(void* memory, int64_t n_bytes);
  template <class T>
  void zero(T* data, int64_t count) {  // data (count)
    zero_bytes(data, count * static_cast<int64_t>(sizeof(T)));
  }
  // host may change on return; earlier work goes on meanwhile
  void upload(void* device, const void* host, int64_t n_bytes);
  void download(void* host, const void* device, int64_t n_bytes);  // waits: host holds the data on return
  template <class T>
  void copy(T* to, const T* from, int64_t count) {  // inside the device. to, from (count)
    copy_bytes(to, from, count * static_cast<int64_t>(sizeof(T)));
  }
  void copy_bytes(void* to, const void* from, int64_t n_bytes);
  // ---- a side stream: copies, and what ranks do together, beside the stream of ops ----
  // Memory of the host that copies reach at full speed; as much as is asked for is taken at once. An Error where it is
  // not to be had.
  void* allocate_host(int64_t n_bytes);
  void release_host(void* memory, int64_t n_bytes);
  cudaStream_t side_stream() const { return side_; }
  void side_waits();        // what is put on the side stream from here on waits for all ops so far
  void wait_for_side();     // ops from here on wait for all copies so far
  void side_synchronize();  // waits for all copies so far
  void side_download(void* host, const void* device, int64_t n_bytes);
  // Pieces of n_bytes each, to and from such host memory or the device's.
  void side_copies(const std::vector<std::pair<void*, const void*>>& to_from, int64_t n_bytes);
  double side_copy_seconds();  // in which they were under way so far, by events around each call; waits for the last

  // The step's figures for the host, without a wait until they are read: the GPU runs ahead meanwhile.
  class Snapshot {
   public:
    Snapshot() = default;
    ~Snapshot();
    Snapshot(const Snapshot&) = delete;
    Snapshot& operator=(const Snapshot&) = delete;

   private:
    friend class GpuDevice;
    StepState* value_ = nullptr;  // in memory that the GPU writes by itself
    cudaEvent_t taken_ = nullptr;
  };
  static constexpr bool runs_ahead = true;
  void take(Snapshot& snapshot, const StepState* state);
  StepState read(const Snapshot& snapshot);

  // ---- work that is put together once and done again and again ----
  // Between begin_capture() and end_capture() ops are not done but noted down, with their arguments; replay() puts all
  // of them on the stream at once, which costs the host a few microseconds in all, not a few an op. What they read and
  // write stays where it is, and what changes from replay to replay lies in the GPU's memory. Run the same ops once
  // before: what is set up at a first call (kernels loaded, algorithms measured, rotary angles) cannot be captured.
  // Copies to and from the host, waiting and allocating are errors meanwhile.
  class Graph {
   public:
    Graph() = default;
    Graph(Graph&& other) noexcept : work_(std::exchange(other.work_, nullptr)) {}
    Graph& operator=(Graph&& other) noexcept {
      std::swap(work_, other.work_);
      return *this;
    }
    ~Graph();
    explicit operator bool() const { return work_; }

   private:
    friend class GpuDevice;
    cudaGraphExec_t work_ = nullptr;
  };
  static constexpr bool captures = true;
  void begin_capture();
  Graph end_capture();
  void abandon_capture() noexcept;  // nothing where there is none
  void replay(const Graph& graph);
  template <class Body>
  Graph capture(Body&& body) {  // what body() puts on the stream
    begin_capture();
    try {
      body();
      return end_capture();
    } catch (...) {
      abandon_capture();
      throw;
    }
  }

  // ---- algorithms of the products ----
  // From now on each new shape's algorithm is the fastest, timed when the shape first comes, or the known one: text of
  // products(), from an earlier run, or empty. Returns why that text is not used (another card, driver or library;
  // damaged), else nothing.
  std::string measure_products(const std::string& known);
  std::string products() const;   // library, driver and card, then a line a shape
  int products_measured() const;  // shapes timed so far

  // ---- retrieval's tables ----
  // Row 0 of each table: no pick, weight 0. pick, w (B,C+1,K)
  void no_pick(int32_t* pick, float* w, int64_t B, int64_t C, int K);
  // fetches[start[m] .. start[m+1]): in order, row * K + k of each pick of chunk m in rows 0..C-1.
  // start (B,C+1), fetches (B,C*K), pick (B,C+1,K)
  void invert_picks(int32_t* start, int32_t* fetches, const int32_t* pick, int64_t B, int64_t C, int K);

  // ---- the step's figures (drt.md, optimiser) ----
  void begin_step(StepState* state);
  // loss += scale * sum of weight[r] * loss[r], plain_loss += scale * sum of loss[r]. loss (rows), weight (rows) or
  // null: 1
  void add_loss(StepState* state, const float* loss, const float* weight, double scale, int64_t rows);
  // Before ranks add up their figures: broken, broken_rank = 1, rank where the loss is not finite.
  void tell_broken(StepState* state, int rank);
  // squares += sum of the squares of some gradients. gradient (n)
  void add_squares(StepState* state, const float* gradient, int64_t n);
  // Norm of all gradients, the factor that clips it, and whether the step may change anything.
  void end_gradient(StepState* state, double clip);

 protected:
  // Working memory of one op: dead when the op's last kernel is done. What an op puts there is said where it does.
  static constexpr int64_t scratch_bytes = 64 << 20;
  template <class T>
  T* scratch(int64_t count, int64_t first_byte = 0) const {
    const int64_t end = first_byte + count * static_cast<int64_t>(sizeof(T));
    GCA_CHECK(end <= scratch_bytes, "an op's working memory is ", scratch_bytes, " bytes, this shape needs ", end,
              "; use a smaller --micro-batch or --chunks");
    return reinterpret_cast<T*>(static_cast<char*>(scratch_) + first_byte);
  }
  // Cosines | sines of the rotary embedding, (S,d): made on the host in double when (S,d) changes.
  const float* rotation(int S, int d);

  struct Products;  // cuBLASLt's handle, and the algorithm chosen for each shape (kernels/matmul.cu)
  static std::shared_ptr<Products> make_products();
  int ordinal_, processors_ = 0;
  int64_t shared_of_processor_ = 0;  // bytes
  cudaStream_t stream_ = nullptr, side_ = nullptr;
  cudaEvent_t passed_ = nullptr;  // what one stream waits for in the other
  void* scratch_ = nullptr;
  std::shared_ptr<Products> products_;

 private:
  // Uploads go through pinned memory, a ring of pieces, each free again when its event has passed.
  static constexpr int64_t staging_bytes = 1 << 20;
  static constexpr int staging_pieces = 8;
  char* staging_ = nullptr;
  cudaEvent_t uploaded_[staging_pieces] = {};
  int next_piece_ = 0;

  // Around a call of side_copies(). Those under way, the oldest first; events that can be used again.
  struct TimedCopies {
    cudaEvent_t begun = nullptr, done = nullptr;
  };
  std::deque<TimedCopies> under_way_;
  std::vector<TimedCopies> unused_;
  double side_copy_seconds_ = 0;
  void count_copies(bool wait);  // those that are done, or all

  bool capturing_ = false;
  void not_while_capturing(const char* what) const;

  float* rotation_ = nullptr;  // (S,d) of below
  int rotation_S_ = 0, rotation_d_ = 0;
  void close() noexcept;  // gives everything back
};

// ---- the backend --------------------------------------------------------------------------------------------------
template <class Act>
class Gpu : public GpuDevice {
 public:
  using act = Act;       // activations and their gradients
  using weight = Act;    // weights as the products read them
  using master = float;  // weights as the optimiser keeps them
  static constexpr bool weights_are_masters = std::is_same_v<Act, float>;
  using GpuDevice::GpuDevice;

  double peak_flops();  // floating-point operations a second that a large product reaches, measured

  // dst = src. dst (rows,D), its rows dst_stride apart; src (rows,D), its rows src_stride apart
  void copy_rows(act* dst, int64_t dst_stride, const act* src, int64_t src_stride, int64_t rows, int64_t D);
  // Working weights from masters. weights, masters (n)
  void cast_weights(weight* weights, const float* masters, int64_t n);

  // ---- embedding: x[r] = E[token[r]]. x (rows,D), token (rows), E (V,D) ----
  void embedding_forward(act* x, const int32_t* token, const weight* E, int64_t rows, int64_t D);
  void embedding_backward(float* dE, const act* dx, const int32_t* token, int64_t rows, int64_t D);  // dE +=

  // ---- RMSNorm: out = gain * x * rstd, rstd = 1 / sqrt(mean(x^2) + eps) ----
  // out (rows,D) packed, rstd (rows), gain (D); the rows of x are stride apart (D: packed)
  void rmsnorm_forward(act* out, float* rstd, const act* x, const weight* gain, int64_t rows, int64_t D, int64_t stride,
                       double eps);
  // With g = gain * dn and xhat = x * rstd:
  //   dx = residual + residual2 + rstd * (g - xhat * mean(g * xhat))
  //   dgain += sum of dn * xhat
  //   n = the norm's output once more, with forward's bits, where it is asked for
  // dx may be dn (where stride is D), or a residual
  void rmsnorm_backward(const RmsnormBackward<act, weight, float, float>& a, int64_t rows, int64_t D, int64_t stride);

  // ---- matrix products: y = x W^T (+ residual) ----
  // y (rows,out), x (rows,in), W (out,in), residual (rows,out) or null, not y
  // Up to 16 rows in bf16 (of whole 16 bytes) are bound by reading W, once, and have the same bits alone and together.
  void matmul_forward(act* y, const act* x, const weight* W, const act* residual, int64_t rows, int64_t in,
                      int64_t out);
  // dx (+)= dy W
  void matmul_backward_input(act* dx, const act* dy, const weight* W, bool accumulate, int64_t rows, int64_t in,
                             int64_t out);
  // dW += dy^T x
  void matmul_backward_weight(float* dW, const act* dy, const act* x, int64_t rows, int64_t in, int64_t out);

  // ---- SwiGLU: h = silu(gate) * up. h (rows,F), gate_up (rows,2F): gate | up ----
  void swiglu_forward(act* h, const act* gate_up, int64_t rows, int64_t F);
  // dgate_up may be gate_up; h: = once more, with forward's bits, or null
  void swiglu_backward(act* dgate_up, act* h, const act* dh, const act* gate_up, int64_t rows, int64_t F);

  // ---- sliding-window attention with ALiBi (drt.md SWA) ----
  // out (B,T,D), lse (B,H,T), qkv (B,T,3D), ring (B,W,2D) or null
  void sliding_attention_forward(act* out, float* lse, const act* qkv, const act* ring, const SlidingShape& s);
  // Whole rows.
  void sliding_attention_backward(act* dqkv, const act* dout, const act* qkv, const act* out, const float* lse,
                                  const SlidingShape& s);
  // Keys and values of these slots go into the ring, for later segments.
  void ring_append(act* ring, const act* qkv, const SlidingShape& s);

  // ---- chunk attention: bidirectional inside a chunk, rotary embedding on q and k ----
  // out (N,S,D), lse (N,H,S), qkv (N,S,3D)
  void chunk_attention_forward(act* out, float* lse, const act* qkv, const ChunkShape& s);
  void chunk_attention_backward(act* dqkv, const act* dout, const act* qkv, const act* out, const float* lse,
                                const ChunkShape& s);

  // ---- causal chunk retrieval. pick, w (B,C+1,K): rows 1..C are written; r (B,C,D); landmark: see RetrievalShape ----
  // A given pick that is not in the past becomes chunk 0 with a weight that is not a number, so that the step is seen
  // and skipped.
  void chunk_retrieval_forward(int32_t* pick, float* w, const act* r, const act* landmark, const RetrievalShape& s,
                               const Selection& selection);
  void chunk_retrieval_backward(const RetrievalBackward<act, float>& a, const RetrievalShape& s);

  // ---- grouped cross attention ----
  // The landmark slot's keys and values become zero. kv (N,S,2D), N chunks
  void zero_landmarks(act* kv, int64_t N, int64_t S, int64_t D);
  // out (B,T,D), lse (B,C,K,H,S) or null, q (B,T,D), kv (B,M,S,2D), pick, w (B,C+1,K)
  void gca_forward(act* out, float* lse, const act* q, const act* kv, const int32_t* pick, const float* w,
                   const GcaShape& s);
  // By query, a layer at a time.
  void gca_backward_query(const GcaBackward<act, float>& a, const GcaShape& s);
  // For the memory, once, over all layers of all groups. dkv (B,M,S,2D), its landmark rows zero; layers (n_layers): a
  // host array
  void gca_backward_memory(act* dkv, const FetchingLayer<act, float>* layers, int n_layers, const act* kv,
                           const GcaShape& s);

  // ---- one slot of each row, as decoding reads it (ops.h, SlotRow) ----
  // A row has the same bits alone and among others (products: in bf16, up to 16 rows). Addresses and strides of a
  // SlotRow are uploaded, never written by a kernel: they are read before the op ahead is done.

  // y = Norm(x) W^T, for passes that keep nothing: n (rows,in), rstd (rows) are working memory, which may stay as it
  // was. y (rows,out), x (rows,in), gain (in), W (out,in)
  void norm_matmul_forward(act* y, act* n, float* rstd, const act* x, const weight* gain, const weight* W, int64_t rows,
                           int64_t in, int64_t out, double eps);
  // y = SwiGLU(gate_up) W^T + residual, likewise: h (rows,F) is working memory. y, residual (rows,out), gate_up
  // (rows,2F): gate | up, W (out,F)
  void swiglu_matmul_forward(act* y, act* h, const act* gate_up, const weight* W, const act* residual, int64_t rows,
                             int64_t F, int64_t out);
  // Sliding-window attention; the slot's k | v go into the ring of that layer. out (B,D), qkv (B,3D), rows (B)
  void slot_attention_forward(act* out, const act* qkv, const SlotRow<act, float>* rows, int64_t layer,
                              const SlotShape& s);
  // Grouped cross attention to the group's picks that serve the slot. out, q (B,D), rows (B)
  void slot_gca_forward(act* out, const act* q, const SlotRow<act, float>* rows, int64_t group, const SlotShape& s);
  // The slot's place in the row's unfinished chunk = x. x (B,D), rows (B)
  void keep_slot(const act* x, const SlotRow<act, float>* rows, const SlotShape& s);
  // The rows stand one slot further. rows (B)
  void next_slot(SlotRow<act, float>* rows, int64_t B);

  // ---- cross entropy, a piece of logits at a time ----
  // loss[r] = logsumexp(logits[r]) - logits[r,target[r]], 0 where target[r] is negative. scale != 0: logits become
  // their gradient, scale * weight[r] * (softmax - onehot).
  // loss, target (rows), weight (rows) or null: 1, logits (rows,V), their rows stride apart
  void cross_entropy(float* loss, act* logits, const int32_t* target, const float* weight, double scale, int64_t rows,
                     int64_t V, int64_t stride);

  // ---- the next token of each row ----
  // What the CPU chooses from the same logits, but that a draw within about a millionth of an edge between two tokens
  // may fall to either side. token (rows), logits (rows,V), their rows stride apart
  void choose_token(int32_t* token, const act* logits, int64_t rows, int64_t V, int64_t stride, const Choice& c);
  // token[r] = the landmark where that is row r's slot, else chosen[r]. token, chosen, rows (B)
  void feed_tokens(int32_t* token, const int32_t* chosen, const SlotRow<act, float>* rows, int32_t landmark, int64_t B,
                   int64_t S);
  // noted[r, index[r] % places] = token[r] = fresh[r], and index[r] is one more; of all rows, or of those (rows) whose
  // slot before this one was no landmark's. noted (B,places): of allocate_host(), where the host sees each as soon as
  // it is there; token, fresh, index, rows (B)
  void note_tokens(int32_t* noted, int64_t* index, int32_t* token, const int32_t* fresh,
                   const SlotRow<act, float>* rows, int64_t B, int64_t S, int64_t places);

  // ---- optimiser ----
  // masters, m, v, gradient: flat buffers; weights: the working copy (the masters themselves, or rounded from them), as
  // long; segments (n_segments): a host array of what they hold
  void adamw(float* masters, weight* weights, float* m, float* v, const float* gradient, const Segment* segments,
             int64_t n_segments, const StepState* state, const AdamW& hyper);
};

}  // namespace gca
