// SPDX-License-Identifier: Apache-2.0
// One row of a divergence by one thread block, step by step; csrc/core/divergence.cpp is the same on a
// CPU. Each step reads the row once: two reads for the loss, one more for each divergence that needs
// row sums first, one more for the gradient. The gradient is formed from the logits again: leaving
// dterm and q in memory between, as the CPU does, would move 36 bytes per column in all against 28.
// Every other step walks the row backwards, from the end that the L2 cache still holds.
//
// A thread keeps float32 sums of its columns, which are the same whatever the grid; blocks add them
// up in double, in one order. kId >= 0 is the kernel of that divergence alone, without biases, scales,
// softcaps, targets, statistics; kId < 0 that of every call, which looks at the ids as it runs.
#pragma once

#include <type_traits>

#include "divergence_head.cuh"
#include "divergence_summands.cuh"
#include "laws.cuh"

namespace opd {
namespace cuda {

__device__ __forceinline__ void* grad_row(const Call& call, int64_t row) {
  return static_cast<char*>(call.grad.data) + row * call.grad.row_stride * size_of(call.grad.dtype);
}

__device__ inline void zero_columns(const Call& call, int64_t row, int begin, int end) {
  void* const data = grad_row(call, row);
  for (int64_t i = begin + static_cast<int64_t>(threadIdx.x); i < end; i += blockDim.x) {
    if (call.grad.dtype == OPD_FLOAT32) {
      static_cast<uint32_t*>(data)[i] = 0;
    } else {
      static_cast<uint16_t*>(data)[i] = 0;
    }
  }
}

template <int kId>
struct RowKernel {
  static constexpr bool kGeneral = kId < 0;
  static constexpr int kVectors = kGeneral ? 1 : 2;

  const Call& call;
  int64_t row;
  const SharedRow& shared;
  float weight;
  Laws<kGeneral> laws;

  __device__ RowKernel(const Call& call, int64_t row, const SharedRow& shared, float weight)
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
  __device__ __forceinline__ int num_components() const { return kGeneral ? call.num_components : 1; }
  __device__ __forceinline__ bool is_live_mixture() const {
    return kGeneral && call.live_target && call.target == OPD_TARGET_MIXTURE;
  }
  __device__ __forceinline__ bool is_live_geometric() const {
    return kGeneral && call.live_target && call.target == OPD_TARGET_GEOMETRIC &&
           call.target_student != 0.0f && reads_teacher();
  }
  __device__ __forceinline__ bool with_statistics() const { return kGeneral && call.with_statistics; }

  __device__ __forceinline__ double block_sum(double lane) const {
    return reduce_block(lane, shared.scratch, 0.0, Sum());
  }
  // the block's sum, added to the state by one thread; a barrier comes before anybody reads it
  __device__ __forceinline__ void add_to(double* target, double lane) const {
    const double sum = block_sum(lane);
    if (threadIdx.x == 0) *target += sum;
  }

  // Entries of four columns, a mixture not yet mixed.
  __device__ __forceinline__ static void entries_of(const LawValues& values, const Shifts<float>& shifts,
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

  // -- log-sum-exps ----------------------------------------------------------------------------------

  __device__ __forceinline__ void add_lse() const {
    RunningLargest student, teacher;
    const auto add = [&](auto with_column) {
      for_each_vector<kVectors>(
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

  // -- what terms need first -------------------------------------------------------------------------

  // fn(entries, count) for the columns of this thread, the target as the terms see it
  template <class Fn>
  __device__ __forceinline__ void for_each_entries(bool descending, Fn&& fn) const {
    const Shifts<float> shifts(shared.state);
    for_each_vector<kVectors>(laws, call.vocab_size, descending, false,
                              [&](int column, int count, const LawBits& bits) {
                                Entry<float> e[kVector];
                                float through[kVector];
                                entries_of(laws.widen(bits, column, count), shifts, e);
                                mix(e, through);
                                fn(e, count);
                              });
  }

  __device__ __forceinline__ void find_thresholds() const {
    if constexpr (kGeneral) {
      for (int j = 0; j < call.num_components; ++j) {
        const opd_divergence_component_t& component = call.components[j];
        if (!needs_threshold(component) || coefficient(j) == 0.0f) continue;
        const float threshold =
            head_threshold(component.param0, shared, [&](auto&& fn) { for_each_entries(false, fn); });
        if (threadIdx.x == 0) component_state(j)[kThreshold] = threshold;
        __syncthreads();
      }
    }
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
      // where the float32 sum has left its range the logarithm is still an ordinary number; NaN stays
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

  // -- single columns --------------------------------------------------------------------------------

  // fn(k, log q, log p) for the ids of this row that are columns of this call, spread over the threads.
  // An id beyond the vocabulary, the caller's error, is NaN: a kernel cannot raise.
  template <class Fn>
  __device__ __forceinline__ void for_each_id(const int64_t* ids, int64_t count, Fn&& fn) const {
    const Shifts<float> shifts(shared.state);
    for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
      const int64_t id = ids[row * count + k], column = id - call.first_column;
      if (id >= 0 && column >= 0 && column < call.vocab_size) {
        const LawValues z = laws.at(static_cast<int>(column), 1);
        fn(k, (z.student[0] - shifts.student.high) - shifts.student.low,
           (z.target[0] - shifts.teacher.high) - shifts.teacher.low);
      } else if (id >= call.vocab_size && (call.steps & kWholeRows)) {
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
      for_each_id(call.labels, call.num_labels, [&](int64_t k, float lq, float) {
        const float weight = label_weight(k);
        if (weight != 0.0f) cross_entropy -= static_cast<double>(weight) * lq;
      });
      add_to(shared.state + kCrossEntropy_, cross_entropy);
    }
    if (call.with_statistics && call.token_ids) {
      for_each_id(call.token_ids, 1, [&](int64_t, float lq, float lp) {
        lq_lane += lq;
        lp_lane += lp;
      });
      add_to(shared.state + kStudentLogprob, lq_lane);
      add_to(shared.state + kTeacherLogprob, lp_lane);
    }
    if (call.with_statistics && call.topk_ids) {
      for_each_id(call.topk_ids, call.num_topk, [&](int64_t, float lq, float lp) {
        q_lane += ::exp(static_cast<double>(lq));
        p_lane += ::exp(static_cast<double>(lp));
      });
      add_to(shared.state + kStudentTopkMass, q_lane);
      add_to(shared.state + kTeacherTopkMass, p_lane);
    }
  }

  // -- terms and gradient ------------------------------------------------------------------------------

  // What the terms of the loss are over four columns.
  struct Terms {
    float dterm[kVector] = {};    // of the whole loss
    float teacher[kVector] = {};  // dterm_teacher of it, where a geometric target is live
    float summed = 0.0f;          // dterm summed, but for what sums to 0 anyway
    float statistics[4] = {};     // entropies and KLs of both laws
  };

  __device__ __forceinline__ static void add_statistics(const Entry<float> (&e)[kVector], Terms* terms) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      terms->statistics[0] -= select(e[i].q == 0.0f, 0.0f, e[i].q * e[i].lq);
      terms->statistics[1] -= select(e[i].p == 0.0f, 0.0f, e[i].p * e[i].lp);
      terms->statistics[2] += ForwardKl{}.term(e[i]);
      terms->statistics[3] += ReverseKl{}.term(e[i]);
    }
  }

  template <class F>
  __device__ __forceinline__ void add_component(const F& f, float c, bool textbook, bool with_terms, bool is_centred,
                                const Entry<float> (&e)[kVector], const float (&through)[kVector],
                                Terms* terms, float* term_lane) const {
    float sum = 0.0f, term = 0.0f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (with_terms) term += f.term(e[i]);
      float own = dterm_of(f, e[i], textbook);
      if constexpr (kGeneral) {
        if (call.live_target) {
          const float teacher = f.dterm_teacher(e[i]);
          if (call.target == OPD_TARGET_MIXTURE) {
            own += through[i] * teacher;
          } else {
            terms->teacher[i] += c * teacher;
          }
        }
      }
      sum += own;
      terms->dterm[i] += c * own;
    }
    if (with_terms) *term_lane += term;
    if (!is_centred) terms->summed += c * sum;
  }

  // fn(column, count, values, entries, terms) for the columns of this thread; the terms themselves go
  // to term_lane, that of component j to term_lane[j * blockDim.x].
  template <class WithTerms, class Fn>
  __device__ __forceinline__ void for_each_terms(WithTerms with_terms, bool descending, bool barrier,
                                 float* term_lane, Fn&& fn) const {
    const Shifts<float> shifts(shared.state);
    const auto walk = [&](auto&& add_components) {
      for_each_vector<kVectors>(
          laws, call.vocab_size, descending, barrier,
          [&](int column, int count, const LawBits& bits) {
            const LawValues values = laws.widen(bits, column, count);
            Entry<float> e[kVector];
            float through[kVector];
            entries_of(values, shifts, e);
            Terms terms;
            if (kGeneral && with_terms && call.with_statistics) add_statistics(e, &terms);
            mix(e, through);
            add_components(e, through, &terms);
            fn(column, count, values, e, terms);
          });
    };
    if constexpr (kGeneral) {
      walk([&](const auto& e, const auto& through, Terms* terms) {
        for (int j = 0; j < call.num_components; ++j) {
          const float c = coefficient(j);
          if (c == 0.0f) continue;
          const bool centred = is_centred(call.components[j]) && !is_live_mixture();
          visit<kId>(call.components[j], [&](auto functor) {
            using F = decltype(functor);
            const F f = kept_functor<F>(shared, j);
            add_component(f, c, uses_textbook(f), with_terms, centred, e, through, terms,
                          term_lane + j * blockDim.x);
          });
        }
      });
    } else {
      const float c = coefficient(0);
      const bool centred = is_centred(call.components[0]);
      const auto f = with_sums(functor_of<kId>(call.components[0].param0, call.components[0].param1),
                               component_state(0));
      const bool textbook = uses_textbook(f);
      walk([&](const auto& e, const auto& through, Terms* terms) {
        add_component(f, c, textbook, with_terms, centred, e, through, terms, term_lane);
      });
    }
  }

  // What a gradient needs besides the terms.
  struct Gradient {
    float sum_high, sum_low;  // of dterm, the labels' part included
    float teacher_sum;
    float label_coefficient;
    float scale;
    void* data;
    bool aligned;
  };

  // Sums over the row into the state, or, from a finished state, the gradient. The plain kernels have
  // a loop for each: there `with_terms` is a constant.
  template <class WithTerms>
  __device__ __forceinline__ void walk_terms(WithTerms with_terms, const Gradient& gradient) const {
    float term = 0.0f, grad_lane = 0.0f, teacher_lane = 0.0f, statistics[4] = {};
    float* term_lane = &term;
    if constexpr (kGeneral) {
      term_lane = shared.lanes + threadIdx.x;
      for (int j = 0; with_terms && j < call.num_components; ++j) {
        term_lane[j * blockDim.x] = 0.0f;
      }
    }
    for_each_terms(with_terms, with_terms, !with_terms && call.grad_is_narrower, term_lane,
                   [&](int column, int count, const LawValues& values,
                       const Entry<float>(&e)[kVector], const Terms& terms) {
                     if (!with_terms) {
                       return store_gradient(gradient, column, count, values, e, terms);
                     }
                     grad_lane += terms.summed;
                     if constexpr (kGeneral) {
#pragma unroll
                       for (int i = 0; i < kVector; ++i) teacher_lane += terms.teacher[i];
#pragma unroll
                       for (int k = 0; k < 4; ++k) statistics[k] += terms.statistics[k];
                     }
                   });
    if (with_terms) close_terms(term_lane, grad_lane, teacher_lane, statistics);
  }

  __device__ __forceinline__ void close_terms(const float* term_lane, float grad_lane, float teacher_lane,
                              const float (&statistics)[4]) const {
    for (int j = 0; j < num_components(); ++j) {
      add_to(component_state(j) + kTermSum, term_lane[j * blockDim.x]);
    }
    add_to(shared.state + kGradSum, grad_lane);
    if constexpr (kGeneral) {
      if (call.live_target) add_to(shared.state + kTeacherGradSum, teacher_lane);
      if (call.with_statistics) {
#pragma unroll
        for (int k = 0; k < 4; ++k) add_to(shared.state + kStudentEntropy + k, statistics[k]);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void store_gradient(const Gradient& gradient, int column, int count,
                                 const LawValues& values, const Entry<float> (&e)[kVector],
                                 const Terms& terms) const {
    float out[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      out[i] = (terms.dterm[i] - e[i].q * gradient.sum_high) - e[i].q * gradient.sum_low;
    }
    if constexpr (kGeneral) {
      if (call.live_target && call.target == OPD_TARGET_GEOMETRIC && reads_teacher()) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          out[i] += call.target_student * (terms.teacher[i] - e[i].p * gradient.teacher_sum);
        }
      }
      if (gradient.label_coefficient != 0.0f) subtract_labels(gradient, column, out);
      if (call.student.softcap != 0.0f) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) out[i] *= laws.student.softcap_slope(values.uncapped[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) out[i] *= gradient.scale;
    const int32_t dtype = call.grad.dtype;
    store_bits(gradient.data, dtype, gradient.aligned, column, count, narrow(out, dtype));
  }

  __device__ __forceinline__ void subtract_labels(const Gradient& gradient, int column,
                                  float (&out)[kVector]) const {
    for (int64_t k = 0; k < call.num_labels; ++k) {
      const int64_t label = call.labels[row * call.num_labels + k];
      const int64_t at = label - call.first_column - column;
      if (label < 0 || at < 0 || at >= kVector) continue;
      const float weight = gradient.label_coefficient * label_weight(k);
#pragma unroll
      for (int i = 0; i < kVector; ++i) out[i] -= at == i ? weight : 0.0f;
    }
  }

  // what the labels take from the sum of dterm, whichever columns are here
  __device__ __forceinline__ double label_sum(float coefficient, bool* any) const {
    double lane = 0.0;
    int own = 0;
    for (int64_t k = threadIdx.x; k < call.num_labels; k += blockDim.x) {
      const float weight = label_weight(k);
      if (call.labels[row * call.num_labels + k] < 0 || weight == 0.0f) continue;
      lane += static_cast<double>(coefficient * weight);
      own = 1;
    }
    *any = reduce_block(own, reinterpret_cast<int*>(shared.scratch), 0, BitOr()) != 0;
    return block_sum(lane);
  }

  // The gradient's ingredients; false where it is 0 whatever the logits are.
  __device__ __forceinline__ bool open_gradient(Gradient* gradient) const {
    const float grad_loss = call.grad_loss ? call.grad_loss[row] : 1.0f;
    double sum = shared.state[kGradSum];
    bool has_labels = false;
    gradient->label_coefficient = 0.0f;
    if constexpr (kGeneral) {
      const float coefficient = label_coefficient();
      if (coefficient != 0.0f && call.labels) {
        sum -= label_sum(coefficient, &has_labels);
        gradient->label_coefficient = coefficient;
      }
      keep_functors(call, shared);
      __syncthreads();
    }
    const Shift<float> parts(sum);
    gradient->sum_high = parts.high, gradient->sum_low = parts.low;
    gradient->teacher_sum = static_cast<float>(shared.state[kTeacherGradSum]);
    gradient->scale = weight * grad_loss * laws.student.slope();
    gradient->data = grad_row(call, row);
    gradient->aligned = is_aligned(gradient->data, call.grad.dtype);
    return grad_loss != 0.0f && (has_labels || reads_teacher());
  }

  // -- outcome ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish() const {
    if (threadIdx.x != 0) return;
    double loss = 0.0;
    for (int j = 0; j < num_components(); ++j) {
      const float c = coefficient(j);
      if (c == 0.0f) continue;
      double value = is_cross_entropy(j) ? shared.state[kCrossEntropy_] : 0.0;
      visit<kId>(call.components[j], [&](auto functor) {
        value = with_sums(functor, component_state(j)).value(component_state(j)[kTermSum]);
      });
      loss += static_cast<double>(c) * value;
    }
    call.loss[row] = static_cast<float>(static_cast<double>(weight) * loss);
    if (kGeneral && call.statistics) write_statistics();
  }

  __device__ __forceinline__ void write_statistics() const {
    const double* const s = shared.state;
    const auto put = [&](int statistic, double value) {
      call.statistics[statistic * call.num_tokens + row] = static_cast<float>(value);
    };
    for (int k = 0; k < 4; ++k) {
      put(k, s[kStudentEntropy + k]);
      put(OPD_STATISTIC_STUDENT_LOGPROBS + k, s[kStudentLogprob + k]);
    }
    put(OPD_STATISTIC_STUDENT_LSE, s[kStudentLse]);
    put(OPD_STATISTIC_TEACHER_LSE, s[kTeacherLse]);
    const bool defined = s[kStudentLse] == s[kStudentLse] && s[kTeacherLse] == s[kTeacherLse];
    const double agree = s[kStudentArgmax] == s[kTeacherArgmax] ? 1.0 : 0.0;
    put(OPD_STATISTIC_TOP1_AGREEMENT,
        defined ? agree : std::numeric_limits<double>::quiet_NaN());
  }

  __device__ __forceinline__ void run() const {
    const unsigned steps = call.steps;
    if (steps & kLse) add_lse();
    if (steps & kCloseLse) close_lse();
    if (steps & kHead) find_thresholds();
    if (steps & kRowSums) add_row_sums();
    if constexpr (kGeneral) {
      // one loop over the terms, which has every divergence in it
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        const bool with_terms = pass == 0;
        Gradient gradient{};
        bool wanted = (steps & (with_terms ? kTerms : kGradient)) != 0;
        if (wanted && with_terms) {
          add_ids();
          keep_functors(call, shared);
          __syncthreads();
        }
        if (wanted && !with_terms) {
          wanted = open_gradient(&gradient);
          zero_columns(call, row, wanted ? call.vocab_size : 0, call.grad_width);
        }
        if (wanted) walk_terms(with_terms, gradient);
        if (with_terms && (steps & kFinish)) finish();
      }
    } else {
      if (steps & kTerms) walk_terms(std::true_type{}, Gradient{});
      if (steps & kFinish) finish();
      if (steps & kGradient) {
        Gradient gradient;
        const bool wanted = open_gradient(&gradient);
        if (wanted) walk_terms(std::false_type{}, gradient);
        zero_columns(call, row, wanted ? call.vocab_size : 0, call.grad_width);
      }
    }
  }
};

// Zeros, and what the row holds is not read.
__device__ inline void skip_row(const Call& call, int64_t row, int64_t state_size) {
  if (call.steps & kFinish) {
    for (int64_t i = threadIdx.x; call.state && i < state_size; i += blockDim.x) {
      call.state[row * state_size + i] = 0.0;
    }
    if (threadIdx.x == 0) {
      call.loss[row] = 0.0f;
      for (int k = 0; call.statistics && k < OPD_NUM_STATISTICS; ++k) {
        call.statistics[k * call.num_tokens + row] = 0.0f;
      }
    }
  }
  if (call.steps & kGradient) zero_columns(call, row, 0, call.grad_width);
}

template <int kId>
__device__ __forceinline__ void run_row(const Call& call, int64_t row, const SharedRow& shared) {
  const int64_t state_size = kStateSize + call.num_components * kComponentState;
  const float weight = call.token_weights ? call.token_weights[row] : 1.0f;
  const bool is_active = weight != 0.0f;
  // the state is emptied whatever the weight
  const bool only_state = (call.steps & ~(kInit | kStore)) == 0;
  if (!is_active && !only_state) return skip_row(call, row, state_size);
  double* const kept = call.state + row * state_size;
  for (int i = threadIdx.x; i < state_size; i += blockDim.x) {
    const bool largest = i == kStudentLargest || i == kTeacherLargest;
    const bool argmax = i == kStudentArgmax || i == kTeacherArgmax;
    const double empty = largest ? -std::numeric_limits<double>::infinity() : argmax ? -1.0 : 0.0;
    shared.state[i] = call.steps & kLoad ? kept[i] : empty;
  }
  __syncthreads();
  RowKernel<kId>(call, row, shared, weight).run();
  __syncthreads();
  if (!(call.steps & kStore)) return;
  for (int i = threadIdx.x; i < state_size; i += blockDim.x) kept[i] = shared.state[i];
  // the next row's state comes after
  __syncthreads();
}

// blockDim.x and __launch_bounds__
constexpr int kThreads = 512;

template <int kId, int kBlocksPerMultiprocessor>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
void divergence_rows(const __grid_constant__ Call call) {
  const SharedRow shared = shared_row();
  for (int64_t row = blockIdx.x; row < call.num_tokens; row += gridDim.x) {
    run_row<kId>(call, row, shared);
  }
}

}  // namespace cuda
}  // namespace opd
