// SPDX-License-Identifier: Apache-2.0
// One row of a divergence by one thread block, step by step; csrc/core/divergence.cpp is the same
// on a CPU. Each step reads the row once: two reads for the loss, one more for each divergence that
// needs row sums first, one more for the gradient. The gradient is formed from the logits again:
// leaving dterm and q in memory between, as the CPU does, would move 36 bytes per column, not 28.
// Sums and terms walk the row backwards, from the end that the L2 cache still holds.
//
// adaptive_kl reads the teacher's side twice more to find its head: not at all where one token has
// more than the head may, once more where head_mass is near 1. By itself it takes its row sums and
// its terms in one read.
//
// A thread keeps float32 sums of its columns, which are the same whatever the grid; blocks add them
// up in double, in one order.
#pragma once

#include <type_traits>

#include "divergence_sums.cuh"

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
struct RowKernel : RowSums<kId> {
  using Base = RowSums<kId>;
  using Base::add_to;
  using Base::block_sum;
  using Base::call;
  using Base::coefficient;
  using Base::component_state;
  using Base::is_cross_entropy;
  using Base::kGeneral;
  using Base::label_coefficient;
  using Base::label_weight;
  using Base::laws;
  using Base::num_components;
  using Base::reads_teacher;
  using Base::row;
  using Base::shared;
  using Base::weight;

  __device__ RowKernel(const Call& call, int64_t row, const SharedRow& shared, float weight)
      : Base(call, row, shared, weight) {}

  // -- terms and gradient -------------------------------------------------------------------------

  // What the terms of the loss are over four columns.
  struct Terms {
    float dterm[kVector] = {};    // of the whole loss
    float teacher[kVector] = {};  // dterm_teacher of it, where a geometric target is live
    float summed = 0.0f;          // dterm summed, but for what sums to 0 anyway
    float statistics[4] = {};     // entropies and KLs of both laws
  };

  __device__ __forceinline__ static void add_statistics(const Entry<float> (&e)[kVector],
                                                        Terms* terms) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      terms->statistics[0] -= select(e[i].q == 0.0f, 0.0f, e[i].q * e[i].lq);
      terms->statistics[1] -= select(e[i].p == 0.0f, 0.0f, e[i].p * e[i].lp);
      terms->statistics[2] += ForwardKl{}.term(e[i]);
      terms->statistics[3] += ReverseKl{}.term(e[i]);
    }
  }

  template <class F>
  __device__ __forceinline__ void add_component(const F& f, float c, bool textbook, bool with_terms,
                                                bool is_centred, const Entry<float> (&e)[kVector],
                                                const float (&through)[kVector], Terms* terms,
                                                float* term_lane) const {
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

  // fn(column, count, values, entries, terms) for the columns of this thread; the terms themselves
  // go to term_lane, that of component j to term_lane[j * blockDim.x].
  template <class WithTerms, class Fn>
  __device__ __forceinline__ void for_each_terms(WithTerms with_terms, bool descending,
                                                 bool barrier, float* term_lane,
                                                 Fn&& fn) const {
    const Shifts<float> shifts(shared.state);
    const auto walk = [&](auto&& add_components) {
      for_each_vector<1>(
          laws, call.vocab_size, descending, barrier,
          [&](int column, int count, const LawBits& bits) {
            const LawValues values = laws.widen(bits, column, count);
            Entry<float> e[kVector];
            float through[kVector];
            Base::entries_of(values, shifts, e);
            Terms terms;
            if (kGeneral && with_terms && call.with_statistics) add_statistics(e, &terms);
            this->mix(e, through);
            add_components(e, through, &terms);
            fn(column, count, values, e, terms);
          });
    };
    if constexpr (kGeneral) {
      walk([&](const auto& e, const auto& through, Terms* terms) {
        for (int j = 0; j < call.num_components; ++j) {
          const float c = coefficient(j);
          if (c == 0.0f) continue;
          const bool centred = is_centred(call.components[j]) && !this->is_live_mixture();
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
      const opd_divergence_component_t& component = call.components[0];
      const auto f =
          with_sums(functor_of<kId>(component.param0, component.param1), component_state(0));
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

  // Sums over the row into the state, or, from a finished state, the gradient. The plain kernels
  // have a loop for each: there `with_terms` is a constant.
  template <class WithTerms>
  __device__ __forceinline__ void walk_terms(WithTerms with_terms,
                                             const Gradient& gradient) const {
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

  // adaptive_kl by itself: its weights follow from sums over the row, but what they weigh can be
  // summed in the same read.
  __device__ __forceinline__ void walk_both_ways() const {
    using F = decltype(functor_of<OPD_ADAPTIVE_KL>(0.0, 0.0));
    static_assert(F::kRowSums == 2, "of the head and of the rest");
    double* const state = component_state(0);
    const F base = F(call.components[0].param0).with_threshold(state[kThreshold]);
    float distances[2] = {}, terms[2] = {}, dterms[2] = {};  // lanes; forward, then reverse
    this->for_each_entries(true, [&](const Entry<float>(&e)[kVector], int) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float own[2];
        base.row_sums(e[i], own);
        distances[0] += own[0], distances[1] += own[1];
        terms[0] += ForwardKl{}.term(e[i]), terms[1] += ReverseKl{}.term(e[i]);
        dterms[0] += ForwardKl{}.dterm(e[i]), dterms[1] += ReverseKl{}.dterm(e[i]);
      }
    });
    add_to(state + kRowSum, distances[0]);
    add_to(state + kRowSum + 1, distances[1]);
    const double forward = block_sum(terms[0]), reverse = block_sum(terms[1]);
    const double dforward = block_sum(dterms[0]), dreverse = block_sum(dterms[1]);
    if (threadIdx.x == 0) {
      const F f = base.with_row_sums(state + kRowSum);
      state[kTermSum] += zero_times(f.forward, forward) + zero_times(f.reverse, reverse);
      shared.state[kGradSum] += static_cast<double>(coefficient(0)) *
                                (f.forward * dforward + f.reverse * dreverse);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void close_terms(const float* term_lane, float grad_lane,
                                              float teacher_lane,
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
    // a side without a law leaves no gradient; a dterm that only multiplies by the gap may not show it
    const double gap = shared.state[kStudentLse] - shared.state[kTeacherLse];
    if (reads_teacher() && !(gap - gap == 0.0)) sum = std::numeric_limits<double>::quiet_NaN();
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

  // -- outcome ------------------------------------------------------------------------------------

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
    if (steps & kLse) this->add_lse();
    if (steps & kCloseLse) this->close_lse();
    if (steps & kHead) this->find_thresholds();
    if constexpr (kId != OPD_ADAPTIVE_KL) {
      if (steps & kRowSums) this->add_row_sums();
    }
    if constexpr (kGeneral) {
      // one loop over the terms, which has every divergence in it
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        const bool with_terms = pass == 0;
        Gradient gradient{};
        bool wanted = (steps & (with_terms ? kTerms : kGradient)) != 0;
        if (wanted && with_terms) {
          this->add_ids();
          keep_functors(call, shared);
          __syncthreads();
        }
        if (wanted && !with_terms) wanted = open_gradient(&gradient);
        if (wanted) walk_terms(with_terms, gradient);
        if (with_terms && (steps & kFinish)) finish();
        if (!with_terms && (steps & kGradient)) zero_rest(wanted);
      }
    } else {
      if (steps & kTerms) {
        if constexpr (kId == OPD_ADAPTIVE_KL) {
          if (coefficient(0) != 0.0f) walk_both_ways();
        } else {
          walk_terms(std::true_type{}, Gradient{});
        }
      }
      if (steps & kFinish) finish();
      if (steps & kGradient) {
        Gradient gradient;
        const bool wanted = open_gradient(&gradient);
        if (wanted) walk_terms(std::false_type{}, gradient);
        zero_rest(wanted);
      }
    }
  }

  // after the gradient: in the logits' memory, logits lie there
  __device__ __forceinline__ void zero_rest(bool has_gradient) const {
    zero_columns(call, row, has_gradient ? call.vocab_size : 0, call.grad_width);
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

template <int kId, int kThreads, int kBlocksPerMultiprocessor>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
void divergence_rows(const __grid_constant__ Call call) {
  const SharedRow shared = shared_row();
  for (int64_t row = blockIdx.x; row < call.num_tokens; row += gridDim.x) {
    run_row<kId>(call, row, shared);
  }
}

}  // namespace cuda
}  // namespace opd
