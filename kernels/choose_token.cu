// The next token of each row of logits: the largest, or a draw from the likeliest. A block of 1,024 threads takes a
// row, N neighbours a thread, a few times: after the first time the row comes from the first cache.
//
//   logit x  --> y = (best - x) / (T ln 2), its place below the largest logit in powers of two, up to 40
//            --> mass = 2^(40 - y), a whole number: sums are exact, so that no order of adding matters
//   passes   1  the largest logit, its lowest id
//            2  the mass of each of 2,048 bins: 51 a unit of y. Both questions below go on from their running sums
//            .. which token is the first whose running sum, likeliest first, reaches a target? Its bin is an interval
//               of logits; while that holds more than one value, it is cut into 2,048 parts that are summed in their
//               turn (bf16: once at most). The tokens of one value have one mass: division tells which of them it is
//   asked twice: for target top_p * (all mass), which tells how much is kept, and for random * kept, the draw; then
//               a last pass finds the token by its value and number among equals
//
// Logits are handled as keys, whole numbers in their order, where intervals are cut.
//
// Shared memory, static:
//        0  low      2,048 words   of the bins' masses: all threads add to them; a thread owns two bins, which it
//    8,192  high     2,048 words   clears as it reads them
//   16,384  of_warp  32 x 8 bytes  a number of each warp, by its lane 0
//   16,640  before   8 bytes       the answer to a question, by the thread that found it
//   16,648  bin      4 bytes
//   16,656  end
// Each is read behind a barrier and written again behind another.
#include <algorithm>
#include <cfloat>

#include "gca_kernels.cuh"
#include "kernels/mma/mma.cuh"

namespace gca {
namespace {

constexpr int threads = 1024, warps = threads / 32, bins = 2 * threads;
constexpr float most_below = 40, bins_a_unit = 51;  // of y
static_assert(most_below * bins_a_unit < bins);

// ---- keys: whole numbers in the order of the logits, -0 and 0 one of them ------------------------------------------
template <class Act>
constexpr int key_shift = sizeof(Act) == 2 ? 16 : 0;  // bf16: of the float that it is, the upper half
template <class Act>
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u ? ~bits : bits | 0x80000000u) >> key_shift<Act>;
}
template <class Act>
__device__ inline float of_key(uint32_t key) {
  uint32_t bits = key << key_shift<Act>;
  if (bits & 0x80000000u) return __uint_as_float(bits & 0x7fffffffu);
  if (key_shift<Act>) bits |= 0xffff;
  return __uint_as_float(~bits);
}

// ---- a row ---------------------------------------------------------------------------------------------------------
template <class Act, int N>
struct Row {
  const Act* logits;  // (V)
  int V, excluded;

  // Logits j .. j + N - 1, not numbers where they are not to be chosen.
  __device__ Pack<float, N> load(int j) const {
    const auto pack = load_pack<N>(logits + j);
    Pack<float, N> x;
#pragma unroll
    for (int e = 0; e < N; e++) x.at[e] = to_float(pack.at[e]);
    if (j + N > V || (excluded >= j && excluded < j + N)) {
#pragma unroll
      for (int e = 0; e < N; e++)
        if (j + e >= V || j + e == excluded) x.at[e] = NAN;
    }
    return x;
  }
  // body(x) for all logits, shared among the block's threads.
  template <class Body>
  __device__ void for_each(Body body) const {
#pragma unroll 2
    for (int j = static_cast<int>(threadIdx.x) * N; j < V; j += threads * N) {
      const auto x = load(j);
#pragma unroll
      for (int e = 0; e < N; e++) body(x.at[e]);
    }
  }
};

struct Shared {
  uint32_t low[bins], high[bins];  // of masses: low words, and what they carry
  uint64_t of_warp[warps];
  uint64_t before;  // the answer: the mass before a bin, and which
  int bin;
};
static_assert(offsetof(Shared, of_warp) == 16384 && offsetof(Shared, bin) == 16648, "the map above");
static_assert(sizeof(Shared) == 16656, "the map above");

// The largest of the block's numbers.
__device__ inline uint64_t block_max(uint64_t x, Shared& shared) {
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, x, step);
    x = max(x, other);
  }
  __syncthreads();
  if (lane_id() == 0) shared.of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared.of_warp[lane_id()];
  for (int step = 16; step > 0; step /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, x, step);
    x = max(x, other);
  }
  return x;
}

// The largest logit, and the lowest id that has it: key << 32 | ~id; 0 where no logit counts.
template <class Act, int N>
__device__ uint64_t largest(const Row<Act, N>& row, Shared& shared) {
  const auto best_of = [&](bool infinite) {  // only those above minus infinity, or only these
    float best = -INFINITY;
    int at = -1;
#pragma unroll 4
    for (int j = static_cast<int>(threadIdx.x) * N; j < row.V; j += threads * N) {
      const auto x = row.load(j);
      float top = x.at[0];
#pragma unroll
      for (int e = 1; e < N; e++) top = fmaxf(top, x.at[e]);  // a number where there is one
      if (infinite ? at < 0 && top == -INFINITY : top > best) {
        best = top;
        at = j;
      }
    }
    uint64_t mine = 0;
    if (at >= 0) {
      const auto x = row.load(at);
#pragma unroll
      for (int e = N - 1; e >= 0; e--)
        if (x.at[e] == best) mine = uint64_t{key_of<Act>(best)} << 32 | ~static_cast<uint32_t>(at + e);
    }
    return block_max(mine, shared);
  };
  const uint64_t best = best_of(false);
  return best ? best : best_of(true);
}

// ---- masses --------------------------------------------------------------------------------------------------------
// How far below the best, in units of y, and the mass, of logits from `lowest` on.
struct Scale {
  float best, lowest;
  float rate, rate_rest;  // 1 / (T ln 2), and what a float leaves of it

  // Infinite ones are equal to the best, or below `lowest`.
  __device__ float product(float x) const { return fmaxf(best - x, 0.0f) * rate; }
  __device__ int bin(float x) const {
    const float y = fminf(product(x), most_below);
    return __float_as_int(fmaf(y, bins_a_unit, 8388608.0f)) - 0x4b000000;  // 2^23: rounds to a whole number
  }
  __device__ uint64_t mass(float x) const {
    const float below = fmaxf(best - x, 0.0f), product = below * rate,
                rest = fmaf(below, rate_rest, fmaf(below, rate, -product)), y = fminf(product, most_below),
                rounded = y + 12582912.0f;  // 1.5 * 2^23: its last bits are the whole part
    const uint32_t part = __float_as_uint(fast_exp2(((rounded - 12582912.0f) - y) - rest)),  // 2^-0.5 .. 2^0.5
        mantissa = (part & 0x7fffffu) | 0x800000u;
    const uint32_t down = __float_as_uint(rounded) - 0x4b400000u + 127 - (part >> 23);
    return (uint64_t{mantissa} << 17) >> down;
  }
};
__device__ inline void add_mass(uint64_t mass, uint32_t bin, Shared& shared) {
  const uint32_t low = static_cast<uint32_t>(mass), before = atomicAdd(&shared.low[bin], low),
                 high = static_cast<uint32_t>(mass >> 32) + (before + low < before);
  if (high) atomicAdd(&shared.high[bin], high);
}

// Running sums of the bins: of each thread's two, and of all.
struct Sums {
  uint64_t before, first, second, all;
};
__device__ Sums running_sums(Shared& shared) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / 32, at = 2 * static_cast<int>(threadIdx.x);
  const auto add_lower_lanes = [&](uint64_t x) {
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, x, step);
      if (lane >= step) x += other;
    }
    return x;
  };
  __syncthreads();  // the masses are there
  Sums sums;
  sums.first = uint64_t{shared.high[at]} << 32 | shared.low[at];
  sums.second = uint64_t{shared.high[at + 1]} << 32 | shared.low[at + 1];
  shared.low[at] = shared.low[at + 1] = shared.high[at] = shared.high[at + 1] = 0;
  const uint64_t mine = sums.first + sums.second, in_warp = add_lower_lanes(mine);
  if (lane == 31) shared.of_warp[warp] = in_warp;
  __syncthreads();
  const uint64_t of_warps = add_lower_lanes(shared.of_warp[lane]),
                 earlier = __shfl_sync(0xffffffffu, of_warps, max(warp - 1, 0));
  sums.all = __shfl_sync(0xffffffffu, of_warps, 31);
  sums.before = (warp > 0 ? earlier : 0) + in_warp - mine;
  return sums;
}
// The bin whose mass makes the running sum reach the target (1 .. all), and the mass before it.
struct Found {
  uint64_t before;
  int bin;
};
__device__ Found find(const Sums& sums, uint64_t target, Shared& shared) {
  __syncthreads();  // the last answer has been read
  if (sums.before < target && target <= sums.before + sums.first + sums.second) {
    const bool second = target > sums.before + sums.first;
    shared.before = sums.before + (second ? sums.first : 0);
    shared.bin = 2 * static_cast<int>(threadIdx.x) + second;
  }
  __syncthreads();
  return {shared.before, shared.bin};
}

// The smallest key of low .. high for which `holds`, which it does for high and from some key on; by each warp.
template <class Holds>
__device__ uint32_t first_key(uint32_t low, uint32_t high, Holds holds) {
  while (low < high) {
    const uint32_t step = (high - low + 31) / 32,
                   lanes = __ballot_sync(0xffffffffu, holds(min(low + static_cast<uint32_t>(lane_id()) * step, high)));
    const uint32_t first = lanes ? static_cast<uint32_t>(__ffs(static_cast<int>(lanes))) - 1 : 32;
    if (first < 32) high = min(high, low + first * step);
    if (first > 0) low += (first - 1) * step + 1;
  }
  return low;
}

// Where the running sum over tokens, likeliest first, reaches a target.
struct Place {
  float x;        // the logit there
  uint64_t mass;  // of each token that has it
  int equals;     // tokens of that logit before it
  uint64_t end;   // the running sum with it
};
// bin_sums: of all bins
template <class Act, int N>
__device__ Place locate(const Row<Act, N>& row, const Scale& scale, const Sums& bin_sums, uint64_t target,
                        Shared& shared) {
  const auto [before_bin, bin] = find(bin_sums, target, shared);
  uint64_t before = before_bin;
  const uint32_t lowest = key_of<Act>(scale.lowest), best = key_of<Act>(scale.best);
  const auto begin_of = [&](int b) {
    return first_key(lowest, best, [&](uint32_t key) { return scale.bin(of_key<Act>(key)) <= b; });
  };
  uint32_t low = begin_of(bin), high = bin == 0 ? best : begin_of(bin - 1) - 1;
  while (low < high) {
    const int shift = max(0, 21 - __clz(static_cast<int>(high - low)));  // fewer than 2^11 parts
    const float x_low = of_key<Act>(low), x_high = of_key<Act>(high);
    row.for_each([&](float x) {
      if (x >= x_low && x <= x_high) add_mass(scale.mass(x), (high - key_of<Act>(x)) >> shift, shared);
    });
    const Found part = find(running_sums(shared), target - before, shared);
    before += part.before;
    high -= static_cast<uint32_t>(part.bin) << shift;
    const uint32_t width = (1u << shift) - 1;
    if (high - low > width) low = high - width;
  }
  Place place{of_key<Act>(high), 0, 0, 0};
  place.mass = scale.mass(place.x);
  const uint64_t equals = (target - before - 1) / place.mass;
  place.equals = static_cast<int>(equals);
  place.end = before + (equals + 1) * place.mass;
  return place;
}

// The id of token number `equals` of those with logit x: each warp counts in a stretch of the row.
template <class Act, int N>
__device__ int token_at(const Row<Act, N>& row, float x, int equals, Shared& shared) {
  constexpr int at_once = 32 * N;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / 32,
            stretch = (row.V + warps * at_once - 1) / (warps * at_once) * at_once, begin = warp * stretch,
            end = min(begin + stretch, row.V);
  const auto count = [&](int j) {
    int n = 0;
    if (j < row.V) {
      const auto pack = row.load(j);
#pragma unroll
      for (int e = 0; e < N; e++) n += pack.at[e] == x;
    }
    return n;
  };
  int mine = 0;
#pragma unroll 2
  for (int j = begin; j < end; j += at_once) mine += count(j + lane * N);
  mine = warp_sum(mine);
  __syncthreads();  // the last numbers have been read
  if (lane == 0) shared.of_warp[warp] = static_cast<uint64_t>(mine);
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; w++) before += static_cast<int>(shared.of_warp[w]);
  if (before <= equals && equals < before + mine)
    for (int j = begin; j < end; j += at_once) {
      const int n = count(j + lane * N), all = warp_sum(n);
      if (equals < before + all) {
        int left = n;  // of the lanes up to this one
        for (int step = 1; step < 32; step *= 2) {
          const int other = __shfl_up_sync(0xffffffffu, left, step);
          if (lane >= step) left += other;
        }
        left = equals - before - (left - n);
        if (left >= 0 && left < n) {
          const auto pack = row.load(j + lane * N);
#pragma unroll
          for (int e = 0; e < N; e++)
            if (pack.at[e] == x && left-- == 0) shared.bin = j + lane * N + e;
        }
        break;
      }
      before += all;
    }
  __syncthreads();
  return shared.bin;
}

// rate, rate_rest: see Scale; they are not read where no draw is made
template <class Act, int N, bool draws>
__global__ void __launch_bounds__(threads)
    choose_token_kernel(int32_t* token,     // (rows)
                        const Act* logits,  // (rows,V), stride apart
                        int V, int64_t stride, float rate, float rate_rest, Choice choice) {
  __shared__ Shared shared;
  static_assert(sizeof shared == 4 * 2 * bins + 8 * warps + 16);
  let_next_begin();
  wait_for_earlier();
  const int64_t r = blockIdx.x;
  const Row<Act, N> row{logits + r * stride, V, choice.excluded};
  if constexpr (draws)
    for (int i = static_cast<int>(threadIdx.x); i < bins; i += threads) shared.low[i] = shared.high[i] = 0;
  const uint64_t best = largest(row, shared);
  int chosen = static_cast<int>(~static_cast<uint32_t>(best));
  if (best == 0) chosen = choice.excluded == 0 ? 1 : 0;  // nothing but what is not a number
  else if constexpr (draws) {
    Scale scale{of_key<Act>(static_cast<uint32_t>(best >> 32)), 0, rate, rate_rest};
    // In the type of the logits; an infinite best: itself.
    scale.lowest = scale.best == -INFINITY ? scale.best : fmaxf(scale.best - most_below / rate, -FLT_MAX);
    scale.lowest = of_key<Act>(key_of<Act>(scale.lowest));
    row.for_each([&](float x) {
      if (x >= scale.lowest) add_mass(scale.mass(x), static_cast<uint32_t>(scale.bin(x)), shared);
    });
    const Sums sums = running_sums(shared);
    // What is kept, then the draw: floor(random * kept), random being an odd multiple of 2^-24. One call, for both.
    const uint64_t random = uint64_t{2} * (choice_draw(choice, r) >> 9) + 1;
    const double wanted = ceil(fmax(choice.top_p, 0.0) * static_cast<double>(sums.all));
    const uint64_t share = min(max(static_cast<uint64_t>(wanted), uint64_t{1}), sums.all);
    Place place{.end = sums.all};
    for (int drawing = share == sums.all; drawing < 2; drawing++)
      place = locate(row, scale, sums, drawing ? __umul64hi(random << 40, place.end) + 1 : share, shared);
    chosen = token_at(row, place.x, place.equals, shared);
  }
  if (threadIdx.x == 0) token[r] = chosen;
}

// A thread a row.
template <class Act>
__global__ void feed_tokens_kernel(int32_t* token,                   // (B)
                                   const int32_t* chosen,            // (B)
                                   const SlotRow<Act, float>* rows,  // (B)
                                   int32_t landmark, int64_t B, int64_t S) {
  let_next_begin();
  wait_for_earlier();
  const int64_t b = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (b < B) token[b] = slot_of(rows[b]) % S == S - 1 ? landmark : chosen[b];
}
template <class Act>
__global__ void note_tokens_kernel(int32_t* noted,                   // (B,places), the host's
                                   int64_t* index,                   // (B)
                                   int32_t* token,                   // (B)
                                   const int32_t* fresh,             // (B)
                                   const SlotRow<Act, float>* rows,  // (B) or null
                                   int64_t B, int64_t S, int64_t places) {
  let_next_begin();
  wait_for_earlier();
  const int64_t b = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (b >= B || (rows && slot_of(rows[b]) % S == 0)) return;
  token[b] = fresh[b];
  *static_cast<volatile int32_t*>(noted + b * places + index[b] % places) = fresh[b];
  index[b]++;
}

}  // namespace

template <class Act>
void Gpu<Act>::feed_tokens(int32_t* token, const int32_t* chosen, const SlotRow<Act, float>* rows, int32_t landmark,
                           int64_t B, int64_t S) {
  launch_early("tokens to read", stream_, feed_tokens_kernel<Act>, ceil_div(B, 32), 32, token, chosen, rows, landmark,
               B, S);
}
template <class Act>
void Gpu<Act>::note_tokens(int32_t* noted, int64_t* index, int32_t* token, const int32_t* fresh,
                           const SlotRow<Act, float>* rows, int64_t B, int64_t S, int64_t places) {
  launch_early("noting tokens", stream_, note_tokens_kernel<Act>, ceil_div(B, 32), 32, noted, index, token, fresh, rows,
               B, S, places);
}
template <class Act>
void Gpu<Act>::choose_token(int32_t* token, const Act* logits, int64_t rows, int64_t V, int64_t stride,
                            const Choice& c) {
  GCA_CHECK(V <= 1 << 22, "a vocabulary of ", V, ": sums of so many masses need more than 64 bits");
  GCA_CHECK(c.temperature <= 0 || c.index, "a draw needs the number of each row's token");
  // So hot or cold that all, or only equals of the largest, are as likely: the same on its way there.
  const double rate = 1.4426950408889634 / std::clamp(c.temperature, 1e-30, 1e30);
  const float rounded = static_cast<float>(rate), rest = static_cast<float>(rate - static_cast<double>(rounded));
  with_width<Act>({stride}, [&](auto N) {
    const auto kernel = c.temperature > 0 ? choose_token_kernel<Act, N, true> : choose_token_kernel<Act, N, false>;
    launch_early("the next token", stream_, kernel, rows, threads, token, logits, static_cast<int>(V), stride, rounded,
                 rest, c);
  });
}

GCA_BOTH_TYPES(feed_tokens);
GCA_BOTH_TYPES(note_tokens);
GCA_BOTH_TYPES(choose_token);

}  // namespace gca
