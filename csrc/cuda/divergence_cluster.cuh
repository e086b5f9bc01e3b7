// SPDX-License-Identifier: Apache-2.0
// The kernel of divergence_cluster.h. A cluster of blocks holds a row of both logits in shared
// memory, spread over its warps. Sweeps over the row: sums of exponentials; the search for a
// head, and sums, that terms need first; terms, with dterm and q put where the logits were;
// gradient, after which the memory takes what comes next. One more warp in each block adds up
// what the others found, exchanges it with the other blocks and hands back what the next sweep
// needs; meanwhile the others sum the exponentials of the row after, which is on chip already.
// Another warp does nothing but start copies. Nothing depends on which cluster takes a row or
// when.
#pragma once

#include "bits.cuh"
#include "cluster_rows.cuh"
#include "head_search.cuh"
#include "reduce.cuh"

namespace opd {
namespace cuda {

enum Exchange { kLseExchange, kRowSumExchange, kAgainExchange, kTermExchange, kHeadExchange };
static_assert(kHeadExchange + 1 == kExchangeKinds, "tuning.h must leave room for their barriers");

// Row sums that some rows need once more, in double.
template <class F>
constexpr int kAgainValues = std::is_same_v<F, Renyi> ? 1 : 0;

struct SideArgs {
  const float* logits;
  int64_t stride;
  double scale;
  const float* temperatures;
  Factor factor;  // without temperatures
};

struct ClusterArgs {
  RowPlan plan;
  SideArgs student, teacher;
  int64_t num_tokens, vocab_size, grad_width;
  const float* token_weights;
  const float* coefficients;
  float* loss;
  float* statistics;  // [OPD_NUM_STATISTICS, T]
  const int64_t* token_ids;
  const int64_t* topk_ids;
  int64_t num_topk;
  opd_matrix_t grad;
  bool centred;  // dterm sums to 0 as it is
};

#if OPD_HAS_CLUSTERS

// What the last sweep multiplies by.
struct GradScalars {
  float grad_sum, scale;
  int zero;  // the gradient is 0 whatever the sums are
};

// Which functors read what the rounding of log-probabilities has lost; a new one does until it is
// known not to.
template <class F>
constexpr bool kReadsLowParts = true;
template <> constexpr bool kReadsLowParts<ForwardKl> = false;
template <> constexpr bool kReadsLowParts<ReverseKl> = false;
template <> constexpr bool kReadsLowParts<Jeffreys> = false;
template <> constexpr bool kReadsLowParts<Jsd> = false;
template <> constexpr bool kReadsLowParts<SkewForwardKl> = false;
template <> constexpr bool kReadsLowParts<SkewReverseKl> = false;
template <> constexpr bool kReadsLowParts<TotalVariation> = false;
template <> constexpr bool kReadsLowParts<Todi> = false;
template <> constexpr bool kReadsLowParts<ConcreteScore> = false;
template <> constexpr bool kReadsLowParts<AdaptiveKl> = false;

// The rows of weight other than 0 that fall to this cluster, in order. Every lane of a warp makes
// the same calls; on_skipped(row) is called for the others.
class RowsOfCluster {
 public:
  __device__ RowsOfCluster(const ClusterArgs& args, int lane)
      : args_(args),
        lane_(lane),
        step_(gridDim.x / cluster_size()),
        next_(blockIdx.x / cluster_size()) {}

  // num_tokens if there is none
  template <class OnSkipped>
  __device__ __forceinline__ int64_t next(OnSkipped&& on_skipped) {
    if (args_.token_weights == nullptr) {
      const int64_t row = next_ < args_.num_tokens ? next_ : args_.num_tokens;
      next_ += step_;
      return row;
    }
    while (true) {
      if (known_ == 0) {
        if (next_ >= args_.num_tokens) return args_.num_tokens;
        // as many rows ahead as a warp has lanes
        const int64_t row = next_ + lane_ * step_;
        const bool active = row < args_.num_tokens && args_.token_weights[row] != 0.0f;
        active_ = __ballot_sync(kAllLanes, active);
        known_ = kWarp;
      }
      if (next_ >= args_.num_tokens) return args_.num_tokens;
      const int64_t row = next_;
      const bool active = active_ & 1u;
      active_ >>= 1, --known_, next_ += step_;
      if (active) return row;
      on_skipped(row);
    }
  }

 private:
  const ClusterArgs& args_;
  int lane_;
  int64_t step_, next_;
  unsigned active_ = 0;
  int known_ = 0;
};

// A ring of chunks, walked in order.
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int ring) {
    if (++slot == ring) slot = 0, parity ^= 1;
  }
};

}  // namespace cuda
}  // namespace opd

#include "cluster_head.cuh"

namespace opd {
namespace cuda {

// What both kinds of warp know.
template <class F, bool kStatistics>
struct BlockView {
  static constexpr int kLseValues = kStatistics ? 6 : 4;
  static constexpr int kTermValues = kStatistics ? 6 : 2;
  static constexpr int kValues = kLseValues + F::kRowSums + kAgainValues<F> + kTermValues;

  const ClusterArgs& args;
  unsigned char* const shared = shared_memory();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;

  __device__ explicit BlockView(const ClusterArgs& args) : args(args) {}

  __device__ static constexpr int count_of(Exchange kind) {
    return kind == kLseExchange      ? kLseValues
           : kind == kRowSumExchange ? F::kRowSums
           : kind == kAgainExchange  ? kAgainValues<F>
                                     : kTermValues;
  }
  __device__ static constexpr int first_of(Exchange kind) {
    int first = 0;
    for (int before = 0; before < kind; ++before) first += count_of(static_cast<Exchange>(before));
    return first;
  }
  // when the chunk in a slot is there; when every warp has done with it
  __device__ MemoryBarrier* full(int slot) const {
    return reinterpret_cast<MemoryBarrier*>(shared + args.plan.layout.chunk_barriers) + 2 * slot;
  }
  __device__ MemoryBarrier* empty(int slot) const { return full(slot) + 1; }
  // A slot: the student's logits, then the teacher's.
  __device__ float* chunk_at(int slot) const {
    return reinterpret_cast<float*>(shared) + 2 * slot * args.plan.chunk;
  }
  // Of a row, in this block.
  __device__ int64_t first_column() const { return args.plan.slice * cluster_rank(); }
  __device__ int columns() const {
    const int64_t left = args.vocab_size - first_column();
    return left <= 0 ? 0 : static_cast<int>(left < args.plan.slice ? left : args.plan.slice);
  }
  // when every warp's values are there; when every block's are; when the result is
  __device__ MemoryBarrier* gathered(Exchange kind) const { return exchange_barriers() + 3 * kind; }
  __device__ MemoryBarrier* received(Exchange kind) const { return gathered(kind) + 1; }
  __device__ MemoryBarrier* published(Exchange kind) const { return gathered(kind) + 2; }
  __device__ double* partials(int of_warp) const {
    return reinterpret_cast<double*>(shared + args.plan.layout.partials) + kValues * of_warp;
  }
  __device__ double* inbox(int of_rank) const {
    return reinterpret_cast<double*>(shared + args.plan.layout.inbox) + kValues * of_rank;
  }
  __device__ RowLaws* laws() const {
    return reinterpret_cast<RowLaws*>(shared + args.plan.layout.scalars);
  }
  __device__ GradScalars* grad_scalars() const {
    return reinterpret_cast<GradScalars*>(shared + args.plan.layout.scalars + kScalarBytes - 16);
  }
  // 1: the sweeps are to do an exchange of kAgainExchange
  __device__ int* again() const {
    return reinterpret_cast<int*>(shared + args.plan.layout.scalars + kScalarBytes - 32);
  }
  // what the search for a head takes next, and the set of bins that it takes in this turn
  __device__ HeadRange* head() const {
    return reinterpret_cast<HeadRange*>(shared + args.plan.layout.scalars + kScalarBytes - 48);
  }
  __device__ HeadBins* head_bins(uint32_t turn) const {
    return reinterpret_cast<HeadBins*>(shared + args.plan.layout.head) + turn;
  }
  __device__ F* functor() const { return reinterpret_cast<F*>(shared + args.plan.layout.functor); }

  __device__ Factor factor(const SideArgs& side, int64_t row) const {
    if (side.temperatures == nullptr) return side.factor;
    return factor_of(side.scale, static_cast<double>(side.temperatures[row]));
  }
  __device__ float coefficient(int64_t row) const {
    return args.coefficients ? args.coefficients[row] : 1.0f;
  }

 private:
  __device__ MemoryBarrier* exchange_barriers() const {
    return reinterpret_cast<MemoryBarrier*>(shared + args.plan.layout.exchange_barriers);
  }
};

}  // namespace cuda
}  // namespace opd

#include "cluster_load.cuh"
#include "cluster_reduce.cuh"
#include "cluster_sweeps.cuh"

namespace opd {
namespace cuda {

#endif  // OPD_HAS_CLUSTERS

template <class F, bool kStatistics>
__global__ void __launch_bounds__(32 * (kMaxRowWarps + kOtherWarps), 1)
    forward_grad_cluster_kernel(const __grid_constant__ ClusterArgs args,
                                const __grid_constant__ F functor) {
#if OPD_HAS_CLUSTERS
  const BlockView<F, kStatistics> block(args);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < args.plan.ring; ++slot) {
      init(block.full(slot));
      init(block.empty(slot), args.plan.warps);
    }
    for (int i = 0; i < kExchangeKinds; ++i) {
      const Exchange kind = static_cast<Exchange>(i);
      init(block.gathered(kind), args.plan.warps);
      // signals of the blocks themselves, or bytes of theirs that one thread expects
      init(block.received(kind), kind == kHeadExchange ? args.plan.cluster : 1);
      init(block.published(kind));
    }
    fence_barrier_init();
  }
  if constexpr (F::kNeedsThreshold) {
    if (block.warp < 2) block.head_bins(block.warp)->clear(block.lane);
  }
  // nobody stores into a block whose barriers are not there yet
  sync_cluster();
  if (block.warp < args.plan.warps) {
    Sweeper<F, kStatistics>(block, functor).run();
  } else if (block.warp == args.plan.warps) {
    Reducer<F, kStatistics>(block, functor).run();
  } else {
    load_rows(block);
  }
  // ... or that has left
  sync_cluster();
#else
  (void)args, (void)functor;
#endif
}

}  // namespace cuda
}  // namespace opd
