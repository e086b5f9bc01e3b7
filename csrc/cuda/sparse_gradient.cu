// SPDX-License-Identifier: Apache-2.0
// Which columns of a gradient [T, V] some token needs, these columns packed side by side, what each
// row sums to in the others, and rows added where the columns belong. A NaN or an infinity is
// always needed: dropping it would hide it.
#include <limits>

#include "logits_row.cuh"
#include "reduce.cuh"
#include "sparse_gradient_check.h"

namespace opd {
namespace cuda {
namespace {

// columns of a 16-byte access
constexpr int kPer = kPerLoad<float>;

// -- mark: a block has kMarkColumns columns, its kMarkGroups groups of threads share the rows -----
constexpr int kMarkLanes = 64, kMarkGroups = 4, kMarkThreads = kMarkLanes * kMarkGroups;
constexpr int kMarkColumns = kMarkLanes * kPer;
// rows that a thread has in flight
constexpr int kMarkRows = 4;

struct MarkParameters {
  const float* grad_logits;
  int64_t row_stride, num_tokens, vocab_size;
  const float* token_weights;
  float tolerance;
  uint8_t* kept;
};

// from[0 .. kPer), the first `count` of them read
__device__ __forceinline__ void load_columns(const float* from, int count, float (&values)[kPer]) {
  if (count == kPer && is_aligned_16(from)) return load_16(from, values);
#pragma unroll
  for (int i = 0; i < kPer; ++i) values[i] = i < count ? from[i] : 0.0f;
}

__global__ void __launch_bounds__(kMarkThreads) sparse_gradient_mark(MarkParameters p) {
  const int lane = threadIdx.x % kMarkLanes, group = threadIdx.x / kMarkLanes;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kMarkColumns;
  const int64_t column = first_column + lane * kPer;
  const int64_t rest = p.vocab_size - column;
  const int count = rest >= kPer ? kPer : rest > 0 ? static_cast<int>(rest) : 0;
  unsigned needed = 0;  // one bit per column
  for (int64_t first = group; first < p.num_tokens; first += kMarkGroups * kMarkRows) {
    float values[kMarkRows][kPer], weights[kMarkRows];
#pragma unroll
    for (int k = 0; k < kMarkRows; ++k) {
      const int64_t row = first + k * kMarkGroups;
      const bool is_row = row < p.num_tokens;
      weights[k] = !is_row ? 0.0f : p.token_weights ? fabsf(p.token_weights[row]) : 1.0f;
      // a row of weight 0 is not read
      if (weights[k] == 0.0f) continue;
      load_columns(p.grad_logits + row * p.row_stride + column, count, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kMarkRows; ++k) {
      if (weights[k] == 0.0f) continue;
      // finite, so that an infinite weight does not drop infinities; a NaN stays one
      const float largest = std::numeric_limits<float>::max(), product = p.tolerance * weights[k];
      const float threshold = product > largest ? largest : product;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        // not `size > threshold`, which a NaN is not
        needed |= fabsf(values[k][i]) <= threshold ? 0u : 1u << i;
      }
    }
  }
  unsigned* const marks = reinterpret_cast<unsigned*>(shared_memory());
  marks[threadIdx.x] = needed;
  __syncthreads();
  for (int own = threadIdx.x; own < kMarkColumns && first_column + own < p.vocab_size;
       own += kMarkThreads) {
    unsigned any = 0;
    for (int g = 0; g < kMarkGroups; ++g) any |= marks[g * kMarkLanes + own / kPer];
    p.kept[first_column + own] = static_cast<uint8_t>(any >> (own % kPer) & 1u);
  }
}

// -- pack: a block per row ------------------------------------------------------------------------

constexpr int kPackThreads = 512;
// 16-byte reads that a thread has in flight
constexpr int kPackReads = 4;

struct PackParameters {
  const float* grad_logits;
  int64_t row_stride, vocab_size;
  const float* token_weights;
  const uint8_t* kept;
  const int64_t* columns;
  int64_t num_columns;
  float* packed;
  int64_t packed_row_stride;
  float* dropped;
};

// kept[0 .. kPer) as bytes of one word
__device__ __forceinline__ uint32_t load_kept(const uint8_t* kept, bool is_aligned) {
  if (is_aligned) {
    expect_aligned(kept, 4);
    return *reinterpret_cast<const uint32_t*>(kept);
  }
  return kept[0] | kept[1] << 8 | kept[2] << 16 | static_cast<uint32_t>(kept[3]) << 24;
}

__global__ void __launch_bounds__(kPackThreads, 2) sparse_gradient_pack(PackParameters p) {
  const int64_t row = blockIdx.x;
  const float* const values = p.grad_logits + row * p.row_stride;
  float* const packed = p.packed + row * p.packed_row_stride;
  const float weight = p.token_weights ? fabsf(p.token_weights[row]) : 1.0f;
  if (weight == 0.0f) {
    for (int64_t k = threadIdx.x; k < p.num_columns; k += kPackThreads) packed[k] = 0.0f;
    if (threadIdx.x == 0) p.dropped[row] = 0.0f;
    return;
  }
  const Pieces<float> pieces(values, p.vocab_size);
  const bool kept_is_aligned = (reinterpret_cast<uintptr_t>(p.kept + pieces.head) & 3) == 0;
  double sum = 0.0;
  const auto add = [&](float value, bool is_kept) {
    if (!is_kept) sum += static_cast<double>(fabsf(value));
  };
  const int64_t loose = pieces.loose_column();
  if (loose >= 0) add(values[loose], p.kept[loose] != 0);
  for (int64_t first = threadIdx.x; first < pieces.pieces; first += kPackReads * kPackThreads) {
    float sizes[kPackReads][kPer];
    uint32_t kept[kPackReads];
#pragma unroll
    for (int k = 0; k < kPackReads; ++k) {
      const int64_t piece = first + k * kPackThreads;
      kept[k] = ~0u;
      if (piece >= pieces.pieces) continue;
      load_16(values + pieces.column(piece), sizes[k]);
      kept[k] = load_kept(p.kept + pieces.column(piece), kept_is_aligned);
    }
#pragma unroll
    for (int k = 0; k < kPackReads; ++k) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) add(sizes[k][i], (kept[k] >> (8 * i) & 0xffu) != 0);
    }
  }
  sum = reduce_block(sum, reinterpret_cast<double*>(shared_memory()), 0.0, Sum());
  if (threadIdx.x == 0) {
    p.dropped[row] = static_cast<float>(sum / static_cast<double>(weight));
  }
  // what this block has just read and the cache still has
#pragma unroll 4
  for (int64_t k = threadIdx.x; k < p.num_columns; k += kPackThreads) {
    const int64_t column = p.columns[k];
    const bool is_column = column >= 0 && column < p.vocab_size;
    packed[k] = is_column ? values[column] : std::numeric_limits<float>::quiet_NaN();
  }
}

// -- add: a block per row of the target, and no row repeats ---------------------------------------

constexpr int kAddThreads = 256;

struct AddParameters {
  const int64_t* columns;
  int64_t vocab_size, width;
  const float* rows;
  int64_t row_stride;
  float* target;
  int64_t target_row_stride;
};

__global__ void __launch_bounds__(kAddThreads) sparse_gradient_add(AddParameters p) {
  const int64_t column = p.columns[blockIdx.x];
  if (column < 0 || column >= p.vocab_size) return;
  const float* const from = p.rows + blockIdx.x * p.row_stride;
  float* const to = p.target + column * p.target_row_stride;
  int64_t done = 0;
  if (is_aligned_16(from) && is_aligned_16(to)) {
    done = p.width / kPer * kPer;
    for (int64_t i = threadIdx.x * kPer; i < done; i += kAddThreads * kPer) {
      float values[kPer], sums[kPer];
      load_16(from + i, values);
      load_16(to + i, sums);
#pragma unroll
      for (int j = 0; j < kPer; ++j) sums[j] += values[j];
      store_16(sums, to + i);
    }
  }
  for (int64_t i = done + threadIdx.x; i < p.width; i += kAddThreads) to[i] += from[i];
}

void check_float32(const char* name, int32_t dtype) {
  if (dtype == OPD_FLOAT32) return;
  throw Error(OPD_UNSUPPORTED,
              concat(sparse_gradient::kOp, ": ", name, " must be float32 on a GPU, got float64. ",
                     "Convert it, or call the CPU's entry point."));
}

void mark(const opd_sparse_gradient_args_t& args, void* stream) {
  check_float32("grad_logits", args.grad_logits.dtype);
  const MarkParameters parameters{static_cast<const float*>(args.grad_logits.data),
                                  args.grad_logits.row_stride,
                                  args.num_tokens,
                                  args.vocab_size,
                                  static_cast<const float*>(args.token_weights),
                                  static_cast<float>(args.tolerance),
                                  args.kept};
  const int64_t blocks = (args.vocab_size + kMarkColumns - 1) / kMarkColumns;
  launch({blocks, kMarkThreads, kMarkThreads * sizeof(unsigned)}, stream, &sparse_gradient_mark,
         parameters);
}

void pack(const opd_sparse_gradient_args_t& args, void* stream) {
  check_float32("grad_logits", args.grad_logits.dtype);
  const PackParameters parameters{static_cast<const float*>(args.grad_logits.data),
                                  args.grad_logits.row_stride,
                                  args.vocab_size,
                                  static_cast<const float*>(args.token_weights),
                                  args.kept,
                                  args.columns,
                                  args.num_columns,
                                  static_cast<float*>(args.packed.data),
                                  args.packed.row_stride,
                                  static_cast<float*>(args.dropped)};
  launch({args.num_tokens, kPackThreads, kWarp * sizeof(double)}, stream, &sparse_gradient_pack,
         parameters);
}

void add(const opd_sparse_gradient_add_args_t& args, void* stream) {
  check_float32("target", args.target.dtype);
  const AddParameters parameters{args.columns,
                                 args.vocab_size,
                                 args.width,
                                 static_cast<const float*>(args.rows.data),
                                 args.rows.row_stride,
                                 static_cast<float*>(args.target.data),
                                 args.target.row_stride};
  launch({args.num_columns, kAddThreads}, stream, &sparse_gradient_add, parameters);
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_sparse_gradient_mark_cuda(const opd_sparse_gradient_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::sparse_gradient::check_mark(args);
    opd::cuda::mark(*args, stream);
  });
}

opd_status_t opd_sparse_gradient_pack_cuda(const opd_sparse_gradient_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::sparse_gradient::check_pack(args);
    if (args->num_tokens > 0) opd::cuda::pack(*args, stream);
  });
}

opd_status_t opd_sparse_gradient_add_cuda(const opd_sparse_gradient_add_args_t* args,
                                          void* stream) {
  return opd::guarded([&] {
    opd::sparse_gradient::check_add(args);
    if (args->num_columns > 0) opd::cuda::add(*args, stream);
  });
}
