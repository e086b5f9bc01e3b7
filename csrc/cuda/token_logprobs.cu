// SPDX-License-Identifier: Apache-2.0
// Log-probability of one token, log-sum-exp and entropy of a row of logits, and their gradient, one
// block per row and each row read once. The entropy comes from the same pass as the log-sum-exp:
// with m the largest logit, S = sum_v e^(z_v - m) and W = sum_v e^(z_v - m) (z_v - m),
// H = log S - W / S, two summands that are both >= 0. The gradient's formula is in
// csrc/core/token_logprobs.cpp.
#include <limits>

#include "logits_row.cuh"
#include "reduce.cuh"
#include "token_logprobs_check.h"

namespace opd {
namespace cuda {
namespace {

constexpr int kThreads = 512;
// 16-byte reads that a thread has in flight
constexpr int kReads = 2;
constexpr float kLowest = -std::numeric_limits<float>::infinity();

struct ForwardParameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  float* logprobs;
  double* lse;
  float* entropy;
};

// What a thread has seen of a row: the largest logit, and the sums S and W relative to it.
struct Seen {
  float largest = kLowest, sum = 0.0f, weighted = 0.0f;

  // `other` is at least as large as `largest`
  __device__ __forceinline__ void move_to(float other) {
    const float distance = largest - other, decay = exp(distance);
    // -inf, of nothing seen yet, times a sum of 0
    weighted = decay == 0.0f ? 0.0f : decay * (weighted + sum * distance);
    sum *= decay;
    largest = other;
  }

  template <int N>
  __device__ __forceinline__ void add(const float (&logits)[N]) {
    float here = logits[0];  // fmaxf passes over a NaN, which shows in the sums
#pragma unroll
    for (int i = 1; i < N; ++i) here = fmaxf(here, logits[i]);
    if (here > largest) move_to(here);
    const float reference = largest == kLowest ? 0.0f : largest;
    float more = 0.0f, more_weighted = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float distance = logits[i] - reference;
      const float decay = exp(distance);
      more += decay;
      more_weighted += decay == 0.0f ? 0.0f : decay * distance;
    }
    sum += more;
    weighted += more_weighted;
  }
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, 2) token_logprobs_forward(ForwardParameters p) {
  constexpr int kPer = kPerLoad<Storage>;
  const int64_t row = blockIdx.x;
  const RowLaw law(p.side, row);
  const Storage* const logits = row_of<Storage>(p.side, row);
  const Pieces<Storage> pieces(logits, p.vocab_size);
  Seen seen;
  const auto add_one = [&](int64_t column) {
    float value[1] = {to_real(logits[column])};
    law.apply(column, value);
    seen.add(value);
  };
  if (pieces.loose_column() >= 0) add_one(pieces.loose_column());
  for (int64_t first = threadIdx.x; first < pieces.pieces; first += kReads * kThreads) {
    float values[kReads][kPer];
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece < pieces.pieces) load_16(logits + pieces.column(piece), values[k]);
    }
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = first + k * kThreads;
      if (piece >= pieces.pieces) break;
      law.apply(pieces.column(piece), values[k]);
      seen.add(values[k]);
    }
  }

  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const float largest =
      reduce_block(seen.largest, reinterpret_cast<float*>(scratch), kLowest, Max());
  if (largest != kLowest) seen.move_to(largest);
  const double sum = reduce_block(static_cast<double>(seen.sum), scratch, 0.0, Sum());
  const double weighted = reduce_block(static_cast<double>(seen.weighted), scratch, 0.0, Sum());
  if (threadIdx.x != 0) return;
  const double log_sum = ::log(sum);
  const double lse = static_cast<double>(largest) + log_sum;
  const int64_t token_id = p.token_ids[row];
  float logprob = std::numeric_limits<float>::quiet_NaN();
  if (token_id >= 0 && token_id < p.vocab_size) {
    float value[1] = {to_real(logits[token_id])};
    law.apply(token_id, value);
    logprob = static_cast<float>(static_cast<double>(value[0]) - lse);
  }
  p.logprobs[row] = logprob;
  p.lse[row] = lse;
  p.entropy[row] = static_cast<float>(log_sum - weighted / sum);
}

struct BackwardParameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  const float* grad_logprobs;
  const double* grad_lse;
  const float* grad_entropy;
  const double* lse;
  const float* entropy;
  void* grad_logits;
  int64_t grad_row_stride, grad_width;
  // 16-bit rows of the gradient lie in the float32 rows of the logits: a column of it has the bytes
  // of a logit further left, so a block reads all of a tile before it writes any of it
  bool overlaps;
};

// What a row's gradient needs, and N columns of it side by side.
struct RowGradient {
  RowLaw law;
  int64_t token_id;
  float lse_high, lse_low, c0, c1, of_token;

  // the logits become their gradient, in place
  template <int N>
  __device__ __forceinline__ void apply(int64_t column, float (&values)[N]) const {
    float slopes[N];
    law.affine(column, values);
#pragma unroll
    for (int i = 0; i < N; ++i) slopes[i] = values[i];
    law.cap_and_cool(values);
    const int64_t distance = token_id - column;
    const int own = distance >= 0 && distance < N ? static_cast<int>(distance) : -1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float lq = (values[i] - lse_high) - lse_low;
      const float q = exp(lq);
      const float gradient = q == 0.0f ? 0.0f : q * (c0 + c1 * lq);
      values[i] = i == own ? gradient + of_token : gradient;
    }
    if (law.has_softcap()) {
      law.softcap_slope(slopes);
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] *= slopes[i];
    }
  }
};

// values[0 .. N) to N columns; in stores of up to 16 bytes where the first of them is so aligned.
template <int N, class Storage>
__device__ __forceinline__ void store(const float (&values)[N], bool is_aligned, Storage* to) {
  constexpr int kPer = kPerLoad<Storage>;
  if (is_aligned && N % kPer == 0) {
#pragma unroll
    for (int i = 0; i + kPer <= N; i += kPer) store_16(values + i, to + i);
  } else if (is_aligned && N * sizeof(Storage) == 8) {
    union {
      uint2 bits;
      Storage items[8 / sizeof(Storage)];
    } chunk;
#pragma unroll
    for (int i = 0; i < N; ++i) from_real(values[i], &chunk.items[i % (8 / sizeof(Storage))]);
    expect_aligned(to, 8);
    *reinterpret_cast<uint2*>(to) = chunk.bits;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) from_real(values[i], to + i);
  }
}

// Columns [begin, end) of a row become zero.
template <class Storage>
__device__ __forceinline__ void zero(Storage* row, int64_t begin, int64_t end) {
  const Pieces<Storage> pieces(row + begin, end - begin);
  const float zeros[kPerLoad<Storage>] = {};
  const int64_t loose = pieces.loose_column();
  if (loose >= 0) from_real(0.0f, row + begin + loose);
  for (int64_t piece = threadIdx.x; piece < pieces.pieces; piece += kThreads) {
    store_16(zeros, row + begin + pieces.column(piece));
  }
}

template <class Storage, class Gradient>
__global__ void __launch_bounds__(kThreads, 2) token_logprobs_backward(BackwardParameters p) {
  constexpr int kPer = kPerLoad<Storage>;
  const int64_t row = blockIdx.x;
  Gradient* const out = static_cast<Gradient*>(p.grad_logits) + row * p.grad_row_stride;
  const float grad_logprob = p.grad_logprobs[row], grad_entropy = p.grad_entropy[row];
  const float grad_lse = static_cast<float>(p.grad_lse[row]);
  if (grad_logprob == 0.0f && grad_entropy == 0.0f && grad_lse == 0.0f) {
    zero(out, 0, p.grad_width);
    return;
  }
  const RowLaw law(p.side, row);
  const float slope = law.slope();
  const double lse = p.lse[row];
  // in two parts: the rounding of a large lse to float32 would scale the whole row
  const float high = static_cast<float>(lse), low = static_cast<float>(lse - high);
  const RowGradient gradient{law,
                             p.token_ids[row],
                             high,
                             low,
                             slope * (grad_lse - grad_logprob - grad_entropy * p.entropy[row]),
                             slope * -grad_entropy,
                             slope * grad_logprob};
  const Storage* const logits = row_of<Storage>(p.side, row);
  const Pieces<Storage> pieces(logits, p.vocab_size);
  constexpr int kStoreBytes = kPer * sizeof(Gradient) < 16 ? 8 : 16;
  const bool is_aligned =
      (reinterpret_cast<uintptr_t>(out + pieces.head) & (kStoreBytes - 1)) == 0;
  const auto settle = [&] {
    if (p.overlaps) __syncthreads();
  };
  // one column for each of the first `count` threads
  const auto loose_columns = [&](int64_t first, int count) {
    const int64_t column = first + threadIdx.x;
    const bool is_mine = static_cast<int>(threadIdx.x) < count;
    float value[1] = {is_mine ? to_real(logits[column]) : 0.0f};
    settle();
    if (!is_mine) return;
    gradient.apply(column, value);
    from_real(value[0], out + column);
  };
  loose_columns(0, pieces.head);
  for (int64_t tile = 0; tile < pieces.pieces; tile += kReads * kThreads) {
    float values[kReads][kPer];
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = tile + k * kThreads + threadIdx.x;
      if (piece < pieces.pieces) load_16(logits + pieces.column(piece), values[k]);
    }
    settle();
#pragma unroll
    for (int k = 0; k < kReads; ++k) {
      const int64_t piece = tile + k * kThreads + threadIdx.x;
      if (piece >= pieces.pieces) break;
      const int64_t column = pieces.column(piece);
      gradient.apply(column, values[k]);
      store(values[k], is_aligned, out + column);
    }
  }
  loose_columns(p.vocab_size - pieces.tail, pieces.tail);
  zero(out, p.vocab_size, p.grad_width);
}

// fn(value of the storage type) of a dtype
template <class Fn>
void visit_storage(const char* name, int32_t dtype, Fn&& fn) {
  switch (dtype) {
    case OPD_FLOAT32:
      return fn(float());
    case OPD_BFLOAT16:
      return fn(BFloat16());
    case OPD_FLOAT16:
      return fn(Float16());
    default:
      throw Error(OPD_UNSUPPORTED,
                  concat(token_logprobs::kOp, ": ", name, " must be float32, bfloat16 or float16 ",
                         "on a GPU, got float64. Convert it, or call the CPU's entry point."));
  }
}

void forward(const opd_token_logprobs_fwd_args_t& args, void* stream) {
  const opd_token_logprobs_spec_t& spec = args.spec;
  const ForwardParameters parameters{side_of(spec.logits),
                                     spec.vocab_size,
                                     spec.token_ids,
                                     static_cast<float*>(args.logprobs),
                                     args.lse,
                                     static_cast<float*>(args.entropy)};
  const Shape shape{spec.num_tokens, kThreads, kWarp * sizeof(double)};
  visit_storage("logits", spec.logits.matrix.dtype, [&](auto storage) {
    launch(shape, stream, &token_logprobs_forward<decltype(storage)>, parameters);
  });
}

void backward(const opd_token_logprobs_bwd_args_t& args, void* stream) {
  const opd_token_logprobs_spec_t& spec = args.spec;
  BackwardParameters parameters{side_of(spec.logits),
                                spec.vocab_size,
                                spec.token_ids,
                                static_cast<const float*>(args.grad_logprobs),
                                args.grad_lse,
                                static_cast<const float*>(args.grad_entropy),
                                args.lse,
                                static_cast<const float*>(args.entropy),
                                args.grad_logits.data,
                                args.grad_logits.row_stride,
                                args.grad_width,
                                false};
  const opd_const_matrix_t logits = spec.logits.matrix;
  parameters.overlaps =
      logits.data == args.grad_logits.data && logits.dtype != args.grad_logits.dtype;
  const bool fits = logits.dtype == OPD_FLOAT32 &&
                    (spec.num_tokens == 1 || args.grad_logits.row_stride == 2 * logits.row_stride);
  OPD_CHECK(!parameters.overlaps || fits, token_logprobs::kOp,
            ": grad_logits in the place of logits of another dtype must be 16-bit in that of ",
            "float32, with twice the row_stride ", logits.row_stride, ", got ",
            args.grad_logits.row_stride);
  const Shape shape{spec.num_tokens, kThreads};
  visit_storage("logits", logits.dtype, [&](auto storage) {
    visit_storage("grad_logits", args.grad_logits.dtype, [&](auto gradient) {
      using Storage = decltype(storage);
      using Gradient = decltype(gradient);
      launch(shape, stream, &token_logprobs_backward<Storage, Gradient>, parameters);
    });
  });
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_token_logprobs_fwd_cuda(const opd_token_logprobs_fwd_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::token_logprobs::check_args(args);
    if (args->spec.num_tokens == 0) return;
    opd::cuda::forward(*args, stream);
  });
}

opd_status_t opd_token_logprobs_bwd_cuda(const opd_token_logprobs_bwd_args_t* args, void* stream) {
  return opd::guarded([&] {
    opd::token_logprobs::check_args(args);
    if (args->spec.num_tokens == 0) return;
    opd::cuda::backward(*args, stream);
  });
}
