// SPDX-License-Identifier: Apache-2.0
// The num_topk largest entries of a row, the log-sum-exp and entropy of the whole and the mass of the
// rest: one block per row, which is read once. An entry above the threshold, below which num_topk
// better ones are known, waits as a key in shared memory; any other goes into the sums of the tail at
// once. When many wait they are cut to the best, which raises the threshold, and what is cut joins
// the tail. The tail is thus a sum of its own terms, relative to its own largest, as on a CPU.
//
// No bit depends on the order of the threads: the threshold changes only where the whole block
// waits, so each thread's sums have terms and an order that follow from the row; the keys that wait
// are a set; and the sums of those that are cut are sums of integers.
//
// The first threshold comes from the row's first kSampleTiles tiles: each thread takes the largest of
// its entries in each tile, and num_topk of these largest ones are as many entries. It is never too
// high, whatever the row. Those tiles, 32 KiB, are read again, from the cache. Beyond kMostSampled
// wanted entries there is no sample: whole tiles wait until the first cut, and more are cut later.
//
// What to expect of an H200 (a prediction from the machine code, nobody has measured it): 4096 rows
// of 151,936 at 4.0 TB/s leave a multiprocessor 14.7 issue slots per bfloat16 entry, 29 per float32
// one. An entry of the tail costs 8 (conversion, maximum, subtraction, product, ex2, two sums), a
// piece of 16 bytes and its share of the loop about 30 more: 11.6 slots per bfloat16 entry, 16 per
// float32 one. Waiting entries, two or three cuts and the end of a row add 10 to 15% with num_topk =
// 64. float32, which is what a fused op has, should run at the speed of memory, bfloat16 at 80 to
// 95% of it; with num_topk in the thousands both two or three times longer. A row with -inf entries
// costs up to twice as much arithmetic, a row that ascends a cut per tile. Few rows (less than
// kBlocks per multiprocessor) leave the machine idle: blocks never share a row.
#include <limits>

#include "logits_row.cuh"
#include "sort.cuh"
#include "topk_logprobs_check.h"
#include "topk_select.cuh"

namespace opd {
namespace cuda {
namespace {

constexpr int kThreads = 256, kBlocks = 4;  // blocks on a multiprocessor
// 16-byte reads that a thread has in flight, which make a tile
constexpr int kReads = 2;
constexpr int kSampleTiles = 4;
constexpr int kMostSampled = kThreads * kSampleTiles / 2;
constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Parameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  int64_t num_ids;
  int num_topk;
  unsigned wait;  // keys; more are cut
  int32_t* ids;
  float* logprobs;
  double* lse;
  float* tail_logprob;
  float* entropy;
  float* token_logprobs;
};

// Shared memory: doubles to reduce with, words to count with, the number of keys, the keys.
constexpr int kScratchBytes = kWarp * sizeof(double);
constexpr int kCountsBytes = 2 * (kThreads / kWarp) * sizeof(unsigned);
constexpr int kKeysAt = kScratchBytes + kCountsBytes + 16;

// What may wait before a look at how many do, beside `wait`: a tile and both ends of a row.
template <class Storage>
constexpr int kUnseen = (kThreads * kReads + 2) * kPerLoad<Storage>;

constexpr unsigned wait_of(int num_topk) { return num_topk + (num_topk < 128 ? 128 : num_topk); }

// max(a, b), of a NaN NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}

// sum_v e^x_v and sum_v x_v e^x_v, x_v = z_v - reference. The reference follows the largest z at a
// distance, so that few additions have to scale what is there.
struct Tail {
  static constexpr float kAhead = 5.0f;
  float reference = kLowest, sum = 0.0f, moment = 0.0f;

  // A value that adds nothing; -inf only where the reference has no better: it would take moment_of.
  __device__ __forceinline__ float nothing() const {
    return reference - (200.0f + 0.5f * fabsf(reference));
  }

  // `most` is the largest value, NaN aside.
  template <int N>
  __device__ __forceinline__ void add(const float (&values)[N], float most) {
    if (most > reference + kAhead) move_to(most);
    float x = values[0] - reference;
    float e = detail::exp2_device(x * kLog2E);
    float more = e, more_moment = e * x;
#pragma unroll
    for (int i = 1; i < N; ++i) {
      x = values[i] - reference;
      e = detail::exp2_device(x * kLog2E);
      more += e;
      more_moment += e * x;
    }
    // of a -inf, which few rows have; a test of each entry would cost as much as its sum
    if (more_moment != more_moment) more_moment = moment_of(values);
    sum += more;
    moment += more_moment;
  }

  template <int N>
  __device__ __forceinline__ float moment_of(const float (&values)[N]) const {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      // finite, so that 0 times it is 0
      const float x = max_or_nan(values[i] - reference, -1000.0f);
      total += detail::exp2_device(x * kLog2E) * x;
    }
    return total;
  }

  // The sums of others relative to `largest`, finite and the largest of them.
  __device__ __forceinline__ void merge(float largest, float more, float more_moment) {
    if (largest > reference) move_to(largest);
    const float x = max_or_nan(largest - reference, -1000.0f);
    const float e = detail::exp2_device(x * kLog2E);
    sum += e * more;
    moment += e * (more_moment + x * more);
  }

  __device__ __forceinline__ void move_to(float other) {
    const float x = max_or_nan(reference - other, -1000.0f);
    const float e = detail::exp2_device(x * kLog2E);
    moment = e * (moment + sum * x);
    sum *= e;
    reference = other;
  }
};

// The keys that wait, and what they are held against.
struct Waiting {
  double* scratch;
  unsigned* counts;
  unsigned* count;
  uint64_t* keys;
  unsigned wait;
  float threshold = kMinusInfinity;
  bool is_full = false;

  __device__ __forceinline__ explicit Waiting(unsigned wait) : wait(wait) {
    unsigned char* const memory = shared_memory();
    scratch = reinterpret_cast<double*>(memory);
    counts = reinterpret_cast<unsigned*>(memory + kScratchBytes);
    count = counts + kCountsBytes / sizeof(unsigned);
    keys = reinterpret_cast<uint64_t*>(memory + kKeysAt);
  }

  // Values of columns side by side: those above the threshold wait, the rest is the tail's.
  template <int N>
  __device__ __forceinline__ void take(int column, float (&values)[N], Tail& tail) {
    float most = largest_of(values);
    if (most > threshold) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (values[i] > threshold) {
          const unsigned at = atomicAdd(count, 1u);
          keys[at] = key_of(values[i], column + i);
          is_full |= at >= wait;
          values[i] = tail.nothing();
        }
      }
      most = largest_of(values);
    }
    tail.add(values, most);
  }

  template <int N>
  __device__ __forceinline__ static float largest_of(const float (&values)[N]) {
    float most = values[0];  // fmaxf passes over a NaN, which shows in the sums
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmaxf(most, values[i]);
    return most;
  }

  // Keeps the best, at least `wanted` and at most `most` of them, and the first thread's tail gets
  // the rest. After a barrier; more than `most` keys wait. How many it keeps.
  __device__ __forceinline__ unsigned cut(unsigned wanted, unsigned most, Tail& tail) {
    const unsigned before = *count;
    uint64_t lowest = ~uint64_t{0}, highest = 0;
    for (unsigned i = threadIdx.x; i < before; i += kThreads) {
      lowest = Min()(lowest, keys[i]);
      highest = Max()(highest, keys[i]);
    }
    uint64_t* const exchange = reinterpret_cast<uint64_t*>(scratch);
    lowest = reduce_block(lowest, exchange, ~uint64_t{0}, Min());
    highest = reduce_block(highest, exchange, uint64_t{0}, Max());
    const Bound bound = find_bound<kThreads>(
        lowest, highest, before, wanted, most, counts, [&](uint64_t key) {
          unsigned reach = 0;
          for (unsigned i = threadIdx.x; i < before; i += kThreads) reach += keys[i] >= key;
          return reach;
        });
    give_to(tail, before, bound.key);
    keep_from(before, bound.key);
    threshold = value_of(bound.key);
    is_full = false;
    return bound.count;
  }

 private:
  // The keys below `bound` as sums of integers, which have no order.
  __device__ __forceinline__ void give_to(Tail& tail, unsigned before, uint64_t bound) {
    constexpr float kUnit = 1099511627776.0f;  // 2^40; 2^16 keys overflow nothing
    uint64_t best = 0;
    for (unsigned i = threadIdx.x; i < before; i += kThreads) {
      if (keys[i] < bound) best = Max()(best, keys[i]);
    }
    uint64_t* const exchange = reinterpret_cast<uint64_t*>(scratch);
    const float largest = value_of(reduce_block(best, exchange, uint64_t{0}, Max()));
    uint64_t sum = 0, moment = 0;
    for (unsigned i = threadIdx.x; i < before; i += kThreads) {
      if (keys[i] >= bound) continue;
      const float x = max_or_nan(value_of(keys[i]) - largest, -1000.0f);
      const float e = detail::exp2_device(x * kLog2E);
      if (!(e <= 1.0f)) continue;  // of two infinities; the row has no law
      sum += static_cast<uint64_t>(e * kUnit);
      moment += static_cast<uint64_t>(e * -x * kUnit);
    }
    sum = reduce_block(sum, exchange, uint64_t{0}, Sum());
    moment = reduce_block(moment, exchange, uint64_t{0}, Sum());
    if (threadIdx.x != 0) return;
    tail.merge(largest, static_cast<float>(sum) / kUnit, -static_cast<float>(moment) / kUnit);
  }

  // The keys from `bound` on move to the front. Ends with a barrier.
  __device__ __forceinline__ void keep_from(unsigned before, uint64_t bound) {
    constexpr int kAtOnce = 4;
    if (threadIdx.x == 0) *count = 0;
    for (unsigned first = threadIdx.x; first < before + threadIdx.x;
         first += kAtOnce * kThreads) {
      uint64_t mine[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned at = first + i * kThreads;
        mine[i] = at < before ? keys[at] : 0;
      }
      // what is written over has been read: no more is kept than has been looked at
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (mine[i] >= bound) keys[atomicAdd(count, 1u)] = mine[i];
      }
    }
    __syncthreads();
  }
};

// The 16-byte pieces of a row in tiles of kReads per thread.
template <class Storage>
struct Tiles {
  const Storage* logits;
  int head, tail, pieces, count;  // columns before the first piece and after the last; pieces; tiles

  __device__ __forceinline__ Tiles(const Storage* logits, int64_t vocab_size) : logits(logits) {
    const Pieces<Storage> all(logits, vocab_size);
    constexpr int kPieces = kReads * kThreads;
    head = all.head, tail = all.tail, pieces = static_cast<int>(all.pieces);
    count = (pieces + kPieces - 1) / kPieces;
  }
  __device__ __forceinline__ int piece(int tile, int read) const {
    return (tile * kReads + read) * kThreads + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ bool has(int piece) const { return piece < pieces; }
  __device__ __forceinline__ int column(int piece) const {
    return head + piece * kPerLoad<Storage>;
  }
  // What lies beyond the row is not read; the bits stay as they are.
  __device__ __forceinline__ void load(int tile, uint4 (&bits)[kReads]) const {
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      const int at = piece(tile, read);
      if (has(at)) bits[read] = load_bits(logits + column(at));
    }
  }
};

// The order of a value that at least num_topk entries of the first tiles reach. Overwrites the keys.
template <class Storage>
__device__ __forceinline__ uint32_t sample(const Tiles<Storage>& tiles, const RowLaw& law,
                                           unsigned num_topk, const Waiting& waiting) {
  uint64_t* const largest = waiting.keys + threadIdx.x;
  uint64_t lowest = ~uint64_t{0}, highest = 0;
#pragma unroll 1
  for (int tile = 0; tile < kSampleTiles; ++tile) {
    uint4 bits[kReads];
    tiles.load(tile, bits);
    float most = kMinusInfinity;  // where there is no piece, or nothing but NaN
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      const int piece = tiles.piece(tile, read);
      if (!tiles.has(piece)) break;
      float values[kPerLoad<Storage>];
      values_of<Storage>(bits[read], values);
      law.apply(tiles.column(piece), values);
      most = fmaxf(most, Waiting::largest_of(values));
    }
    const uint64_t key = static_cast<uint64_t>(order_of(most)) << 32;
    largest[tile * kThreads] = key;
    lowest = Min()(lowest, key);
    highest = Max()(highest, key);
  }
  uint64_t* const exchange = reinterpret_cast<uint64_t*>(waiting.scratch);
  lowest = reduce_block(lowest, exchange, ~uint64_t{0}, Min());
  highest = reduce_block(highest, exchange, uint64_t{0}, Max());
  const Bound bound = find_bound<kThreads>(
      lowest, highest, kThreads * kSampleTiles, num_topk, num_topk + num_topk / 8,
      waiting.counts, [&](uint64_t key) {
        unsigned reach = 0;
#pragma unroll
        for (int tile = 0; tile < kSampleTiles; ++tile) reach += largest[tile * kThreads] >= key;
        return reach;
      });
  return static_cast<uint32_t>(bound.key >> 32);
}

template <class Storage>
__device__ __forceinline__ void read_row(const Parameters& p, int64_t row, const RowLaw& law,
                                         Waiting& waiting, Tail& tail) {
  const Storage* const logits = row_of<Storage>(p.side, row);
  const Tiles<Storage> tiles(logits, p.vocab_size);
  const unsigned num_topk = static_cast<unsigned>(p.num_topk);
  const auto take_one = [&](int64_t column) {
    float value[1] = {to_real(logits[column])};
    law.apply(column, value);
    waiting.take(static_cast<int>(column), value, tail);
  };
  if (threadIdx.x == 0) *waiting.count = 0;
  float sampled = kMinusInfinity;
  if (num_topk <= kMostSampled) {
    const uint32_t order = sample(tiles, law, num_topk, waiting);
    sampled = value_at(order);
    // while the sample itself is read again its num_topk entries must pass
    if (sampled > kMinusInfinity) waiting.threshold = value_below(order);
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  // in the order of the columns: an entry that equals the threshold loses to those that wait
  if (thread < tiles.head) take_one(thread);
  uint4 bits[kReads] = {};
  tiles.load(0, bits);
  for (int tile = 0; tile < tiles.count; ++tile) {
    float values[kReads][kPerLoad<Storage>];
#pragma unroll
    for (int read = 0; read < kReads; ++read) values_of<Storage>(bits[read], values[read]);
    tiles.load(tile + 1, bits);
#pragma unroll
    for (int read = 0; read < kReads; ++read) {
      const int piece = tiles.piece(tile, read);
      if (!tiles.has(piece)) break;
      const int column = tiles.column(piece);
      law.apply(column, values[read]);
      waiting.take(column, values[read], tail);
    }
    if (__syncthreads_or(waiting.is_full)) {
      waiting.cut(num_topk, num_topk + (num_topk < 64 ? 16 : num_topk / 4), tail);
    }
    if (tile + 1 == kSampleTiles) waiting.threshold = fmaxf(waiting.threshold, sampled);
  }
  if (thread < tiles.tail) take_one(p.vocab_size - tiles.tail + thread);
  __syncthreads();
}

// What all threads need of a row to write their part of it.
struct Closed {
  double lse;
  bool has_law;
};

// Of the whole row, from its best keys, in order, and the tails of the threads.
__device__ __forceinline__ Closed close_row(const Parameters& p, int64_t row, unsigned count,
                                            const Waiting& waiting, const Tail& tail) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  double* const scratch = waiting.scratch;
  const bool is_empty = tail.sum == 0.0f;
  const float of_tail = reduce_block(is_empty ? kMinusInfinity : tail.reference,
                                     reinterpret_cast<float*>(scratch), kMinusInfinity, Max());
  double tail_sum = 0.0, tail_moment = 0.0;
  if (!is_empty) {
    const double x = static_cast<double>(tail.reference) - static_cast<double>(of_tail);
    const double e = ::exp(x);
    tail_sum = e * static_cast<double>(tail.sum);
    tail_moment = e * (static_cast<double>(tail.moment) + x * static_cast<double>(tail.sum));
  }
  tail_sum = reduce_block(tail_sum, scratch, 0.0, Sum());
  tail_moment = reduce_block(tail_moment, scratch, 0.0, Sum());
  const double largest =
      count > 0 ? static_cast<double>(value_of(waiting.keys[0])) : static_cast<double>(kLowest);
  // beside the largest itself, whose term is 1
  double sum = 0.0, moment = 0.0;
  for (unsigned k = threadIdx.x; k < count; k += kThreads) {
    if (k == 0) continue;
    const double x = static_cast<double>(value_of(waiting.keys[k])) - largest;
    const double e = ::exp(x);
    sum += e;
    moment += e * x;
  }
  sum = reduce_block(sum, scratch, 0.0, Sum());
  moment = reduce_block(moment, scratch, 0.0, Sum());
  if (threadIdx.x == 0) {
    double lse = kNaN, entropy = kNaN, tail_logprob = kNaN;
    const bool is_nan = tail_sum != tail_sum || largest == kInfinity;
    if (!is_nan && count == 0) lse = -kInfinity;
    const bool has_law = !is_nan && count > 0;
    if (has_law) {
      const bool has_tail = tail_sum > 0.0;
      const double x = has_tail ? static_cast<double>(of_tail) - largest : 0.0;
      const double e = has_tail ? ::exp(x) : 0.0;
      sum += e * tail_sum;
      moment += e * (tail_moment + x * tail_sum);
      const double log_sum = ::log1p(sum);
      lse = largest + log_sum;
      entropy = log_sum - moment / (1.0 + sum);
      tail_logprob = has_tail ? x + ::log(tail_sum) - log_sum : -kInfinity;
    }
    p.lse[row] = lse;
    p.entropy[row] = static_cast<float>(entropy);
    p.tail_logprob[row] = static_cast<float>(tail_logprob);
    scratch[0] = lse;
    scratch[1] = has_law ? 1.0 : 0.0;
  }
  __syncthreads();
  return {scratch[0], scratch[1] != 0.0};
}

// kBent: a bias, a scale or a softcap may be there.
template <class Storage, bool kBent>
__global__ void __launch_bounds__(kThreads, kBlocks) topk_logprobs_forward(Parameters p) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const int64_t row = blockIdx.x;
  if (!kBent) p.side.bias = nullptr, p.side.scale = 1.0f, p.side.softcap = 0.0f;
  const RowLaw law(p.side, row);
  Waiting waiting(p.wait);
  Tail tail;
  read_row<Storage>(p, row, law, waiting, tail);
  const unsigned num_topk = static_cast<unsigned>(p.num_topk);
  unsigned count = *waiting.count;
  if (count > num_topk) count = waiting.cut(num_topk, num_topk, tail);
  unsigned places = 1;
  while (places < count) places *= 2;
  for (unsigned k = count + threadIdx.x; k < places; k += kThreads) waiting.keys[k] = 0;
  sort_block(waiting.keys, places, kThreads, Larger());
  const Closed closed = close_row(p, row, count, waiting, tail);

  int32_t* const ids = p.ids + row * p.num_topk;
  float* const logprobs = p.logprobs + row * p.num_topk;
  for (unsigned k = threadIdx.x; k < num_topk; k += kThreads) {
    int32_t id = -1;
    float logprob = closed.has_law ? kMinusInfinity : kNaN;
    if (closed.has_law && k < count) {
      const uint64_t key = waiting.keys[k];
      id = id_of(key);
      logprob = static_cast<float>(static_cast<double>(value_of(key)) - closed.lse);
    }
    ids[k] = id;
    logprobs[k] = logprob;
  }
  const Storage* const logits = row_of<Storage>(p.side, row);
  for (int64_t j = threadIdx.x; j < p.num_ids; j += kThreads) {
    const int64_t id = p.token_ids[row * p.num_ids + j];
    float logprob = closed.has_law && id < 0 ? kMinusInfinity : kNaN;
    if (closed.has_law && id >= 0 && id < p.vocab_size) {
      float value[1] = {to_real(logits[id])};
      law.apply(id, value);
      logprob = static_cast<float>(static_cast<double>(value[0]) - closed.lse);
    }
    p.token_logprobs[row * p.num_ids + j] = logprob;
  }
}

template <class Storage>
void forward_of(const opd_topk_logprobs_args_t& args, void* stream) {
  const int num_topk = static_cast<int>(args.num_topk);
  const Parameters parameters{side_of(args.logits),
                              args.vocab_size,
                              args.token_ids,
                              args.num_ids,
                              num_topk,
                              wait_of(num_topk),
                              args.ids,
                              static_cast<float*>(args.logprobs),
                              args.lse,
                              static_cast<float*>(args.tail_logprob),
                              static_cast<float*>(args.entropy),
                              static_cast<float*>(args.token_logprobs)};
  const int64_t keys = static_cast<int64_t>(parameters.wait) + kUnseen<Storage>;
  const int64_t bytes = kKeysAt + keys * static_cast<int64_t>(sizeof(uint64_t));
  const Side& side = parameters.side;
  const bool is_bent = side.bias || side.scale != 1.0f || side.softcap != 0.0f;
  launch({args.num_tokens, kThreads, bytes}, stream,
         is_bent ? &topk_logprobs_forward<Storage, true> : &topk_logprobs_forward<Storage, false>,
         parameters);
}

void forward(const opd_topk_logprobs_args_t& args, void* stream) {
  visit_storage(topk_logprobs::kOp, "logits", args.logits.matrix.dtype,
                [&](auto storage) { forward_of<decltype(storage)>(args, stream); });
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_topk_logprobs_fwd_cuda(const opd_topk_logprobs_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::topk_logprobs::check_args(args);
    if (args->num_tokens == 0) return;
    opd::cuda::forward(*args, stream);
  });
}
