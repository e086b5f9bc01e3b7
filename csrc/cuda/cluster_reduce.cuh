// SPDX-License-Identifier: Apache-2.0
// The warp of a block that adds up. Part of divergence_cluster.cuh.
//
// Of each kind of exchange there is one buffer: a block sends its log-sum-exps of a row only after
// every block has sent its terms of the row before, and so has read the log-sum-exps of that row;
// likewise for the other kinds, and for the warps within a block. A row does no exchange of a kind
// twice: a fast block's second one would reach a slow block that has not read the first. The search
// for a head does, but sends nothing: it reads what stays where it is, cluster_head.cuh.
#pragma once

namespace opd {
namespace cuda {

template <class F, bool kStatistics>
class Reducer {
 public:
  __device__ Reducer(const BlockView<F, kStatistics>& block, const F& functor)
      : block_(block),
        args_(block.args),
        base_(functor),
        functor_(functor),
        lane_(block.lane),
        rank_(static_cast<int>(cluster_rank())) {}

  __device__ void run() {
    RowsOfCluster rows(args_, lane_);
    while (true) {
      row_ = rows.next([&](int64_t row) { skip(row); });
      if (row_ >= args_.num_tokens) return;
      reduce_lse();
      if constexpr (F::kNeedsThreshold) find_head();
      if constexpr (F::kRowSums > 0) reduce_row_sums();
      reduce_terms();
    }
  }

 private:
  using View = BlockView<F, kStatistics>;

  // Each lane's values of one warp, then of one block; combine(values) leaves the total in every
  // lane.
  template <Exchange kKind, class Combine>
  __device__ __forceinline__ void exchange(double* values, const double* identity,
                                           Combine&& combine) {
    constexpr int kCount = View::count_of(kKind), kFirst = View::first_of(kKind);
    const uint32_t parity = parity_ >> kKind & 1u;
    parity_ ^= 1u << kKind;
    wait(block_.gathered(kKind), parity);
    const int warps = args_.plan.warps, cluster = args_.plan.cluster;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = lane_ < warps ? block_.partials(lane_)[kFirst + k] : identity[k];
    }
    combine(values);
    if (cluster == 1) return;
    if (lane_ == 0) expect_bytes(block_.received(kKind), 8u * kCount * cluster);
    if (lane_ < cluster) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        store_in_block(block_.inbox(rank_) + kFirst + k, values[k], block_.received(kKind), lane_);
      }
    }
    wait_for_cluster(block_.received(kKind), parity);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      values[k] = lane_ < cluster ? block_.inbox(lane_)[kFirst + k] : identity[k];
    }
    combine(values);
  }

  __device__ void publish(Exchange kind) {
    __syncwarp();
    if (lane_ == 0) arrive(block_.published(kind));
  }

  // Of one lane each; in the end of all, in every lane.
  __device__ static void combine_sums(const Factor& factor, double* values) {
    const double largest = reduce_warp(values[0], Max());
    const double exponent = (values[0] - largest) * static_cast<double>(factor.exponents);
    // equal infinities included
    const double scale = values[0] == largest ? 1.0 : ::exp2(exponent);
    values[1] = reduce_warp(values[1] * scale, Sum());
    values[0] = largest;
  }

  __device__ static double first_column(double column, bool counts) {
    struct Min {
      __device__ double operator()(double a, double b) const { return a < b ? a : b; }
    };
    return reduce_warp(counts ? column : kNoColumn, Min());
  }

  __device__ void reduce_lse() {
    student_ = block_.factor(args_.student, row_), teacher_ = block_.factor(args_.teacher, row_);
    double values[View::kLseValues];
    constexpr double kNone = -std::numeric_limits<double>::infinity();
    const double identity[6] = {kNone, 0, kNone, 0, kNoColumn, kNoColumn};
    exchange<kLseExchange>(values, identity, [&](double* v) {
      const double student = v[0], teacher = v[2];
      combine_sums(student_, v);
      combine_sums(teacher_, v + 2);
      if constexpr (kStatistics) {
        v[4] = first_column(v[4], student == v[0]), v[5] = first_column(v[5], teacher == v[2]);
      }
    });
    const RowLaws laws = laws_of(student_, teacher_, {values[0], values[1]}, {values[2], values[3]},
                                 &student_lse_, &teacher_lse_);
    if (lane_ == 0) *block_.laws() = laws;
    teacher_largest_ = static_cast<float>(values[2]);
    publish(kLseExchange);
    if constexpr (kStatistics) {
      agree_ = values[4] == values[5];
      if (rank_ == 0) look_up_ids();
    }
  }

  __device__ void find_head() {
    const RowLaws::Side& teacher = block_.laws()->teacher;
    ClusterHeadSearch search(base_.head_mass, log_probability(teacher_largest_, teacher),
                             probability(teacher_largest_, teacher), args_.vocab_size);
    while (true) {
      if (lane_ == 0) *block_.head() = search.range();
      publish(kHeadExchange);
      if (search.is_over()) return;
      const uint32_t turn = parity_ >> kHeadExchange & 1u;
      parity_ ^= 1u << kHeadExchange;
      wait(block_.gathered(kHeadExchange), turn);
      const int cluster = args_.plan.cluster;
      block_.head_bins(turn)->add_up(lane_);
      if (cluster > 1) {
        if (lane_ < cluster) arrive_in_block(block_.received(kHeadExchange), lane_);
        wait_for_cluster(block_.received(kHeadExchange), turn);
      }
      block_.head_bins(turn ^ 1)->clear(lane_);
      uint64_t above;
      const int bin =
          find_bin(block_.head_bins(turn), rank_, cluster, search.room(), lane_, &above);
      search.narrow(bin, above);
    }
  }

  __device__ void reduce_row_sums() {
    constexpr double kZeros[F::kRowSums] = {};
    double sums[F::kRowSums];
    exchange<kRowSumExchange>(sums, kZeros, [](double* v) {
#pragma unroll
      for (int k = 0; k < F::kRowSums; ++k) v[k] = reduce_warp(v[k], Sum());
    });
    if constexpr (std::is_same_v<F, Renyi>) {
      // a mass that float32 cannot hold still has a logarithm; NaN stays, it is no matter of range
      const bool out_of_range = sums[1] < 1e-25 || sums[1] > 1e37;
      if (out_of_range) {
        if (lane_ == 0) *block_.again() = 1;
        publish(kRowSumExchange);
        exchange<kAgainExchange>(sums + 1, kZeros,
                                 [](double* mass) { *mass = reduce_warp(*mass, Sum()); });
        publish_functor(sums, kAgainExchange);
        return;
      }
    }
    if (lane_ == 0) *block_.again() = 0;
    publish_functor(sums, kRowSumExchange);
  }

  __device__ void publish_functor(const double* sums, Exchange kind) {
    functor_ = base_.with_row_sums(sums);
    if (lane_ == 0) *block_.functor() = functor_;
    publish(kind);
  }

  __device__ void reduce_terms() {
    constexpr double kZeros[View::kTermValues] = {};
    double sums[View::kTermValues];
    exchange<kTermExchange>(sums, kZeros, [](double* v) {
#pragma unroll
      for (int k = 0; k < View::kTermValues; ++k) v[k] = reduce_warp(v[k], Sum());
    });
    const float coefficient = block_.coefficient(row_);
    const float weight = args_.token_weights ? args_.token_weights[row_] : 1.0f;
    if (lane_ == 0) {
      GradScalars scalars;
      scalars.grad_sum = args_.centred ? 0.0f : static_cast<float>(sums[1]);
      // a side without a law leaves no gradient; a dterm that only multiplies by it may not show
      // that
      const double gap = student_lse_ - teacher_lse_;
      if (!(gap - gap == 0.0)) scalars.grad_sum = std::numeric_limits<float>::quiet_NaN();
      scalars.scale = weight * static_cast<float>(student_.factor) * coefficient;
      scalars.zero = coefficient == 0.0f;
      *block_.grad_scalars() = scalars;
    }
    publish(kTermExchange);
    if (rank_ == args_.plan.cluster - 1) zero_columns(row_);
    if (rank_ != 0 || lane_ != 0) return;
    const double value =
        coefficient == 0.0f ? 0.0 : static_cast<double>(coefficient) * functor_.value(sums[0]);
    args_.loss[row_] = static_cast<float>(static_cast<double>(weight) * value);
    if constexpr (kStatistics) {
      for (int k = 0; k < 4; ++k) put(OPD_STATISTIC_STUDENT_ENTROPY + k, sums[2 + k]);
      const bool defined = student_lse_ == student_lse_ && teacher_lse_ == teacher_lse_;
      const double agree = agree_ ? 1.0 : 0.0;
      put(OPD_STATISTIC_TOP1_AGREEMENT,
          defined ? agree : std::numeric_limits<double>::quiet_NaN());
      put(OPD_STATISTIC_STUDENT_LSE, student_lse_);
      put(OPD_STATISTIC_TEACHER_LSE, teacher_lse_);
      for (int k = 0; k < 4; ++k) put(OPD_STATISTIC_STUDENT_LOGPROBS + k, of_ids_[k]);
    }
  }

  __device__ void put(int statistic, double value) {
    static_assert(OPD_STATISTIC_REVERSE_KL == 3, "the order of the sums of a sweep");
    args_.statistics[statistic * args_.num_tokens + row_] = static_cast<float>(value);
  }

  // Before this block's terms are sent: a gradient in the place of the logits is written only then.
  __device__ void look_up_ids() {
    const auto log_probability = [&](const SideArgs& side, const Factor& factor, double lse,
                                     int64_t id) {
      return static_cast<double>(side.logits[row_ * side.stride + id]) * factor.factor - lse;
    };
    const auto is_here = [&](int64_t id) { return id >= 0 && id < args_.vocab_size; };
#pragma unroll
    for (int k = 0; k < 4; ++k) of_ids_[k] = 0.0;
    // an id beyond the vocabulary, the caller's error, is NaN: a kernel cannot raise
    const double undefined = std::numeric_limits<double>::quiet_NaN();
    if (args_.token_ids) {
      const int64_t id = args_.token_ids[row_];
      const bool here = is_here(id);
      of_ids_[0] = here ? log_probability(args_.student, student_, student_lse_, id) : undefined;
      of_ids_[1] = here ? log_probability(args_.teacher, teacher_, teacher_lse_, id) : undefined;
      // the logits have been read when a shuffle has their values; then they may be overwritten
      of_ids_[0] = __shfl_sync(kAllLanes, of_ids_[0], 0);
      of_ids_[1] = __shfl_sync(kAllLanes, of_ids_[1], 0);
    }
    if (args_.topk_ids) {
      for (int64_t k = lane_; k < args_.num_topk; k += kWarp) {
        const int64_t id = args_.topk_ids[row_ * args_.num_topk + k];
        if (id < 0) continue;
        if (!is_here(id)) {
          of_ids_[2] = of_ids_[3] = undefined;
          continue;
        }
        of_ids_[2] += ::exp(log_probability(args_.student, student_, student_lse_, id));
        of_ids_[3] += ::exp(log_probability(args_.teacher, teacher_, teacher_lse_, id));
      }
      of_ids_[2] = reduce_warp(of_ids_[2], Sum());
      of_ids_[3] = reduce_warp(of_ids_[3], Sum());
    }
  }

  // Columns vocab_size .. grad_width.
  __device__ void zero_columns(int64_t row) {
    for (int64_t v = args_.vocab_size + lane_; v < args_.grad_width; v += kWarp) {
      const int64_t at = row * args_.grad.row_stride + v;
      if (args_.grad.dtype == OPD_FLOAT32) {
        static_cast<float*>(args_.grad.data)[at] = 0.0f;
      } else {
        static_cast<uint16_t*>(args_.grad.data)[at] = 0;
      }
    }
  }

  // A row of weight 0: the sweeping warps zero its columns.
  __device__ void skip(int64_t row) {
    if (rank_ == args_.plan.cluster - 1) zero_columns(row);
    if (rank_ != 0) return;
    if (lane_ == 0) args_.loss[row] = 0.0f;
    if (kStatistics && lane_ < OPD_NUM_STATISTICS) {
      args_.statistics[lane_ * args_.num_tokens + row] = 0.0f;
    }
  }

  const View& block_;
  const ClusterArgs& args_;
  const F& base_;
  F functor_;
  const int lane_, rank_;
  int64_t row_ = 0;
  uint32_t parity_ = 0;  // a bit per kind of exchange
  Factor student_{}, teacher_{};
  double student_lse_ = 0, teacher_lse_ = 0;
  double of_ids_[4] = {};
  float teacher_largest_ = 0;
  bool agree_ = false;
};

}  // namespace cuda
}  // namespace opd
