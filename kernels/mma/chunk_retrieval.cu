// Causal chunk retrieval, the selection, on tensor cores (mma.sync): bf16, rows in whole pieces of 16 bytes. What
// plain/chunk_retrieval.cu does, which is what to read first; here sums stay in registers, and one comparison with the
// query's K-th best so far is all that most of them take.
//
//   many queries     landmarks m0 .. m0 + 128       few queries     landmarks m0 .. m0 + 64
//     128 queries  [ warp 0  2  4  6 ]                16 queries  [ warp 0  1  2  3 ]
//                  [ warp 1  3  5  7 ]                 16 x 16 scores a warp
//       64 x 32 scores a warp
//   of them a lane: 4 x 4 Sums, 64 scores in              of them a lane: 2 Sums, 8 scores in
//   8 rows r, r + 8, .. r + 56, r = lane / 4, and         rows r and r + 8,
//   8 columns 2 q, 2 q + 1, + 8, .. + 24, q = lane % 4    4 columns 2 q, 2 q + 1, + 8: the bits of `waits`
//
//   a tile's scores -> those above their query's bound -> 16 places a query where they wait -> a thread a query puts
//   them in among its K best, which makes the bound -> again, while any found no place -> the next tile
//
// A score is one chain of mma over columns 0 to D in either plan, from a query that is the left factor and a landmark
// that is the right one, columns past D being zero: its bits depend neither on the plan nor on the place in a tile.
//
// Shared memory, K = 8:       many                 few
//   ring of (Q | landmarks)        0  2 x 32,768        0  6 x 10,240   64 columns; copied in the background
//   waiting (16, queries)     65,536                61,440              sums and chunks
//   value   (16, queries)          -                63,488              of drawn ones: what ranks them
//   bound   (queries)         81,920                64,512              no smaller sum (value) can be picked
//   count   (queries)         82,432                64,576              how many asked for a place
//   best    (K, rank | score) 82,944                64,640              of each query, the best first
//   end                       95,232                66,176
// A stage is free when all warps have passed the next barrier. What stands behind the ring belongs to the thread of its
// query, but between two barriers, when all threads put sums into places that wait.
#include "kernels/chunk_retrieval.cuh"
#include "kernels/mma/mma.cuh"

namespace gca {
namespace {

constexpr int slab = 64;  // columns of r and landmarks in a stage
struct SelectPlan {
  int queries, landmarks;             // of a block, at once
  int rows_of_warp, columns_of_warp;  // of their scores
  int stages;                         // of the ring
  int residents;                      // blocks of a multiprocessor at once, where K is 8
  int places = 16;                    // of a query, for sums that wait

  GCA_HD constexpr int blocks() const { return rows_of_warp / 16; }
  GCA_HD constexpr int columns() const { return columns_of_warp / 8; }
  GCA_HD constexpr int threads() const { return queries / rows_of_warp * (landmarks / columns_of_warp) * 32; }
  GCA_HD constexpr int query_bytes() const { return queries * row_bytes<slab>; }
  GCA_HD constexpr int stage_bytes() const { return (queries + landmarks) * row_bytes<slab>; }
};
// Many queries: reading 128 + 128 rows for 128 x 128 scores, a block asks the cache for half as much as by tiles of 64,
// and two blocks a multiprocessor have one's scores compared while the other multiplies. Few: the landmarks' way from
// memory is all that counts, so little else is held and 5 stages of each of three blocks are under way.
GCA_HD constexpr SelectPlan select_plan(bool many) {
  if (many)
    return {.queries = 128, .landmarks = 128, .rows_of_warp = 64, .columns_of_warp = 32, .stages = 2, .residents = 2};
  return {.queries = 16, .landmarks = 64, .rows_of_warp = 16, .columns_of_warp = 16, .stages = 6, .residents = 3};
}

// A sum that may be among its query's best.
struct Waiting {
  float sum;
  int32_t chunk;
};
// What stands behind the ring, from `memory` on: all but the number of the best is known to the compiler.
template <bool many, bool drawn>
struct SelectMemory {
  static constexpr SelectPlan plan = select_plan(many);
  static constexpr int Q = plan.queries, places = plan.places * Q, rank_bytes = Q * 8, best_bytes = Q * 12;
  static constexpr int value_at = places * static_cast<int>(sizeof(Waiting)),
                       bound_at = value_at + (drawn ? places * 4 : 0), count_at = bound_at + Q * 4,
                       best_at = count_at + Q * 4;
  char* memory;
  template <class T>
  __device__ T& at(int byte, int i) const {
    return reinterpret_cast<T*>(memory + byte)[i];
  }
  __device__ Waiting& waiting(int place, int q) const { return at<Waiting>(0, place * Q + q); }
  __device__ float& value(int place, int q) const { return at<float>(value_at, place * Q + q); }
  __device__ float& bound(int q) const { return at<float>(bound_at, q); }
  __device__ int& count(int q) const { return at<int>(count_at, q); }
  __device__ uint64_t& rank(int k, int q) const { return at<uint64_t>(best_at + k * best_bytes, q); }
  __device__ float& score(int k, int q) const { return at<float>(best_at + k * best_bytes + rank_bytes, q); }
};
template <bool many, bool drawn>
constexpr int select_bytes(int K) {
  using Memory = SelectMemory<many, drawn>;
  return select_plan(many).stages * select_plan(many).stage_bytes() + Memory::best_at + K * Memory::best_bytes;
}
static_assert(select_bytes<true, false>(8) == 95232, "the map above");
static_assert(select_bytes<false, true>(8) == 66176, "the map above");
static_assert(select_plan(true).stage_bytes() == 32768 && select_plan(false).stage_bytes() == 10240, "the map above");
static_assert(select_plan(true).threads() == 256 && select_plan(false).threads() == 128, "the warps above");
constexpr int most_bytes = 99 << 10;  // that a block may have on every card from sm_80 on
static_assert(select_bytes<false, true>(max_topk) <= most_bytes, "few queries serve every K");

// Starts copying columns column.. of `rows` rows, `stride` apart, into a tile: zeros past column D, and past the last
// of `there` rows that one again, which no query looks at.
template <int rows, int threads>
__device__ inline void copy_rows_of(uint32_t tile, const bf16* from, int stride, int there, int column, int D) {
  constexpr int pieces = slab / 8, at_once = threads / pieces;
  static_assert(threads % pieces == 0 && rows % at_once == 0, "every thread copies the same number of pieces");
  const int piece = static_cast<int>(threadIdx.x) % pieces, first = static_cast<int>(threadIdx.x) / pieces;
  const bool column_there = column + piece * 8 < D;
  from += column_there ? column + piece * 8 : 0;
#pragma unroll
  for (int i = 0; i < rows / at_once; i++) {
    const int row = first + i * at_once;
    copy_async(tile + piece_at<slab>(row, piece), from + min(row, there - 1) * stride, column_there);
  }
}

bool values_are_drawn(const Selection& selection) { return selection.picking == Picking::uniform || selection.noise; }
// Which plan: many queries where tiles of 128 x 128 fill the GPU. Noise goes with few: its arithmetic for 64 scores of
// a thread would not fit into registers.
bool many_queries(const RetrievalShape& s, const Selection& selection, int64_t processors) {
  constexpr SelectPlan many = select_plan(true);
  const int64_t tiles = s.B * ceil_div(s.C, many.queries) * ceil_div(most_candidates(s), many.landmarks);
  return s.C > 2 * select_plan(false).queries && tiles >= many.residents * processors && !values_are_drawn(selection) &&
         select_bytes<true, false>(s.K) <= most_bytes;
}

// The thread of query q puts what waits in among the best, and says what is worth waiting from now on. past: chunks
// that the query may see
template <bool many, bool drawn>
__device__ inline void take_waiting(const SelectMemory<many, drawn>& at, int q, int past, int K, float root) {
  const int waiting = min(at.count(q), select_plan(many).places);
  for (int i = 0; i < waiting; i++) {
    const Waiting one = at.waiting(i, q);
    if (one.chunk >= past) continue;
    const float score = one.sum / root;
    const uint64_t rank = rank_of(drawn ? at.value(i, q) : score, one.chunk);
    int k = K;
    for (; k > 0 && rank > at.rank(k - 1, q); k--) {
      if (k == K) continue;
      at.rank(k, q) = at.rank(k - 1, q);
      at.score(k, q) = at.score(k - 1, q);
    }
    if (k == K) continue;
    at.rank(k, q) = rank;
    at.score(k, q) = score;
  }
  const uint64_t last = at.rank(K - 1, q);
  if (waiting > 0 && last) {
    // A smaller sum gives a smaller score, or the same one by rounding: the bound keeps well below.
    const float least = value_of(last), of_sum = least * root;
    at.bound(q) = drawn ? least : of_sum - fabsf(of_sum) * 0x1p-20f - 0x1p-120f;
  }
  at.count(q) = 0;
}

// Block: `queries` queries of a row against one split of the landmarks. drawn: values_are_drawn()
template <bool many, bool drawn>
__global__ void __launch_bounds__(select_plan(many).threads(), select_plan(many).residents)
    chunk_retrieval_select_mma_kernel(Selected to,
                                      const bf16* r,         // (B,C,D)
                                      const bf16* landmark,  // see RetrievalShape
                                      RetrievalShape s, Selection selection) {
  constexpr SelectPlan plan = select_plan(many);
  constexpr int threads = plan.threads(), blocks = plan.blocks(), columns = plan.columns(), Q = plan.queries;
  // Numbers of chunks fit into 32 bits, as in the pick table.
  const int C = static_cast<int>(s.C), query_tiles = static_cast<int>(ceil_div(s.C, Q)), block = blockIdx.x,
            first = block % query_tiles * Q, row = static_cast<int>(block / query_tiles % s.B),
            split = static_cast<int>(block / query_tiles / s.B), queries = min(Q, C - first);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = lane_id();
  const int warp_row = warp % (Q / plan.rows_of_warp) * plan.rows_of_warp,
            warp_column = warp / (Q / plan.rows_of_warp) * plan.columns_of_warp;
  const float root = sqrtf(static_cast<float>(s.D));
  const int first_chunk = static_cast<int>(s.first_chunk) + first, apart = to.splits * plan.landmarks;
  auto seen_by = [](int chunk) { return static_cast<int>(candidates(chunk)); };
  // Landmarks that the last query may see, and those that all may.
  const int most = selection.picking == Picking::none ? 0 : seen_by(first_chunk + queries - 1),
            common = seen_by(first_chunk);
  char* memory = shared<char>();
  const uint32_t ring = shared_address(memory);
  const SelectMemory<many, drawn> at{memory + plan.stages * plan.stage_bytes()};

  // Fills that stage with the next 64 columns, of the next tile after the last ones.
  const bf16 *query = r + (int64_t{row} * C + first) * s.D, *landmarks = landmark + row * s.row_stride;
  int load_m = split * plan.landmarks, load_column = 0;
  auto load = [&](int into) {
    if (load_m < most) {
      const uint32_t stage = ring + static_cast<uint32_t>(into * plan.stage_bytes());
      copy_rows_of<Q, threads>(stage, query, s.D, queries, load_column, s.D);
      copy_rows_of<plan.landmarks, threads>(stage + plan.query_bytes(), landmarks + load_m * s.stride,
                                            static_cast<int>(s.stride), most - load_m, load_column, s.D);
      load_column += slab;
      if (load_column >= s.D) {
        load_column = 0;
        load_m += apart;
      }
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < plan.stages - 1; i++) load(i);
  if (thread < Q) {  // each by the thread of its query
    for (int k = 0; k < s.K; k++) at.rank(k, thread) = 0;
    at.bound(thread) = thread < queries ? -INFINITY : INFINITY;
    at.count(thread) = 0;
  }

  int stage = 0;
  for (int m0 = split * plan.landmarks; m0 < most; m0 += apart) {
    Sum sum[blocks][columns];
    clear(sum);
    for (int t = 0; t < s.D; t += slab) {
      wait_for_copies<plan.stages - 2>();
      __syncthreads();
      load(stage == 0 ? plan.stages - 1 : stage - 1);
      const uint32_t q_tile = ring + static_cast<uint32_t>(stage * plan.stage_bytes());
      multiply_rows<slab>(sum, q_tile, warp_row, q_tile + plan.query_bytes(), warp_column);
      stage = stage + 1 == plan.stages ? 0 : stage + 1;
    }

    // Which of this lane's sums, in order of i, half, j, e, wait for a look: none before the first one.
    uint64_t waits = ~uint64_t{0} >> (64 - blocks * columns * 4);
    const int m_lane = m0 + warp_column + lane % 4 * 2;
    // What ranks each where it is drawn, in the same order.
    float value[drawn ? 4 * blocks * columns : 1];
    if constexpr (drawn) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int q = warp_row + 8 * half + lane / 4;
        const int chunk = first_chunk + q, past = q < queries ? seen_by(chunk) : 0;
#pragma unroll
        for (int j = 0; j < columns; j++) {
          const int m = m_lane + 8 * j;
          const bool by_word = selection.picking == Picking::uniform || !selection.given_noise;
          Philox draw{};
          if (by_word) draw = selection_draw(selection, row, chunk, m / 4);
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const float raw = sum[0][j][2 * half + e] / root;
            float& mine = value[(half * columns + j) * 2 + e];
            mine = -INFINITY;
            if (by_word) mine = drawn_value(selection, raw, m % 4 ? draw.word[2 + e] : draw.word[e]);
            else if (m + e < past)
              mine = raw + selection.noise_scale * selection.given_noise[(row * s.C + first + q) * s.C + m + e];
            if (m + e >= past) mine = -INFINITY;
          }
        }
      }
    } else if (m0 + plan.landmarks > common) {  // some may not see all of these
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int past = seen_by(first_chunk + warp_row + 16 * i + 8 * half + lane / 4);
#pragma unroll
          for (int j = 0; j < columns; j++)
#pragma unroll
            for (int e = 0; e < 2; e++)
              if (m_lane + 8 * j + e >= past) sum[i][j][2 * half + e] = -INFINITY;
        }
    }
    bool again;
    do {
#pragma unroll
      for (int i = 0; i < blocks; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int q = warp_row + 16 * i + 8 * half + lane / 4;
          const float bound = at.bound(q);
#pragma unroll
          for (int j = 0; j < columns; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
              const int place_of_bit = ((i * 2 + half) * columns + j) * 2 + e;
              const uint64_t bit = uint64_t{1} << place_of_bit;
              const float x = sum[i][j][2 * half + e], ranked = drawn ? value[drawn ? place_of_bit : 0] : x;
              if (waits & bit && !(ranked < bound)) {  // what is not a number too
                const int place = atomicAdd(&at.count(q), 1);
                if (place >= plan.places) continue;
                at.waiting(place, q) = {x, m_lane + 8 * j + e};
                if constexpr (drawn) at.value(place, q) = ranked;
              }
              waits &= ~bit;
            }
        }
      again = __syncthreads_or(waits != 0);
      if (thread < Q) take_waiting(at, thread, thread < queries ? seen_by(first_chunk + thread) : 0, s.K, root);
      if (again) __syncthreads();
    } while (again);
  }
  __syncthreads();
  for (int q = warp; q < queries; q += threads / 32) {
    const int k = min(lane, s.K - 1);
    to.write(s, row, first + q, split, at.rank(k, q), at.score(k, q));
  }
}

// The selection by one of the plans.
template <bool many, bool drawn>
void select(cudaStream_t stream, const Selected& to, const bf16* r, const bf16* landmark, const RetrievalShape& s,
            const Selection& selection) {
  constexpr SelectPlan plan = select_plan(many);
  launch("chunk retrieval", stream, chunk_retrieval_select_mma_kernel<many, drawn>,
         s.B * ceil_div(s.C, plan.queries) * to.splits, plan.threads(), select_bytes<many, drawn>(s.K), to, r, landmark,
         s, selection);
}

}  // namespace

int64_t chunk_retrieval_splits_mma(const RetrievalShape& s, const Selection& selection, int64_t processors) {
  const SelectPlan plan = select_plan(many_queries(s, selection, processors));
  return even_splits(plan.residents * processors, s.B * ceil_div(s.C, plan.queries),
                     ceil_div(most_candidates(s), plan.landmarks));
}

void chunk_retrieval_select_mma(cudaStream_t stream, const Selected& to, const bf16* r, const bf16* landmark,
                                const RetrievalShape& s, const Selection& selection, int64_t processors) {
  if (many_queries(s, selection, processors)) select<true, false>(stream, to, r, landmark, s, selection);
  else if (values_are_drawn(selection)) select<false, true>(stream, to, r, landmark, s, selection);
  else select<false, false>(stream, to, r, landmark, s, selection);
}

}  // namespace gca
