// SPDX-License-Identifier: Apache-2.0
// What verification needs of each row by itself, and the residual law of a pair of rows with a token
// drawn from it. Two launches each. In the first the tiles of all rows are the work of one warp each,
// so that a row of 151,936 columns is that of 149 warps in 38 blocks, and four rows reach every
// multiprocessor of an H200; a tile leaves its sums in the workspace. In the second a warp per row
// puts its tiles together, in their order, and looks for the token in the one tile that has it. A row
// that is cut by top-k or top-p takes a block in the second launch, which reads only the tiles whose
// largest entry may be kept.
//
// No bit depends on how tiles are dealt out: a tile's sums come from its lanes in a fixed order, a
// row's from its tiles in theirs.
//
// Predicted, not measured: the first launch moves 4 bytes per float32 logit and has, per entry of a
// row, about 13 of the 29 issue slots that an H200 has at 4.0 TB/s (maximum, its column, rank, ex2);
// of a pair about 30 of 58, and should run at the speed of memory. The second costs about 3 us.
#include <limits>

#include "speculative_verify_check.h"
#include "speculative_verify_cut.cuh"

namespace opd {
namespace cuda {
namespace {

// small blocks: a few rows are to reach every multiprocessor
constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kNoColumn = std::numeric_limits<int>::max();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// ---- rows by themselves ----

struct RowsParameters {
  Side side;
  int64_t num_rows;
  int vocab_size, num_tiles;
  const int64_t* token_ids;
  int top_k;
  double top_p;
  TileSums* tiles;  // [num_rows, num_tiles]
  double* lse;
  float* floor;
  double* logprobs;
  int32_t* ranks;
  int32_t* argmax;
  float* largest;

  // an id that no row can have is the caller's error: no answer, and no read beyond the row
  __device__ __forceinline__ bool is_read(int64_t id) const { return id >= -1 && id < vocab_size; }
};

template <bool kGeneral>
__global__ void __launch_bounds__(kThreads, 6) speculative_verify_row_tiles(RowsParameters p) {
  const int64_t index = index_of_warp<kWarps>();
  const int64_t at = index / p.num_tiles;
  if (at >= p.num_rows) return;
  const int tile = static_cast<int>(index - at * p.num_tiles);
  const int64_t id = p.token_ids[at];
  if (!p.is_read(id)) return;
  const SideRow<kGeneral> row(p.side, at);
  float z[kTileVectors][kVector];
  load_tile(row, p.vocab_size, tile, 0, z);
  // nothing is above a NaN
  const float of_id = id < 0 ? static_cast<float>(kNaN) : logit_at(row, static_cast<int>(id));

  float most = kMinusInfinity;  // fmaxf passes over a NaN, which shows in the sum
#pragma unroll
  for (int k = 0; k < kTileVectors; ++k) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) most = fmaxf(most, z[k][i]);
  }
  const float largest = reduce_warp(most, Max());
  const float reference = largest == kMinusInfinity ? 0.0f : largest;
  float sum = 0.0f;
  int argmax = kNoColumn;
  unsigned before = 0;
#pragma unroll
  for (int k = kTileVectors - 1; k >= 0; --k) {
    const int column = column_of(tile, k);
    const int64_t earlier = id - column;  // columns of this vector that come before the id
    float more = 0.0f;
#pragma unroll
    for (int i = kVector - 1; i >= 0; --i) {
      more += detail::exp2_device((z[k][i] - reference) * kLog2E);
      argmax = z[k][i] == largest ? column + i : argmax;
      before += (z[k][i] > of_id) | ((z[k][i] == of_id) & (i < earlier));
    }
    sum += more;
  }
  const double total = reduce_warp(static_cast<double>(sum), Sum());
  argmax = __reduce_min_sync(kAllLanes, argmax);
  before = __reduce_add_sync(kAllLanes, before);
  if (threadIdx.x % kWarp == 0) p.tiles[index] = {total, largest, argmax, before};
}

// A row's tiles together; every lane of the warp gets it.
struct RowSums {
  double sum = 0.0;  // relative to the largest
  float largest = kMinusInfinity;
  int argmax = kNoColumn;
  unsigned before = 0;

  __device__ __forceinline__ RowSums(const TileSums* tiles, int num_tiles) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int tile = lane; tile < num_tiles; tile += kWarp) {
      largest = fmaxf(largest, tiles[tile].largest);
    }
    largest = reduce_warp(largest, Max());
    for (int tile = lane; tile < num_tiles; tile += kWarp) {
      const TileSums& here = tiles[tile];
      const double distance = static_cast<double>(here.largest) - static_cast<double>(largest);
      // a tile of nothing but -inf adds 0, or NaN if it saw one
      sum += here.largest == kMinusInfinity ? here.sum : here.sum * ::exp(distance);
      if (here.largest == largest) argmax = here.argmax < argmax ? here.argmax : argmax;
      before += here.before;
    }
    sum = reduce_warp(sum, Sum());
    argmax = __reduce_min_sync(kAllLanes, argmax);
    before = __reduce_add_sync(kAllLanes, before);
  }

  __device__ __forceinline__ bool is_broken() const {
    return sum != sum || largest == std::numeric_limits<float>::infinity();
  }
  __device__ __forceinline__ bool has_law() const {
    return !is_broken() && largest > kMinusInfinity;
  }
};

// One thread. A row without a law keeps an lse and a largest logit of -inf if that is all it has.
__device__ __forceinline__ void store_nothing(const RowsParameters& p, int64_t at, double lse) {
  p.lse[at] = lse;
  p.floor[at] = static_cast<float>(kNaN);
  p.logprobs[at] = kNaN;
  p.ranks[at] = p.argmax[at] = -1;
  p.largest[at] = static_cast<float>(lse);
}

template <bool kGeneral>
__device__ __forceinline__ void store_row(const RowsParameters& p, int64_t at,
                                          const SideRow<kGeneral>& row, const RowSums& sums,
                                          float floor, double kept) {
  const double lse = static_cast<double>(sums.largest) + ::log(kept);
  const int64_t id = p.token_ids[at];
  double logprob = kNaN;
  if (id >= 0) {
    const float of_id = logit_at(row, static_cast<int>(id));
    const double below = -std::numeric_limits<double>::infinity();
    logprob = of_id >= floor ? static_cast<double>(of_id) - lse : below;
  }
  p.lse[at] = lse;
  p.floor[at] = floor;
  p.logprobs[at] = logprob;
  p.ranks[at] = id < 0 ? -1 : static_cast<int32_t>(sums.before);
  p.argmax[at] = sums.argmax;
  p.largest[at] = sums.largest;
}

// A warp per row that is not cut.
template <bool kGeneral>
__global__ void __launch_bounds__(kThreads) speculative_verify_close(RowsParameters p) {
  const int64_t at = index_of_warp<kWarps>();
  if (at >= p.num_rows) return;
  const bool is_first = threadIdx.x % kWarp == 0;
  if (!p.is_read(p.token_ids[at])) {
    if (is_first) store_nothing(p, at, kNaN);
    return;
  }
  const RowSums sums(p.tiles + at * p.num_tiles, p.num_tiles);
  if (!is_first) return;
  if (!sums.has_law()) return store_nothing(p, at, sums.is_broken() ? kNaN : sums.largest);
  store_row(p, at, SideRow<kGeneral>(p.side, at), sums, kMinusInfinity, sums.sum);
}

// A block per row that is cut.
template <bool kGeneral>
__global__ void __launch_bounds__(kCutThreads) speculative_verify_cut(RowsParameters p) {
  const int64_t at = blockIdx.x;
  const bool is_first = threadIdx.x == 0;
  if (!p.is_read(p.token_ids[at])) {
    if (is_first) store_nothing(p, at, kNaN);
    return;
  }
  const TileSums* const tiles = p.tiles + at * p.num_tiles;
  const RowSums sums(tiles, p.num_tiles);  // in every warp, the same
  if (!sums.has_law()) {
    if (is_first) store_nothing(p, at, sums.is_broken() ? kNaN : sums.largest);
    return;
  }
  const SideRow<kGeneral> row(p.side, at);
  Cut<kGeneral> cut(row, tiles, p.vocab_size, sums.largest);
  const float floor = cut.floor_of(p.top_k, p.top_p, sums.sum);
  const double kept = cut.sum_from(floor);
  if (is_first) store_row(p, at, row, sums, floor, kept);
}

// ---- pairs of rows ----

// A side of the residual law: opd_cut_law_t.
struct CutLaw {
  Side side;
  int64_t num_rows;
  const double* lse;
  const float* floor;
  const int64_t* rows;
  const double* scale;

  // the row that row `at` of the call takes; -1: none
  __device__ __forceinline__ int64_t row_of(int64_t at) const {
    const int64_t row = rows[at];
    return row < num_rows ? row : -1;
  }
};

struct ResidualSums {
  double mass, overlap, teacher;  // sums of r, of min(p, q), and of p
};

struct ResidualParameters {
  CutLaw teacher, student;
  int64_t num_rows;
  int vocab_size, num_tiles;
  bool draws;
  const double* uniforms;
  ResidualSums* tiles;  // [num_rows, num_tiles]
  double* mass;
  double* overlap;
  int32_t* tokens;
  double* student_logprobs;
  double* teacher_logprobs;
};

// A row of one side, its law, and the factor of that.
template <bool kGeneral>
struct LawRow {
  __device__ __forceinline__ LawRow(const CutLaw& law, int64_t row, int64_t at)
      : logits(law.side, row),
        lse(law.lse[row]),
        shift(lse),
        floor(law.floor[row]),
        factor(static_cast<float>(law.scale[at])) {}

  __device__ __forceinline__ bool is_law() const {
    return fabs(lse) < std::numeric_limits<double>::infinity();
  }
  __device__ __forceinline__ float probability(float z) const {
    return z >= floor ? exp((z - shift.high) - shift.low) : 0.0f;
  }
  __device__ __forceinline__ double logprob(int id) const {
    if (!is_law()) return kNaN;
    const float z = logit_at(logits, id);
    const double below = -std::numeric_limits<double>::infinity();
    return z >= floor ? static_cast<double>(z) - lse : below;
  }

  SideRow<kGeneral> logits;
  double lse;
  Shift<float> shift;
  float floor, factor;
};

// The pair behind row `at` of the call.
template <bool kGeneral>
struct Pair {
  __device__ __forceinline__ Pair(const ResidualParameters& p, int64_t teacher_row, int64_t at)
      : student_row(p.student.row_of(at)),
        teacher(p.teacher, teacher_row, at),
        student(p.student, student_row < 0 ? 0 : student_row, at),
        has_student(student_row >= 0 && p.student.scale[at] != 0.0) {}

  __device__ __forceinline__ bool is_law() const {
    return teacher.is_law() && (!has_student || student.is_law());
  }

  // r of this lane's entries of kCount vectors; fn(k, i, r, p, q) of each.
  template <int kCount, class Fn>
  __device__ __forceinline__ void for_each(int vocab_size, int tile, int first, Fn&& fn) const {
    float z[kCount][kVector], other[kCount][kVector];
    load_tile(teacher.logits, vocab_size, tile, first, z);
    if (has_student) load_tile(student.logits, vocab_size, tile, first, other);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float p = teacher.probability(z[k][i]);
        const float q = has_student ? student.probability(other[k][i]) : 0.0f;
        const float r = teacher.factor * p - student.factor * q;
        fn(k, i, r > 0.0f ? r : 0.0f, p, q);
      }
    }
  }

  int64_t student_row;
  LawRow<kGeneral> teacher, student;
  bool has_student;
};

constexpr int kAtOnce = kTileVectors / 2;  // vectors of a side; two sides would fill the registers

template <bool kGeneral>
__global__ void __launch_bounds__(kThreads, 4) speculative_verify_pair_tiles(ResidualParameters p) {
  const int64_t index = index_of_warp<kWarps>();
  const int64_t at = index / p.num_tiles;
  if (at >= p.num_rows) return;
  const int tile = static_cast<int>(index - at * p.num_tiles);
  const int64_t teacher_row = p.teacher.row_of(at);
  if (teacher_row < 0) return;
  const Pair<kGeneral> pair(p, teacher_row, at);
  if (!pair.is_law()) return;
  ResidualSums sums{};
#pragma unroll 1
  for (int first = 0; first < kTileVectors; first += kAtOnce) {
    float mass = 0.0f, overlap = 0.0f, teacher = 0.0f;
    pair.template for_each<kAtOnce>(p.vocab_size, tile, first,
                                    [&](int, int, float r, float of_p, float of_q) {
                                      mass += r;
                                      overlap += of_p < of_q ? of_p : of_q;
                                      teacher += of_p;
                                    });
    sums.mass += static_cast<double>(mass);
    sums.overlap += static_cast<double>(overlap);
    sums.teacher += static_cast<double>(teacher);
  }
  sums.mass = reduce_warp(sums.mass, Sum());
  sums.overlap = reduce_warp(sums.overlap, Sum());
  sums.teacher = reduce_warp(sums.teacher, Sum());
  if (threadIdx.x % kWarp == 0) p.tiles[index] = sums;
}

// fn(tile, its sum, the sum up to its end) for each tile, kWarp of them at a time, a lane each; the
// sum of all. Every lane calls fn, also for a tile beyond the last, of sum 0.
template <class Fn>
__device__ __forceinline__ double scan_tiles(const ResidualSums* tiles, int num_tiles,
                                             double ResidualSums::*which, Fn&& fn) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  double carry = 0.0;
  for (int first = 0; first < num_tiles; first += kWarp) {
    const int tile = first + lane;
    const double sum = tile < num_tiles ? tiles[tile].*which : 0.0;
    const double end = carry + sum_to_lane(sum);
    fn(tile, sum, end);
    carry = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return carry;
}

struct Place {
  int tile;
  double before, place;  // the sum before the tile, and the sum that is to be exceeded
};

// The tile in which the sum exceeds uniform * all. By rounding it may not: then the last that has
// any. Rounding may also let a sum fall from one end to the next, hence no tile without any.
__device__ __forceinline__ Place find_tile(const ResidualSums* tiles, int num_tiles,
                                           double ResidualSums::*which, double uniform) {
  int last = -1;
  const double all = scan_tiles(tiles, num_tiles, which, [&](int tile, double sum, double) {
    last = sum > 0.0 ? tile : last;
  });
  last = __reduce_max_sync(kAllLanes, last);
  Place found{kNoColumn, 0.0, uniform * all};
  scan_tiles(tiles, num_tiles, which, [&](int tile, double sum, double end) {
    if (found.tile != kNoColumn) return;
    const bool is_here = sum > 0.0 && (end > found.place || tile == last);
    const int here = __reduce_min_sync(kAllLanes, is_here ? tile : kNoColumn);
    if (here == kNoColumn) return;
    found.tile = here;
    found.before = __shfl_sync(kAllLanes, end - sum, here % kWarp);
  });
  return found;
}

// The first column of a tile at which the sum of r exceeds the place, or the last that has any.
template <bool kGeneral>
__device__ __forceinline__ int find_column(const Pair<kGeneral>& pair, int vocab_size,
                                           const Place& found) {
  float r[kTileVectors][kVector];
  int last = -1;
  pair.template for_each<kTileVectors>(
      vocab_size, found.tile, 0, [&](int k, int i, float value, float, float) {
        r[k][i] = value;
        last = value > 0.0f ? column_of(found.tile, k) + i : last;
      });
  last = __reduce_max_sync(kAllLanes, last);
  int first = kNoColumn;
  double before = found.before;
#pragma unroll
  for (int k = 0; k < kTileVectors; ++k) {
    double own = 0.0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) own += static_cast<double>(r[k][i]);
    const double end = before + sum_to_lane(own);
    double upto = end - own;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      upto += static_cast<double>(r[k][i]);
      const int column = column_of(found.tile, k) + i;
      const bool is_here = r[k][i] > 0.0f && (upto > found.place || column == last);
      first = is_here && column < first ? column : first;
    }
    before = __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return __reduce_min_sync(kAllLanes, first);
}

struct Drawn {
  double mass = kNaN, overlap = kNaN, student_logprob = kNaN, teacher_logprob = kNaN;
  int token = -1;
};

template <bool kGeneral>
__device__ __forceinline__ Drawn draw(const ResidualParameters& p, int64_t at, Pair<kGeneral> pair) {
  Drawn out;
  if (!pair.is_law()) return out;
  const ResidualSums* const tiles = p.tiles + at * p.num_tiles;
  const auto none = [](int, double, double) {};
  out.mass = scan_tiles(tiles, p.num_tiles, &ResidualSums::mass, none);
  if (pair.has_student) out.overlap = scan_tiles(tiles, p.num_tiles, &ResidualSums::overlap, none);
  if (!p.draws || out.mass != out.mass) return out;
  double ResidualSums::*which = &ResidualSums::mass;
  if (out.mass == 0.0) {
    which = &ResidualSums::teacher;
    pair.has_student = false;
    pair.teacher.factor = 1.0f;
  }
  const Place found = find_tile(tiles, p.num_tiles, which, p.uniforms[at]);
  if (found.tile == kNoColumn) return out;  // of an lse that is not the row's
  out.token = find_column(pair, p.vocab_size, found);
  out.teacher_logprob = pair.teacher.logprob(out.token);
  if (pair.student_row >= 0) out.student_logprob = pair.student.logprob(out.token);
  return out;
}

// A warp per row.
template <bool kGeneral>
__global__ void __launch_bounds__(kThreads) speculative_verify_draw(ResidualParameters p) {
  const int64_t at = index_of_warp<kWarps>();
  if (at >= p.num_rows) return;
  const int64_t teacher_row = p.teacher.row_of(at);
  Drawn out;
  if (teacher_row >= 0) out = draw(p, at, Pair<kGeneral>(p, teacher_row, at));
  if (threadIdx.x % kWarp != 0) return;
  p.mass[at] = out.mass;
  p.overlap[at] = out.overlap;
  p.tokens[at] = out.token;
  p.student_logprobs[at] = out.student_logprob;
  p.teacher_logprobs[at] = out.teacher_logprob;
}

// ---- launches ----

bool is_general(const Side& side) {
  return side.bias || side.scale != 1.0f || side.softcap != 0.0f;
}

void check_real(const opd_logits_t& logits) {
  if (logits.matrix.dtype != OPD_FLOAT64) return;
  throw Error(OPD_UNSUPPORTED,
              concat(speculative_verify::kOp, ": logits must be float32, bfloat16 or float16 on a ",
                     "GPU, got float64. Convert it, or call the CPU's entry point."));
}

void rows(const opd_speculative_verify_rows_args_t& args, void* stream) {
  check_real(args.logits);
  static_assert(sizeof(TileSums) <= 32 && sizeof(ResidualSums) <= 32 && kTileColumns == 1024,
                "what csrc/core/speculative_verify_workspace.cpp says");
  const bool has_top_k = args.top_k > 0 && args.top_k < args.vocab_size;
  const RowsParameters p{side_of(args.logits),
                         args.num_rows,
                         static_cast<int>(args.vocab_size),
                         tiles_of(args.vocab_size),
                         args.token_ids,
                         has_top_k ? static_cast<int>(args.top_k) : 0,
                         args.top_p,
                         static_cast<TileSums*>(args.workspace),
                         args.lse,
                         static_cast<float*>(args.floor),
                         args.logprobs,
                         args.ranks,
                         args.argmax,
                         static_cast<float*>(args.largest)};
  const auto launch_both = [&](auto* tiles, auto* close, auto* cut) {
    launch({blocks_of_warps<kWarps>(p.num_rows * p.num_tiles), kThreads}, stream, tiles, p);
    if (has_top_k || p.top_p < 1.0) {
      launch({p.num_rows, kCutThreads, Cut<true>::kSharedBytes}, stream, cut, p);
    } else {
      launch({blocks_of_warps<kWarps>(p.num_rows), kThreads}, stream, close, p);
    }
  };
  if (is_general(p.side)) {
    launch_both(&speculative_verify_row_tiles<true>, &speculative_verify_close<true>,
                &speculative_verify_cut<true>);
  } else {
    launch_both(&speculative_verify_row_tiles<false>, &speculative_verify_close<false>,
                &speculative_verify_cut<false>);
  }
}

CutLaw cut_law(const opd_cut_law_t& law) {
  return {side_of(law.logits), law.num_rows, law.lse, static_cast<const float*>(law.floor),
          law.rows,            law.scale};
}

void residual(const opd_speculative_verify_residual_args_t& args, void* stream) {
  check_real(args.teacher.logits);
  const bool has_student = args.student.logits.matrix.data != nullptr;
  if (has_student) check_real(args.student.logits);
  ResidualParameters p{cut_law(args.teacher),
                       cut_law(args.student),
                       args.num_rows,
                       static_cast<int>(args.vocab_size),
                       tiles_of(args.vocab_size),
                       args.draws != 0,
                       args.uniforms,
                       static_cast<ResidualSums*>(args.workspace),
                       args.mass,
                       args.overlap,
                       args.tokens,
                       args.student_logprobs,
                       args.teacher_logprobs};
  if (!has_student || p.student.num_rows == 0) {
    // a row that there is none of: the other side's stands in its place, unread
    const int64_t* const rows = p.student.rows;
    const double* const scale = p.student.scale;
    p.student = p.teacher;
    p.student.rows = rows, p.student.scale = scale, p.student.num_rows = 0;
  }
  const auto launch_both = [&](auto* tiles, auto* draw) {
    launch({blocks_of_warps<kWarps>(p.num_rows * p.num_tiles), kThreads}, stream, tiles, p);
    launch({blocks_of_warps<kWarps>(p.num_rows), kThreads}, stream, draw, p);
  };
  if (is_general(p.teacher.side) || (has_student && is_general(p.student.side))) {
    launch_both(&speculative_verify_pair_tiles<true>, &speculative_verify_draw<true>);
  } else {
    launch_both(&speculative_verify_pair_tiles<false>, &speculative_verify_draw<false>);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_speculative_verify_rows_cuda(const opd_speculative_verify_rows_args_t* args,
                                              void* stream) {
  return opd::guarded([&] {
    opd::speculative_verify::check_args(args);
    if (args->num_rows == 0) return;
    opd::cuda::rows(*args, stream);
  });
}

opd_status_t opd_speculative_verify_residual_cuda(
    const opd_speculative_verify_residual_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::speculative_verify::check_args(args);
    if (args->num_rows == 0) return;
    opd::cuda::residual(*args, stream);
  });
}
