// SPDX-License-Identifier: Apache-2.0
// What a sparse divergence needs of a row of logits, and the row's gradient, one block per row.
//
// Forward, each logit read once: log q at K ids, the log of all mass off them, log-sum-exp and
// entropy. The ids are bits in shared memory (19 KB at V = 152k), looked up 4 or 8 at a time with
// the 16 bytes of logits that they belong to. Two sums run side by side, each relative to its own
// largest logit: S_on of the ids and S_off of the rest. The mass off the ids is therefore a sum of
// what is there and no difference, and log q(rest) = log sigmoid(log S_off - log S_on) is exact at
// both ends: where nothing is left, and where all is.
//
// Backward, each logit read and overwritten once: dz_v = slope_v q_v grad_rest off the ids, and
// slope_v grad_ids[k] on them, slope_v = scale / temperature times the softcap's own slope, and q_v
// relative to any lse, that of the row or of its rest. The pass over the row knows no ids: their
// columns, which may have overflowed in it, are written after it, behind a barrier. Under a softcap
// their slopes are taken before it, since it overwrites the logits. With grad_rest = 0 (laws
// conditioned on the ids, rows of weight 0) no logit off the ids is read.
//
// Predicted, not measured: both are limited by memory. Per logit the forward moves 4 bytes, the
// backward 4 + 2 (16-bit gradient) or 4 + 4; per id they move 8 of id, 4 of result and one 32-byte
// sector each, a twentieth of the row's own traffic at K = 512 and V = 152k. A chunk's logits (0.6 GB
// for 1,024 tokens) outlive no L2 between the two, and smaller chunks would cost the head's GEMMs
// more than they save here, so the pair is two launches. The two 512-thread blocks of a
// multiprocessor have 32 KB of reads in flight; rows shorter than 32 KB are limited by the block's
// barriers instead.
#include <limits>

#include "id_set.cuh"
#include "row_passes.cuh"
#include "seen.cuh"
#include "topk_divergence_check.h"

namespace opd {
namespace cuda {
namespace {

constexpr int kScratchBytes = kWarp * sizeof(double);

struct ForwardParameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  int64_t num_ids;
  float* logprobs;
  double* tail_logprob;
  double* lse;
  float* entropy;
};

// A law in two parts, in float64; a part of nothing has largest -inf and sum 0. A row of nothing has
// no law: its lse is -inf, the rest NaN.
struct Law {
  double lse, entropy, tail_logprob;

  __device__ __forceinline__ Law(const SeenByAll& on, const SeenByAll& off) {
    const double largest = fmax(static_cast<double>(on.largest), static_cast<double>(off.largest));
    double sum = 0.0, weighted = 0.0;
    const auto add = [&](const SeenByAll& part) {
      const double distance = static_cast<double>(part.largest) - largest;
      // of a part of nothing, or of a row of nothing, the sum is 0, or NaN if it saw one
      const bool is_nothing = part.largest == kMinusInfinity;
      const double decay = is_nothing ? 1.0 : ::exp(distance);
      sum += decay * part.sum;
      weighted += is_nothing ? part.sum : decay * (part.weighted + part.sum * distance);
    };
    add(on);
    add(off);
    const double log_sum = ::log(sum);
    lse = largest + log_sum;
    entropy = log_sum - weighted / sum;
    // log sigmoid of how far the rest is ahead
    const double ahead = (static_cast<double>(off.largest) + ::log(off.sum)) -
                         (static_cast<double>(on.largest) + ::log(on.sum));
    const double size = ::log1p(::exp(ahead > 0.0 ? -ahead : ahead));
    tail_logprob = ahead > 0.0 ? 0.0 - size : ahead - size;
  }
};

template <class Storage>
__global__ void __launch_bounds__(kThreads, 2) topk_divergence_forward(ForwardParameters p) {
  constexpr int kPer = kPerLoad<Storage>;
  const int64_t row = blockIdx.x;
  const RowLaw law(p.side, row);
  const Storage* const logits = row_of<Storage>(p.side, row);
  const int64_t* const ids = p.token_ids + row * p.num_ids;
  const Pieces<Storage> pieces(logits, p.vocab_size);
  const int shift = kPer - pieces.head;
  IdSet set(shared_memory() + kScratchBytes, p.vocab_size, shift);
  Seen on, off;
  const auto add = [&](int64_t column, auto& values) {
    constexpr int N = sizeof(values) / sizeof(float);
    law.apply(column, values);
    const unsigned bits = set.template bits<N>(column);
    if (bits != 0) {
      float chosen[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool is_on = (bits >> i) & 1;
        chosen[i] = is_on ? values[i] : kMinusInfinity;
        values[i] = is_on ? kMinusInfinity : values[i];
      }
      on.add(chosen);
    }
    off.add(values);
  };
  const int64_t loose = pieces.loose_column();
  const int64_t num_windows = (p.vocab_size + shift + kWindow - 1) / kWindow;
  for (int64_t window = 0; window < num_windows; ++window) {
    set.fill(ids, p.num_ids, window);
    if (loose >= 0 && set.covers(loose)) {
      float value[1] = {to_real(logits[loose])};
      add(loose, value);
    }
    // piece i has the bits [(i + 1) kPer, (i + 2) kPer)
    const int64_t first = window * (kWindow / kPer) - 1;
    const int64_t end = first + kWindow / kPer;
    read_pieces(logits, pieces, first < 0 ? 0 : first, end < pieces.pieces ? end : pieces.pieces,
                add);
  }

  double* const scratch = reinterpret_cast<double*>(shared_memory());
  const SeenByAll all_on = reduce_block(on, scratch);
  const Law all(all_on, reduce_block(off, scratch));
  for (int64_t k = threadIdx.x; k < p.num_ids; k += kThreads) {
    const int64_t id = ids[k];
    float value[1] = {id < 0 ? kMinusInfinity : std::numeric_limits<float>::quiet_NaN()};
    if (id >= 0 && id < p.vocab_size) {
      value[0] = to_real(logits[id]);
      law.apply(id, value);
    }
    p.logprobs[row * p.num_ids + k] = static_cast<float>(static_cast<double>(value[0]) - all.lse);
  }
  if (threadIdx.x != 0) return;
  p.lse[row] = all.lse;
  p.tail_logprob[row] = all.tail_logprob;
  p.entropy[row] = static_cast<float>(all.entropy);
}

struct BackwardParameters {
  Side side;
  int64_t vocab_size;
  const int64_t* token_ids;
  int64_t num_ids;
  const float* grad_ids;
  const float* grad_rest;
  const double* lse;
  void* grad_logits;
  int64_t grad_row_stride, grad_width;
  bool overlaps;  // as rewrite_row() has it
};

// What a row's gradient off the ids needs, and N columns of it side by side.
struct RestGradient {
  RowLaw law;
  float lse_high, lse_low, factor;

  // the logits become their gradient, in place
  template <int N>
  __device__ __forceinline__ void apply(int64_t column, float (&values)[N]) const {
    law.to_gradient(column, values, [&](float (&logits)[N]) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float q = exp((logits[i] - lse_high) - lse_low);
        logits[i] = q == 0.0f ? 0.0f : q * factor;
      }
    });
  }
};

// The row of this block, read anew: what is made of it need not stay in registers until then.
__device__ __forceinline__ int64_t row_again() {
#if defined(__CUDA_ARCH__)
  unsigned row;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(row));
  return row;
#else
  return blockIdx.x;
#endif
}

// fn(k, id) of the ids of a row that are this thread's.
template <class Fn>
__device__ __forceinline__ void for_each_id(const BackwardParameters& p, int64_t row, Fn&& fn) {
  const int64_t* const ids = p.token_ids + row * p.num_ids;
  for (int64_t k = threadIdx.x; k < p.num_ids; k += kThreads) {
    const int64_t id = ids[k];
    if (id >= 0 && id < p.vocab_size) fn(k, id);
  }
}

template <class Storage, class Gradient>
__global__ void __launch_bounds__(kThreads, 2) topk_divergence_backward(BackwardParameters p) {
  const int64_t row = blockIdx.x;
  const RowLaw law(p.side, row);
  const Storage* const logits = row_of<Storage>(p.side, row);
  Gradient* const out = static_cast<Gradient*>(p.grad_logits) + row * p.grad_row_stride;
  const float slope = law.slope(), rest = p.grad_rest[row];
  // under a softcap, a slope per id; each is written and read by one thread
  float* const slopes = reinterpret_cast<float*>(shared_memory());
  if (law.has_softcap()) {
    for_each_id(p, row, [&](int64_t k, int64_t id) {
      float value[1] = {to_real(logits[id])};
      law.affine(id, value);
      law.softcap_slope(value);
      slopes[k] = slope * value[0];
    });
    __syncthreads();  // all have read what the pass overwrites
  }

  if (rest == 0.0f) {
    zero(out, 0, p.grad_width);
  } else {
    const double lse = p.lse[row];
    // in two parts: the rounding of a large lse to float32 would scale the whole row
    const float high = static_cast<float>(lse), low = static_cast<float>(lse - high);
    const RestGradient gradient{law, high, low, slope * rest};
    rewrite_row(logits, p.vocab_size, p.overlaps, out,
                [&](int64_t column, auto& values) { gradient.apply(column, values); });
    zero(out, p.vocab_size, p.grad_width);
  }

  __syncthreads();  // the pass has written the columns of the ids, too
  const int64_t again = row_again();
  const float* const grad_ids = p.grad_ids + again * p.num_ids;
  const float plain_slope = RowLaw(p.side, again).slope();
  Gradient* const at = static_cast<Gradient*>(p.grad_logits) + again * p.grad_row_stride;
  for_each_id(p, again, [&](int64_t k, int64_t id) {
    const float grad = grad_ids[k];
    const float by = p.side.softcap != 0.0f ? slopes[k] : plain_slope;
    from_real(grad == 0.0f ? 0.0f : grad * by, at + id);
  });
}

void forward(const opd_topk_divergence_fwd_args_t& args, void* stream) {
  const opd_topk_divergence_spec_t& spec = args.spec;
  const ForwardParameters parameters{side_of(spec.logits),
                                     spec.vocab_size,
                                     spec.token_ids,
                                     spec.num_ids,
                                     static_cast<float*>(args.logprobs),
                                     args.tail_logprob,
                                     args.lse,
                                     static_cast<float*>(args.entropy)};
  const Shape shape{spec.num_tokens, kThreads, kScratchBytes + id_set_bytes(spec.vocab_size)};
  visit_storage(topk_divergence::kOp, "logits", spec.logits.matrix.dtype, [&](auto storage) {
    launch(shape, stream, &topk_divergence_forward<decltype(storage)>, parameters);
  });
}

void backward(const opd_topk_divergence_bwd_args_t& args, void* stream) {
  const opd_topk_divergence_spec_t& spec = args.spec;
  const opd_const_matrix_t logits = spec.logits.matrix;
  const BackwardParameters parameters{
      side_of(spec.logits),
      spec.vocab_size,
      spec.token_ids,
      spec.num_ids,
      static_cast<const float*>(args.grad_ids),
      static_cast<const float*>(args.grad_rest),
      args.lse,
      args.grad_logits.data,
      args.grad_logits.row_stride,
      args.grad_width,
      overlaps_logits(topk_divergence::kOp, logits, args.grad_logits, spec.num_tokens)};
  const int64_t shared = spec.logits.softcap != 0.0 ? spec.num_ids * sizeof(float) : 0;
  const Shape shape{spec.num_tokens, kThreads, shared};
  visit_storages(topk_divergence::kOp, logits, args.grad_logits, [&](auto storage, auto gradient) {
    launch(shape, stream, &topk_divergence_backward<decltype(storage), decltype(gradient)>,
           parameters);
  });
}

}  // namespace
}  // namespace cuda
}  // namespace opd

opd_status_t opd_topk_divergence_fwd_cuda(const opd_topk_divergence_fwd_args_t* args,
                                          void* stream) {
  return opd::guarded_rows(args, opd::topk_divergence::check_args,
                           [&] { opd::cuda::forward(*args, stream); });
}

opd_status_t opd_topk_divergence_bwd_cuda(const opd_topk_divergence_bwd_args_t* args,
                                          void* stream) {
  return opd::guarded_rows(args, opd::topk_divergence::check_args,
                           [&] { opd::cuda::backward(*args, stream); });
}
