// SPDX-License-Identifier: Apache-2.0
// Draws from a row's law by its inverse distribution function, in two launches. The first reads every
// logit once: a warp sums up a tile of 512 columns relative to the tile's own largest logit, and as
// many blocks share a row as it takes to fill the GPU. The second has a block per row: it brings the
// tiles to the row's largest logit, adds them up in float64, sorts the draws by their places in that
// sum, and reads again the tiles that are drawn from.
//
// A row's results depend neither on how many blocks have shared it nor on the order of threads: a
// tile's sums are a warp's. No two sums of which one must not be below the other are added up in
// different orders: those of tiles are made of the same parts (sum_up), those inside a tile are
// integers, in units of 2^-53 of its largest term. A draw therefore always falls on a token of its
// tile that has mass, and places that ascend draw ids that do.
//
// What to expect of an H200 (a prediction, nobody has measured it): the first launch takes about 7
// issue slots for an entry of the law, 3 more where the proposal is another, and 1.5 to 2.5 for its
// share of a tile's reductions, of the 14.7 that 4.0 TB/s leave per bfloat16 entry and the 29 per
// float32 one. With a proposal of its own a bfloat16 row is limited by its two exponentials instead,
// at 90% of that speed. The second launch reads at most a tile per draw: a sixth of a float32 row of
// 151,936 at 50 draws that are far apart, next to nothing where a few tokens have the mass.
#include <limits>

#include "bits.cuh"
#include "logits_row.cuh"
#include "reduce.cuh"
#include "sample_tokens_check.h"
#include "sort.cuh"

namespace opd {
namespace cuda {
namespace {

using sample_tokens::kTileColumns;
using sample_tokens::TileSums;

constexpr int kSumThreads = 256, kSumBlocks = 4;  // blocks on a multiprocessor
constexpr int kDrawThreads = 128, kDrawBlocks = 5;
constexpr int kSumWarps = kSumThreads / kWarp, kDrawWarps = kDrawThreads / kWarp;
constexpr double kNone = -std::numeric_limits<double>::infinity();

struct Parameters {
  Side side;
  int64_t vocab_size;
  const double* uniforms;
  int num_draws;
  float factor;  // 1 / proposal_temperature
  int32_t* ids;
  float* weights;
  float* logprobs;
  double* lse;
  TileSums* tiles;
  int num_tiles;  // of a row
  int parts;      // blocks that share a row in the first launch
};

// A row in tiles that begin at addresses of 16 bytes: the first may begin before the row does. A lane
// has a piece of 16 bytes in each of kReads reads.
template <class Storage>
struct TiledRow {
  static constexpr int kPer = kPerLoad<Storage>;
  static constexpr int kReads = kTileColumns / (kWarp * kPer);

  const Storage* logits;
  RowLaw law;
  int64_t vocab_size;
  int past;  // columns of the first tile before the row

  __device__ __forceinline__ TiledRow(const Parameters& p, int64_t row)
      : logits(row_of<Storage>(p.side, row)), law(p.side, row), vocab_size(p.vocab_size) {
    past = static_cast<int>((reinterpret_cast<uintptr_t>(logits) & 15) / sizeof(Storage));
  }
  // Where a lane's piece begins in a tile.
  __device__ __forceinline__ static int place(int read) {
    return (read * kWarp + static_cast<int>(threadIdx.x % kWarp)) * kPer;
  }
  __device__ __forceinline__ int64_t column(int tile, int read) const {
    return static_cast<int64_t>(tile) * kTileColumns + place(read) - past;
  }
  __device__ __forceinline__ bool is_whole(int64_t column) const {
    return column >= 0 && column + kPer <= vocab_size;
  }
  // Pieces that are not wholly the row's are not read; their bits stay as they are.
  __device__ __forceinline__ void load(int tile, uint4 (&bits)[kReads]) const {
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      const int64_t first = column(tile, read);
      if (is_whole(first)) bits[read] = load_bits(logits + first);
    }
  }
  // The logits of the law; -inf where there is no column.
  __device__ __forceinline__ void widen(uint4 bits, int64_t first, float (&values)[kPer]) const {
    if (is_whole(first)) {
      values_of<Storage>(bits, values);
      law.apply(first, values);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      float value[1] = {kMinusInfinity};
      if (first + i >= 0 && first + i < vocab_size) {
        value[0] = to_real(logits[first + i]);
        law.apply(first + i, value);
      }
      values[i] = value[0];
    }
  }
};

template <class Storage>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks) sample_tokens_sums(Parameters p) {
  using Row = TiledRow<Storage>;
  const int64_t row = blockIdx.x / p.parts;
  const int part = static_cast<int>(blockIdx.x % p.parts);
  const Row logits(p, row);
  const int stride = kSumWarps * p.parts;
  const bool is_law = p.factor == 1.0f;
  const float factor = p.factor * kLog2E;
  int tile = part * kSumWarps + static_cast<int>(threadIdx.x / kWarp);
  uint4 bits[Row::kReads] = {};
  if (tile < p.num_tiles) logits.load(tile, bits);
  for (; tile < p.num_tiles; tile += stride) {
    float values[Row::kReads][Row::kPer];
    float largest = kMinusInfinity;  // fmaxf passes over a NaN, which shows in the sums
#pragma unroll
    for (int read = 0; read < Row::kReads; ++read) {
      logits.widen(bits[read], logits.column(tile, read), values[read]);
#pragma unroll
      for (int i = 0; i < Row::kPer; ++i) largest = fmaxf(largest, values[read][i]);
    }
    if (tile + stride < p.num_tiles) logits.load(tile + stride, bits);
    largest = reduce_warp(largest, Max());
    // -inf - -inf would be NaN
    const float reference = largest == kMinusInfinity ? 0.0f : largest;
    float of_law = 0.0f, of_proposal = 0.0f;
#pragma unroll
    for (int read = 0; read < Row::kReads; ++read) {
#pragma unroll
      for (int i = 0; i < Row::kPer; ++i) {
        const float x = values[read][i] - reference;
        of_law += detail::exp2_device(x * kLog2E);
        if (!is_law) of_proposal += detail::exp2_device(x * factor);
      }
    }
    TileSums sums;
    sums.largest = static_cast<double>(largest);
    sums.law = reduce_warp(static_cast<double>(of_law), Sum());
    sums.proposal = is_law ? sums.law : reduce_warp(static_cast<double>(of_proposal), Sum());
    if (threadIdx.x % kWarp == 0) p.tiles[row * p.num_tiles + tile] = sums;
  }
}

// Shared memory of the second launch: doubles to reduce with, a tile's sums for each warp, places.
constexpr int kScratchBytes = kWarp * sizeof(double);
constexpr int kPlacesAt = kScratchBytes + kDrawWarps * kTileColumns * sizeof(uint64_t);

// A row's sums relative to its largest logit.
struct RowSums {
  double largest, law, proposal;
};

// The sums of the tiles' proposals become those up to each tile's end. They never decrease: a lane
// adds to where the lane before it has ended, and every sum of doubles grows with its summands.
__device__ __forceinline__ void sum_up(TileSums* tiles, int num_tiles, double* totals) {
  if (threadIdx.x >= kWarp) return;
  const int lane = static_cast<int>(threadIdx.x);
  const int each = (num_tiles + kWarp - 1) / kWarp;
  const int begin = lane * each;
  const int end = begin + each < num_tiles ? begin + each : num_tiles;
  double total = 0.0;
  for (int tile = begin; tile < end; ++tile) total += tiles[tile].proposal;
  totals[lane] = total;
  __syncwarp();
  double before = 0.0;
  for (int other = 0; other < lane; ++other) before += totals[other];
  double sum = 0.0;
  for (int tile = begin; tile < end; ++tile) {
    sum += tiles[tile].proposal;
    tiles[tile].proposal = before + sum;
  }
}

// Brings the tiles to the row's largest logit. Ends with a barrier.
__device__ __forceinline__ RowSums close_tiles(TileSums* tiles, int num_tiles, float factor,
                                               double* scratch) {
  double largest = kNone;
  for (int tile = threadIdx.x; tile < num_tiles; tile += kDrawThreads) {
    largest = fmax(largest, tiles[tile].largest);
  }
  largest = reduce_block(largest, scratch, kNone, Max());
  double law = 0.0;
  for (int tile = threadIdx.x; tile < num_tiles; tile += kDrawThreads) {
    const TileSums own = tiles[tile];
    // a tile of nothing but -inf has sums of 0, or NaN if it has seen one
    const double x = own.largest == kNone ? 0.0 : own.largest - largest;
    law += own.law * ::exp(x);
    tiles[tile].proposal = own.proposal * ::exp(static_cast<double>(factor) * x);
  }
  law = reduce_block(law, scratch, 0.0, Sum());
  sum_up(tiles, num_tiles, scratch);
  __syncthreads();
  const double proposal = tiles[num_tiles - 1].proposal;
  // the same number, so that the weights are exactly the shares
  return {largest, factor == 1.0f ? proposal : law, proposal};
}

// The first tile up to whose end the sum exceeds a place; the place is below the sum of all.
__device__ __forceinline__ int tile_of(const TileSums* tiles, int num_tiles, double place) {
  int low = 0, high = num_tiles - 1;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (tiles[middle].proposal > place) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// A tile's terms as a warp draws from them: sums[i] is that of the first i + 1.
struct OpenTile {
  uint64_t* sums;
  uint64_t total = 0;
  double before = 0.0, mass = 0.0;  // in the row's sum
  int tile = -1;

  template <class Row>
  __device__ __forceinline__ void open(int other, const Row& row, const TileSums* tiles,
                                       float factor) {
    constexpr float kUnit = 9007199254740992.0f;  // 2^53: those of a tile are at most 2^62
    tile = other;
    before = tile == 0 ? 0.0 : tiles[tile - 1].proposal;
    mass = tiles[tile].proposal - before;
    const float largest = static_cast<float>(tiles[tile].largest);
    uint4 bits[Row::kReads] = {};
    row.load(tile, bits);
    __syncwarp();  // nobody looks at the tile before any more
    total = 0;
#pragma unroll
    for (int read = 0; read < Row::kReads; ++read) {
      float values[Row::kPer];
      row.widen(bits[read], row.column(tile, read), values);
      uint64_t* const at = sums + Row::place(read);
      uint64_t upto = 0;
#pragma unroll
      for (int i = 0; i < Row::kPer; ++i) {
        const float term = detail::exp2_device((values[i] - largest) * (factor * kLog2E));
        upto += static_cast<uint64_t>(term * kUnit);
        at[i] = upto;
      }
      const uint64_t own = upto;
      upto = sum_to_lane(upto);
#pragma unroll
      for (int i = 0; i < Row::kPer; ++i) at[i] += total + upto - own;
      total += __shfl_sync(kAllLanes, upto, kWarp - 1);
    }
    __syncwarp();
  }

  // Where in the tile a place of the row's sum lies. It is before the tile's end, so that the quotient
  // is at most 1 - 2^-53, and the product rounds to less than the total.
  __device__ __forceinline__ int find(double place) const {
    const uint64_t own =
        static_cast<uint64_t>((place - before) / mass * static_cast<double>(total));
    int low = 0, high = kTileColumns - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (sums[middle] > own) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

// Each place, in ascending order, becomes the column that it draws. A warp has neighbours, whose
// tiles it opens one after another.
template <class Storage>
__device__ __forceinline__ void draw(const Parameters& p, const TiledRow<Storage>& row,
                                     const TileSums* tiles, uint64_t* sums, double* places) {
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const int each = (p.num_draws + kDrawWarps - 1) / kDrawWarps;
  const int end = (warp + 1) * each < p.num_draws ? (warp + 1) * each : p.num_draws;
  OpenTile open{sums + warp * kTileColumns};
  for (int first = warp * each; first < end; first += kWarp) {
    const bool is_mine = first + lane < end;
    const double place = is_mine ? places[first + lane] : 0.0;
    const int tile = is_mine ? tile_of(tiles, p.num_tiles, place) : -1;
    unsigned left = __ballot_sync(kAllLanes, is_mine);
    while (left != 0) {
      const int next = __shfl_sync(kAllLanes, tile, lowest_bit(left));
      if (next != open.tile) open.open(next, row, tiles, p.factor);
      const bool is_here = tile == next;
      if (is_here) {
        places[first + lane] = static_cast<double>(
            static_cast<int64_t>(next) * kTileColumns - row.past + open.find(place));
      }
      left &= ~__ballot_sync(kAllLanes, is_here);
    }
  }
}

// How many of the sorted draws are equal to the one at `first`, the first of them.
__device__ __forceinline__ int count_from(const double* draws, int num_draws, int first) {
  int low = first + 1, high = num_draws;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (draws[middle] > draws[first]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low - first;
}

__device__ __forceinline__ void store_none(const Parameters& p, int64_t at, bool has_law) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  p.ids[at] = -1;
  p.weights[at] = has_law ? 0.0f : kNaN;
  p.logprobs[at] = has_law ? kMinusInfinity : kNaN;
}

template <class Storage>
__global__ void __launch_bounds__(kDrawThreads, kDrawBlocks) sample_tokens_draw(Parameters p) {
  const int64_t row = blockIdx.x, first_draw = row * p.num_draws;
  double* const scratch = reinterpret_cast<double*>(shared_memory());
  uint64_t* const tile_sums = reinterpret_cast<uint64_t*>(shared_memory() + kScratchBytes);
  double* const places = reinterpret_cast<double*>(shared_memory() + kPlacesAt);
  TileSums* const tiles = p.tiles + row * p.num_tiles;
  const RowSums sums = close_tiles(tiles, p.num_tiles, p.factor, scratch);
  // of a +inf, too: its distance from itself is NaN
  const bool is_broken = sums.law != sums.law;
  const bool has_law = !is_broken && sums.largest != kNone;
  if (threadIdx.x == 0) p.lse[row] = is_broken ? sums.law : sums.largest + ::log(sums.law);
  if (!has_law) {
    for (int n = threadIdx.x; n < p.num_draws; n += kDrawThreads) {
      store_none(p, first_draw + n, false);
    }
    return;
  }

  unsigned count = 1;
  while (count < static_cast<unsigned>(p.num_draws)) count *= 2;
  // the largest number below the sum, which no uniform below 1 rounds to more than
  const double below = sums.proposal * (1.0 - std::numeric_limits<double>::epsilon() / 2);
  for (unsigned n = threadIdx.x; n < count; n += kDrawThreads) {
    double place = std::numeric_limits<double>::infinity();
    if (n < static_cast<unsigned>(p.num_draws)) {
      // a uniform that is none draws, too, and a NaN is not above 0
      place = p.uniforms[first_draw + n] * sums.proposal;
      place = place > 0.0 ? (place < below ? place : below) : 0.0;
    }
    places[n] = place;
  }
  sort_block(places, count, kDrawThreads, Smaller());
  const TiledRow<Storage> logits(p, row);
  draw(p, logits, tiles, tile_sums, places);
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x % kWarp);
  const int warp = static_cast<int>(threadIdx.x / kWarp);
  const double log_law = ::log(sums.law), log_proposal = ::log(sums.proposal);
  const double lse = sums.largest + log_law;
  int* const counts = reinterpret_cast<int*>(scratch);
  int found = 0;  // tokens before these draws
  for (int begin = 0; begin < p.num_draws; begin += kDrawThreads) {
    const int n = begin + static_cast<int>(threadIdx.x);
    const bool is_first = n < p.num_draws && (n == 0 || places[n] != places[n - 1]);
    const unsigned votes = __ballot_sync(kAllLanes, is_first);
    if (lane == 0) counts[warp] = count_bits(votes);
    __syncthreads();
    int64_t at = first_draw + found + count_bits(votes & ((1u << lane) - 1));
#pragma unroll
    for (int other = 0; other < kDrawWarps; ++other) {
      if (other < warp) at += counts[other];
      found += counts[other];
    }
    __syncthreads();
    if (!is_first) continue;
    const int32_t id = static_cast<int32_t>(places[n]);
    float value[1] = {to_real(logits.logits[id])};
    logits.law.apply(id, value);
    const double x = static_cast<double>(value[0]) - sums.largest;
    const double of_proposal = x * static_cast<double>(p.factor) - log_proposal;
    const double share = static_cast<double>(count_from(places, p.num_draws, n)) /
                         static_cast<double>(p.num_draws);
    p.ids[at] = id;
    p.weights[at] = static_cast<float>(share * ::exp((x - log_law) - of_proposal));
    p.logprobs[at] = static_cast<float>(static_cast<double>(value[0]) - lse);
  }
  for (int n = found + static_cast<int>(threadIdx.x); n < p.num_draws; n += kDrawThreads) {
    store_none(p, first_draw + n, true);
  }
}

// As many blocks to a row as make several for every place that the GPU has, so that the last of them
// leave little of it idle.
int parts_of(int64_t num_tokens, int num_tiles) {
  constexpr int kRounds = 4;
  const int64_t wanted = int64_t{kRounds} * kSumBlocks * current_device().multiprocessors;
  const int64_t parts = (wanted + num_tokens - 1) / num_tokens;
  const int64_t most = (num_tiles + kSumWarps - 1) / kSumWarps;
  return static_cast<int>(parts < most ? parts : most);
}

void forward(const opd_sample_tokens_args_t& args, void* stream) {
  const int num_tiles = static_cast<int>(sample_tokens::num_tiles(args.vocab_size));
  const int num_draws = static_cast<int>(args.num_draws);
  const Parameters parameters{side_of(args.logits),
                              args.vocab_size,
                              args.uniforms,
                              num_draws,
                              static_cast<float>(1.0 / args.proposal_temperature),
                              args.ids,
                              static_cast<float*>(args.weights),
                              static_cast<float*>(args.logprobs),
                              args.lse,
                              static_cast<TileSums*>(args.workspace),
                              num_tiles,
                              parts_of(args.num_tokens, num_tiles)};
  int64_t places = 1;
  while (places < num_draws) places *= 2;
  const Shape sums{args.num_tokens * parameters.parts, kSumThreads};
  const Shape draws{args.num_tokens, kDrawThreads,
                    kPlacesAt + places * static_cast<int64_t>(sizeof(double))};
  visit_storage(sample_tokens::kOp, "logits", args.logits.matrix.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    launch(sums, stream, &sample_tokens_sums<Storage>, parameters);
    launch(draws, stream, &sample_tokens_draw<Storage>, parameters);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_sample_tokens_fwd_cuda(const opd_sample_tokens_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::sample_tokens::check_args(args);
    if (args->num_tokens == 0) return;
    opd::cuda::forward(*args, stream);
  });
}
