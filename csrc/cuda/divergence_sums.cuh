// SPDX-License-Identifier: Apache-2.0
// What a block adds up over a row before the terms: log-sum-exps, the sums that terms need first,
// single columns. kId >= 0 is the kernel of that divergence alone, without biases, scales,
// softcaps, targets, statistics; kId < 0 that of every call, which looks at the ids as it runs.
#pragma once

#include <type_traits>

#include "divergence_head.cuh"
#include "divergence_summands.cuh"
#include "laws.cuh"

namespace opd {
namespace cuda {

template <int kId>
struct RowSums {
  static constexpr bool kGeneral = kId < 0;
  // in flight per thread: log-sum-exps wait for memory, terms for arithmetic and registers
  static constexpr int kVectorsOfLse = kGeneral ? 1 : 2;

  const Call& call;
  int64_t row;
  const SharedRow& shared;
  float weight;
  Laws<kGeneral> laws;

  __device__ RowSums(const Call& call, int64_t row, const SharedRow& shared, float weight)
      : call(call), row(row), shared(shared), weight(weight), laws(call, row) {}

  __device__ __forceinline__ double* component_state(int j) const {
    return shared.state + kStateSize + j * kComponentState;
  }
  __device__ __forceinline__ float coefficient(int j) const {
    const float* const coefficients = static_cast<const float*>(call.components[j].coefficients);
    return coefficients ? coefficients[row] : 1.0f;
  }
  __device__ __forceinline__ bool is_cross_entropy(int j) const {
    return kGeneral && call.components[j].divergence == kCrossEntropy;
  }
  // whether anything but labels has a part in the loss
  __device__ __forceinline__ bool reads_teacher() const {
    bool any = false;
    for (int j = 0; j < num_components(); ++j) {
      any = any || (!is_cross_entropy(j) && coefficient(j) != 0.0f);
    }
    return any;
  }
  __device__ __forceinline__ int num_components() const {
    return kGeneral ? call.num_components : 1;
  }
  __device__ __forceinline__ bool is_live_mixture() const {
    return kGeneral && call.live_target && call.target == OPD_TARGET_MIXTURE;
  }
  __device__ __forceinline__ bool with_statistics() const {
    return kGeneral && call.with_statistics;
  }

  __device__ __forceinline__ double block_sum(double lane) const {
    return reduce_block(lane, shared.scratch, 0.0, Sum());
  }
  // the block's sum, added to the state by one thread; a barrier comes before anybody reads it
  __device__ __forceinline__ void add_to(double* target, double lane) const {
    const double sum = block_sum(lane);
    if (threadIdx.x == 0) *target += sum;
  }

  // Entries of four columns, a mixture not yet mixed.
  __device__ __forceinline__ static void entries_of(const LawValues& values,
                                                    const Shifts<float>& shifts,
                                                    Entry<float> (&e)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) e[i] = entry_of(values.student[i], values.target[i], shifts);
  }

  // The teacher's side becomes the mixture, where that is the target.
  __device__ __forceinline__ void mix(Entry<float> (&e)[kVector], float (&through)[kVector]) const {
    if (!kGeneral || call.target != OPD_TARGET_MIXTURE) return;
    const float weight = call.mixture_weights[row];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (weight == 1.0f) {
        through[i] = 0.0f;
      } else if (weight == 0.0f) {
        // the logarithm of 0 times something is no number
        e[i].lp = e[i].lq, e[i].p = e[i].q, e[i].gap = 0.0f, e[i].lp_low = 0.0f;
        through[i] = 1.0f;
      } else {
        e[i] = mixed_entry(e[i], weight, 1.0f - weight, &through[i]);
      }
    }
  }

  // -- log-sum-exps -------------------------------------------------------------------------------

  __device__ __forceinline__ void add_lse() const {
    RunningLargest student, teacher;
    const auto add = [&](auto with_column) {
      for_each_vector<kVectorsOfLse>(
          laws, call.vocab_size, false, false, [&](int column, int count, const LawBits& bits) {
            const LawValues values = laws.widen(bits, column, count);
            student.template add<decltype(with_column)::value>(values.student, column);
            teacher.template add<decltype(with_column)::value>(values.target, column);
          });
    };
    if (with_statistics()) {
      add(std::true_type{});
    } else {
      add(std::false_type{});
    }
    const auto merge = [&](const RunningLargest& mine, int largest, int argmax, int sum) {
      merge_largest(mine, with_statistics(), call.first_column, shared.scratch,
                    shared.state + largest, shared.state + argmax, shared.state + sum);
    };
    merge(student, kStudentLargest, kStudentArgmax, kStudentLse);
    merge(teacher, kTeacherLargest, kTeacherArgmax, kTeacherLse);
    __syncthreads();
  }

  __device__ __forceinline__ void close_lse() const {
    if (threadIdx.x == 0) {
      double* const s = shared.state;
      s[kStudentLse] = s[kStudentLargest] + ::log(s[kStudentLse]);
      s[kTeacherLse] = s[kTeacherLargest] + ::log(s[kTeacherLse]);
    }
    __syncthreads();
  }

  // -- what terms need first ----------------------------------------------------------------------

  // fn(entries, count) for the columns of this thread, the target as the terms see it
  template <class Fn>
  __device__ __forceinline__ void for_each_entries(bool descending, Fn&& fn) const {
    const Shifts<float> shifts(shared.state);
    for_each_vector<1>(laws, call.vocab_size, descending, false,
                       [&](int column, int count, const LawBits& bits) {
                         Entry<float> e[kVector];
                         float through[kVector];
                         entries_of(laws.widen(bits, column, count), shifts, e);
                         mix(e, through);
                         fn(e, count);
                       });
  }

  // The head of the target's law, for the components that need it. The teacher's own is found
  // without the student's logits.
  __device__ __forceinline__ void find_thresholds() const {
    if constexpr (kGeneral || kId == OPD_ADAPTIVE_KL) {
      const Shifts<float> shifts(shared.state);
      const bool is_mixture = kGeneral && call.target == OPD_TARGET_MIXTURE;
      const bool is_teacher = !kGeneral || call.target == OPD_TARGET_TEACHER;
      float unused;
      // of a mixture nobody knows it
      const float largest =
          is_mixture ? 1.0f
                     : log_probability(static_cast<float>(shared.state[kTeacherLargest]),
                                       shifts.teacher, &unused);
      const float alone = is_mixture ? 0.0f : exp_nonpositive(largest);
      for (int j = 0; j < num_components(); ++j) {
        const opd_divergence_component_t& component = call.components[j];
        if (!needs_threshold(component) || coefficient(j) == 0.0f) continue;
        const RowHeadSearch search(component.param0, largest, alone, call.vocab_size);
        const float threshold = head_threshold(search, shared, [&](LaneMasses& lane) {
          if (is_teacher) return add_teacher_masses(shifts.teacher, lane);
          for_each_entries(false, [&](const Entry<float>(&e)[kVector], int count) {
#pragma unroll
            for (int i = 0; i < kVector; ++i) {
              if (i < count) lane.add(e[i].lp, [&] { return e[i].p; });
            }
          });
        });
        if (threadIdx.x == 0) component_state(j)[kThreshold] = threshold;
        __syncthreads();
      }
    }
  }

  // The same p as in the entries.
  __device__ __forceinline__ void add_teacher_masses(const Shift<float>& shift,
                                                     LaneMasses& lane) const {
    const float least = least_logit(lane.range(), 1.0f, shift.high);
    for_each_vector<2>(TeacherLaw<kGeneral>{laws.teacher}, call.vocab_size, false, false,
                       [&](int column, int count, const uint4& bits) {
                         float z[kVector], unused[kVector];
                         laws.teacher.widen(bits, column, count, z, unused);
                         const float largest =
                             detail::max_device(detail::max_device(z[0], z[1]),
                                                detail::max_device(z[2], z[3]));
                         if (!(largest >= least)) return;
#pragma unroll
                         for (int i = 0; i < kVector; ++i) {
                           float low;
                           const float lp = log_probability(z[i], shift, &low);
                           if (i < count) lane.add(lp, [&] { return exp_nonpositive(lp); });
                         }
                       });
  }

  __device__ __forceinline__ void add_row_sums() const {
    for (int j = 0; j < num_components(); ++j) {
      if (is_cross_entropy(j) || coefficient(j) == 0.0f) continue;
      visit<kId>(call.components[j], [&](auto functor) {
        using F = decltype(functor);
        if constexpr (F::kRowSums > 0) add_row_sums_of(functor, component_state(j));
      });
    }
    __syncthreads();
  }

  template <class F>
  __device__ __forceinline__ void add_row_sums_of(F f, double* state) const {
    if constexpr (F::kNeedsThreshold) f = f.with_threshold(state[kThreshold]);
    float lanes[F::kRowSums] = {};
    for_each_entries(true, [&](const Entry<float>(&e)[kVector], int) {
      float sums[F::kRowSums] = {};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float own[F::kRowSums];
        f.row_sums(e[i], own);
#pragma unroll
        for (int k = 0; k < F::kRowSums; ++k) sums[k] += own[k];
      }
#pragma unroll
      for (int k = 0; k < F::kRowSums; ++k) lanes[k] += sums[k];
    });
    double totals[F::kRowSums];
#pragma unroll
    for (int k = 0; k < F::kRowSums; ++k) totals[k] = block_sum(lanes[k]);
    if constexpr (std::is_same_v<F, Renyi>) {
      // where float32 has left its range the logarithm is still an ordinary number; NaN stays
      if ((totals[1] < 1e-25) | (totals[1] > 1e37)) totals[1] = mass_in_double(f.alpha);
    }
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int k = 0; k < F::kRowSums; ++k) state[kRowSum + k] += totals[k];
  }

  __device__ __forceinline__ double mass_in_double(double alpha) const {
    double lane = 0.0;
    for_each_entries(true, [&](const Entry<float>(&e)[kVector], int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const double lp = static_cast<double>(e[i].lp) + static_cast<double>(e[i].lp_low);
        const double lq = static_cast<double>(e[i].lq) + static_cast<double>(e[i].lq_low);
        lane += e[i].absent() ? 0.0 : ::exp(alpha * lp + (1.0 - alpha) * lq);
      }
    });
    return block_sum(lane);
  }

  // -- single columns -----------------------------------------------------------------------------

  // fn(k, log q, log p) for the ids of this row that are columns of this call, spread over the
  // threads; a negative one may stand for none. An id beyond the vocabulary, the caller's error, is
  // NaN: a kernel cannot raise.
  template <class Fn>
  __device__ __forceinline__ void for_each_id(const int64_t* ids, int64_t count, bool may_be_none,
                                              Fn&& fn) const {
    const Shifts<float> shifts(shared.state);
    for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
      const int64_t id = ids[row * count + k], column = id - call.first_column;
      if (id >= 0 && column >= 0 && column < call.vocab_size) {
        const LawValues z = laws.at(static_cast<int>(column), 1);
        fn(k, (z.student[0] - shifts.student.high) - shifts.student.low,
           (z.target[0] - shifts.teacher.high) - shifts.teacher.low);
      } else if ((call.steps & kWholeRows) && (id >= 0 || !may_be_none)) {
        const float undefined = std::numeric_limits<float>::quiet_NaN();
        fn(k, undefined, undefined);
      }
    }
  }

  __device__ __forceinline__ float label_weight(int64_t k) const {
    return call.label_weights ? call.label_weights[row * call.num_labels + k] : 1.0f;
  }

  // the coefficients of cross_entropy, summed
  __device__ __forceinline__ float label_coefficient() const {
    float sum = 0.0f;
    for (int j = 0; j < num_components(); ++j) sum += is_cross_entropy(j) ? coefficient(j) : 0.0f;
    return sum;
  }

  __device__ __forceinline__ void add_ids() const {
    double lq_lane = 0.0, lp_lane = 0.0, q_lane = 0.0, p_lane = 0.0, cross_entropy = 0.0;
    if (call.labels) {
      for_each_id(call.labels, call.num_labels, true, [&](int64_t k, float lq, float) {
        const float weight = label_weight(k);
        if (weight != 0.0f) cross_entropy -= static_cast<double>(weight) * lq;
      });
      add_to(shared.state + kCrossEntropy_, cross_entropy);
    }
    if (call.with_statistics && call.token_ids) {
      for_each_id(call.token_ids, 1, false, [&](int64_t, float lq, float lp) {
        lq_lane += lq;
        lp_lane += lp;
      });
      add_to(shared.state + kStudentLogprob, lq_lane);
      add_to(shared.state + kTeacherLogprob, lp_lane);
    }
    if (call.with_statistics && call.topk_ids) {
      for_each_id(call.topk_ids, call.num_topk, true, [&](int64_t, float lq, float lp) {
        q_lane += ::exp(static_cast<double>(lq));
        p_lane += ::exp(static_cast<double>(lp));
      });
      add_to(shared.state + kStudentTopkMass, q_lane);
      add_to(shared.state + kTeacherTopkMass, p_lane);
    }
  }
};

}  // namespace cuda
}  // namespace opd
