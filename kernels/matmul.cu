// Matrix products y = x W^T by cuBLASLt: operands as they are stored, sums in float. The algorithm of a shape is chosen
// once, by cuBLASLt's own ranking or by time among those that give the same bits on every run, and kept. Of few rows in
// bf16, as decoding makes them, by kernels/skinny_matmul.cu.
//
// cuBLASLt reads matrices by columns, so a row-major (r,c) is its (c,r), already transposed, and nothing is copied:
//
//   ours, by rows                        what is asked for, by columns: result (m,n) = a (m,k) b (k,n)
//   y  (rows,out) = x (rows,in) W^T      y^T  (out,rows) = W^T as stored, transposed (out,in) . x^T  (in,rows)
//   dx (rows,in)  = dy (rows,out) W      dx^T (in,rows)  = W^T as stored (in,out)             . dy^T (out,rows)
//   dW (out,in)  += dy^T x               dW^T (in,out)  += x^T as stored (in,rows)            . dy, stored transposed
//
// Tiles, stages and shared memory are the library's; the device's scratch is its workspace, for sums split over k.
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <map>
#include <sstream>

#include "gca_kernels.cuh"
#include "kernels/device.cuh"
#include "kernels/skinny_matmul.cuh"

namespace gca {
namespace {

void check(cublasStatus_t result, const Doing& doing) {
  if (result != CUBLAS_STATUS_SUCCESS)
    throw Error(str(doing.where.file_name(), ":", static_cast<unsigned>(doing.where.line()), ": GPU, ", doing.what,
                    ": cuBLASLt says ", cublasLtGetStatusString(result)));
}

template <class T>
constexpr cudaDataType_t type_of = std::is_same_v<T, float> ? CUDA_R_32F : CUDA_R_16BF;

// A matrix as cuBLASLt sees it, by columns: its column c starts at data + c * stride. A row-major matrix is its own
// transpose there.
struct Operand {
  const void* data;
  bool transposed;
  int64_t stride;
};

template <class Act>
__global__ void matmul_fill_kernel(Act* x,  // (n)
                                   int64_t n) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i < n) x[i] = from_float<Act>(uniform_open(philox(0, Draw::sample, static_cast<uint32_t>(i)).word[0]) - 0.5f);
}

// The largest power of two, up to 256, that the address is a multiple of: not every algorithm takes every address.
uint32_t alignment(const void* address) {
  const auto bits = reinterpret_cast<uintptr_t>(address) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

}  // namespace

struct GpuDevice::Products {
  // transposed a, b; m, n, k; types in, out; whether C is added, and is not D itself; alignments of a, b, C, D
  using Shape = std::array<int64_t, 13>;
  static constexpr size_t words = sizeof(cublasLtMatmulAlgo_t) / sizeof(uint64_t);
  cublasLtHandle_t handle = nullptr;
  std::map<Shape, cublasLtMatmulAlgo_t> chosen;
  std::map<Shape, cublasLtMatmulAlgo_t> known;  // of an earlier run: taken where cuBLASLt agrees
  bool by_time = false;
  int measured = 0;

  Products() { check(cublasLtCreate(&handle), "starting cuBLASLt"); }
  ~Products() { cublasLtDestroy(handle); }

  // result (m,n) = a (m,k) b (k,n) (+ addend (m,n) or null), all by columns; result's and addend's columns are m apart
  template <class In, class Out>
  void multiply(const Doing& doing, Out* result, const Operand& a, const Operand& b, const Out* addend, int64_t m,
                int64_t n, int64_t k, void* workspace, int64_t workspace_bytes, cudaStream_t stream) {
    if (m == 0 || n == 0 || k == 0) return;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t a_layout, b_layout, layout;
    const cublasOperation_t a_op = a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N,
                            b_op = b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    auto rows = [](bool transposed, int64_t r, int64_t c) { return static_cast<uint64_t>(transposed ? c : r); };
    // Sums in float of products in float: TF32 is a compute type of its own, which is not asked for.
    check(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F), doing);
    check(cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &a_op, sizeof a_op), doing);
    check(cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSB, &b_op, sizeof b_op), doing);
    check(
        cublasLtMatrixLayoutInit(&a_layout, type_of<In>, rows(a.transposed, m, k), rows(a.transposed, k, m), a.stride),
        doing);
    check(
        cublasLtMatrixLayoutInit(&b_layout, type_of<In>, rows(b.transposed, k, n), rows(b.transposed, n, k), b.stride),
        doing);
    check(cublasLtMatrixLayoutInit(&layout, type_of<Out>, static_cast<uint64_t>(m), static_cast<uint64_t>(n), m),
          doing);

    const Out* c = addend ? addend : result;
    const float one = 1, beta = addend ? 1 : 0;
    auto run = [&](const cublasLtMatmulAlgo_t& algorithm, const Out* from, Out* to) {
      return cublasLtMatmul(handle, &product, &one, a.data, &a_layout, b.data, &b_layout, &beta, from, &layout, to,
                            &layout, &algorithm, workspace, static_cast<size_t>(workspace_bytes), stream);
    };
    const uint32_t a_bytes = alignment(a.data), b_bytes = alignment(b.data), c_bytes = alignment(c),
                   d_bytes = alignment(result);
    const Shape shape{a.transposed,      b.transposed, m,       n,       k,       type_of<In>, type_of<Out>,
                      addend != nullptr, c != result,  a_bytes, b_bytes, c_bytes, d_bytes};
    auto found = chosen.find(shape);
    if (found == chosen.end()) {
      if (const auto old = known.find(shape); old != known.end()) {
        cublasLtMatmulHeuristicResult_t check_of{};
        if (cublasLtMatmulAlgoCheck(handle, &product, &a_layout, &b_layout, &layout, &layout, &old->second,
                                    &check_of) == CUBLAS_STATUS_SUCCESS &&
            check_of.workspaceSize <= static_cast<size_t>(workspace_bytes))
          found = chosen.emplace(*old).first;
      }
    }
    if (found == chosen.end()) {
      // A sum split over k goes through the workspace, in order.
      const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
      const uint64_t space = static_cast<uint64_t>(workspace_bytes);
      cublasLtMatmulPreferenceOpaque_t wish;
      check(cublasLtMatmulPreferenceInit(&wish), doing);
      check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reductions,
                                                 sizeof reductions),
            doing);
      check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &space, sizeof space),
            doing);
      check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &a_bytes,
                                                 sizeof a_bytes),
            doing);
      check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &b_bytes,
                                                 sizeof b_bytes),
            doing);
      check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &c_bytes,
                                                 sizeof c_bytes),
            doing);
      check(cublasLtMatmulPreferenceSetAttribute(&wish, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &d_bytes,
                                                 sizeof d_bytes),
            doing);
      constexpr int candidates = 24;
      cublasLtMatmulHeuristicResult_t ranked[candidates] = {};
      int count = 0;
      check(cublasLtMatmulAlgoGetHeuristic(handle, &product, &a_layout, &b_layout, &layout, &layout, &wish,
                                           by_time ? candidates : 1, ranked, &count),
            doing);
      GCA_CHECK(count >= 1 && ranked[0].state == CUBLAS_STATUS_SUCCESS, doing.what, ": cuBLASLt has no algorithm for (",
                m, " x ", k, ") by (", k, " x ", n, ")");
      int best = 0;
      if (by_time && count > 1) {
        cudaStreamCaptureStatus status{};
        check(cudaStreamIsCapturing(stream, &status), doing);
        GCA_CHECK(status == cudaStreamCaptureStatusNone, doing.what, " (", m, " x ", k, ") by (", k, " x ", n,
                  "): its algorithm is not chosen yet, and measuring is not possible while work is captured: run the "
                  "same ops once before begin_capture()");
        // A result that is also added to is left alone: its product goes elsewhere meanwhile; cuBLASLt's first where
        // there is no room.
        Out* elsewhere = nullptr;
        if (addend == result &&
            cudaMalloc(reinterpret_cast<void**>(&elsewhere), static_cast<size_t>(m * n) * sizeof(Out)) != cudaSuccess) {
          cudaGetLastError();
          count = 1;
        }
        if (elsewhere) check(cudaMemsetAsync(elsewhere, 0, static_cast<size_t>(m * n) * sizeof(Out), stream), doing);
        float best_ms = INFINITY;
        for (int i = 0; i < count; i++) {
          const float ms = shortest_ms(
              stream, [&] { return run(ranked[i].algo, elsewhere ? elsewhere : c, elsewhere ? elsewhere : result); });
          if (ms < 0.99f * best_ms) {  // cuBLASLt's order decides between equals
            best = i;
            best_ms = ms;
          }
        }
        cudaFree(elsewhere);
        measured++;
      }
      found = chosen.emplace(shape, ranked[best].algo).first;
    }
    check(run(found->second, c, result), doing);
  }

  // Of six calls, the first not counted; infinite where it fails.
  template <class Call>
  static float shortest_ms(cudaStream_t stream, Call call) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "making an event");
    check(cudaEventCreate(&end), "making an event");
    float shortest = INFINITY;
    for (int i = 0; i < 6; i++) {
      check(cudaEventRecord(begin, stream), "timing products");
      if (call() != CUBLAS_STATUS_SUCCESS) break;
      check(cudaEventRecord(end, stream), "timing products");
      check(cudaEventSynchronize(end), "timing products");
      float ms = 0;
      check(cudaEventElapsedTime(&ms, begin, end), "timing products");
      if (i > 0) shortest = std::min(shortest, ms);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return shortest;
  }
};

// What the algorithms are good for: this library with this driver on this card.
static std::string products_header(const std::string& card) {
  return str("products of cuBLASLt ", cublasLtGetVersion(), " on ", card);
}

std::string GpuDevice::products() const {
  std::string text = products_header(description());
  std::map<Products::Shape, cublasLtMatmulAlgo_t> all = products_->chosen;
  all.insert(products_->known.begin(), products_->known.end());  // of other shapes too
  for (const auto& [shape, algorithm] : all) {
    text += "\n";
    for (const int64_t x : shape) text += str(x, " ");
    uint64_t words[Products::words];
    memcpy(words, &algorithm, sizeof words);
    for (const uint64_t word : words) text += str(hex(word, 16), " ");
  }
  return text;
}
int GpuDevice::products_measured() const { return products_->measured; }

std::string GpuDevice::measure_products(const std::string& known) {
  products_->by_time = true;
  products_->chosen.clear();
  products_->known.clear();
  if (known.empty()) return "";
  std::istringstream lines(known);
  std::string line;
  std::getline(lines, line);
  if (const std::string here = products_header(description()); line != here)
    return "they are '" + line + "', this is '" + here + "'";
  while (std::getline(lines, line)) {
    std::istringstream fields(line);
    Products::Shape shape;
    uint64_t words[Products::words];
    for (int64_t& x : shape) fields >> x;
    fields >> std::hex;
    for (uint64_t& word : words) fields >> word;
    std::string more;
    if (!fields || fields >> more) {
      products_->known.clear();
      return str("expected ", shape.size() + Products::words, " numbers a line, found '", line, "'");
    }
    memcpy(&products_->known[shape], words, sizeof words);
  }
  return "";
}

std::shared_ptr<GpuDevice::Products> GpuDevice::make_products() { return std::make_shared<Products>(); }

// By columns, y is y^T (out,rows) = W (out,in) x^T (in,rows), W stored as its transpose.
template <class Act>
void Gpu<Act>::matmul_forward(Act* y, const Act* x, const Act* W, const Act* residual, int64_t rows, int64_t in,
                              int64_t out) {
  if constexpr (std::is_same_v<Act, bf16>) {
    if (skinny_matmul_fits(x, W, rows, in, out))
      return skinny_matmul(stream_, processors_, y, x, W, residual, rows, in, out);
  }
  products_->multiply<Act>("product x W^T", y, {W, true, in}, {x, false, in}, residual, out, rows, in, scratch_,
                           scratch_bytes, stream_);
}
template <class Act>
void Gpu<Act>::norm_matmul_forward(Act* y, Act* n, float* rstd, const Act* x, const Act* gain, const Act* W,
                                   int64_t rows, int64_t in, int64_t out, double eps) {
  if constexpr (std::is_same_v<Act, bf16>) {
    if (skinny_norm_matmul_fits(x, gain, W, rows, in, out))
      return skinny_norm_matmul(stream_, processors_, y, x, gain, eps, W, rows, in, out);
  }
  rmsnorm_forward(n, rstd, x, gain, rows, in, in, eps);
  matmul_forward(y, n, W, nullptr, rows, in, out);
}
template <class Act>
void Gpu<Act>::swiglu_matmul_forward(Act* y, Act* h, const Act* gate_up, const Act* W, const Act* residual,
                                     int64_t rows, int64_t F, int64_t out) {
  if constexpr (std::is_same_v<Act, bf16>) {
    if (skinny_swiglu_matmul_fits(gate_up, W, rows, F, out))
      return skinny_swiglu_matmul(stream_, processors_, y, gate_up, W, residual, rows, F, out);
  }
  swiglu_forward(h, gate_up, rows, F);
  matmul_forward(y, h, W, residual, rows, F, out);
}
// dx^T (in,rows) = W^T (in,out) dy^T (out,rows)
template <class Act>
void Gpu<Act>::matmul_backward_input(Act* dx, const Act* dy, const Act* W, bool accumulate, int64_t rows, int64_t in,
                                     int64_t out) {
  products_->multiply<Act>("product dy W", dx, {W, false, in}, {dy, false, out}, accumulate ? dx : nullptr, in, rows,
                           out, scratch_, scratch_bytes, stream_);
}
// dW^T (in,out) += x^T (in,rows) dy (rows,out)
template <class Act>
void Gpu<Act>::matmul_backward_weight(float* dW, const Act* dy, const Act* x, int64_t rows, int64_t in, int64_t out) {
  products_->multiply<Act>("product dy^T x", dW, {x, false, in}, {dy, true, out}, dW, in, out, rows, scratch_,
                           scratch_bytes, stream_);
}

template <class Act>
double Gpu<Act>::peak_flops() {
  int64_t n = 8192;
  auto matrix_bytes = [&] { return n * n * static_cast<int64_t>(sizeof(Act)); };
  while (4 * matrix_bytes() > free_bytes()) n /= 2;
  Act* x = static_cast<Act*>(allocate(2 * matrix_bytes()));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "making an event");
  check(cudaEventCreate(&end), "making an event");
  launch("random numbers", stream_, matmul_fill_kernel<Act>, ceil_div(n * n, 256), 256, 0, x, n * n);
  const int warm = 3, timed = 5;
  for (int i = 0; i < warm + timed; i++) {
    if (i == warm) check(cudaEventRecord(begin, stream_), "timing products");
    matmul_forward(x + n * n, x, x, nullptr, n, n, n);
  }
  check(cudaEventRecord(end, stream_), "timing products");
  synchronize();
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin, end), "timing products");
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  release(x);
  return timed * 2.0 * static_cast<double>(n * n * n) / (1e-3 * milliseconds);
}

GCA_BOTH_TYPES(peak_flops);
GCA_BOTH_TYPES(matmul_forward);
GCA_BOTH_TYPES(norm_matmul_forward);
GCA_BOTH_TYPES(swiglu_matmul_forward);
GCA_BOTH_TYPES(matmul_backward_input);
GCA_BOTH_TYPES(matmul_backward_weight);

}  // namespace gca
