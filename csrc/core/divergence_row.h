// SPDX-License-Identifier: Apache-2.0
// One row of a divergence, block by block: logits -> laws -> entries -> terms. Every step is an
// elementwise loop over arrays that stay in L1, so that targets, sums of divergences and statistics
// are made of the same few loops.
#pragma once

#include "divergence_state.h"
#include "opd/divergences.h"
#include "rows.h"

namespace opd {

// -- laws --------------------------------------------------------------------------------------------

template <class T>
OPD_ELEMENTWISE void add_scaled(T factor, const T* __restrict__ values, int count,
                                T* __restrict__ out) {
  constexpr T lowest = -std::numeric_limits<T>::infinity();
OPD_IVDEP
  for (int i = 0; i < count; ++i) {
    const T sum = out[i] + factor * values[i];
    // a token that one of the laws rules out stays out, whatever the sign of the others
    out[i] = select((out[i] == lowest) | (values[i] == lowest), lowest, sum);
  }
}

// Student and target rows of one token; the target is the teacher or a geometric mean.
template <class T>
class Laws {
 public:
  struct Scratch {
    Block<T> student, teacher, reference;
  };

  Laws(const opd_divergence_args_t& args, int64_t row)
      : student(args.student, row, args.vocab_size),
        teacher_(args.teacher, row, args.vocab_size),
        reference_(args.reference, row, args.vocab_size),
        geometric_(args.target == OPD_TARGET_GEOMETRIC),
        from_student_(static_cast<T>(args.target_student)),
        from_teacher_(static_cast<T>(args.target_teacher)),
        from_reference_(static_cast<T>(args.target_reference)) {}

  // Blocks of both, padded with -inf to a multiple of kLanes.
  void blocks(int64_t begin, int count, Scratch& scratch, const T** student_block,
              const T** target_block) const {
    *student_block = student.block(begin, count, scratch.student.values);
    *target_block = target(begin, count, *student_block, scratch);
  }

  const T* target(int64_t begin, int count, const T* student_block, Scratch& scratch) const {
    const T* teacher = teacher_.block(begin, count, scratch.teacher.values);
    if (!geometric_) return teacher;
    T* const out = scratch.teacher.values;
    const int padded = round_up_to_lanes(count);
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    for (int i = 0; i < padded; ++i) {
      const T scaled = teacher[i] == lowest ? lowest : from_teacher_ * teacher[i];
      out[i] = from_teacher_ == T(0) ? T(0) : scaled;
    }
    if (from_student_ != T(0)) add_scaled(from_student_, student_block, padded, out);
    if (from_reference_ != T(0)) {
      const T* reference = reference_.block(begin, count, scratch.reference.values);
      add_scaled(from_reference_, reference, padded, out);
    }
    std::fill(out + count, out + padded, -std::numeric_limits<T>::infinity());
    return out;
  }

  LogitsRow<T> student;

 private:
  LogitsRow<T> teacher_, reference_;
  bool geometric_;
  T from_student_, from_teacher_, from_reference_;
};

// -- entries -----------------------------------------------------------------------------------------

template <class T>
struct Entries {
  Block<T> lp, lq, p, q, gap, lp_low, lq_low;
  Block<T> through;  // d log(target) / d log q, where the target is a live mixture
};

template <class T>
OPD_ELEMENTWISE void entry_block(const T* __restrict__ student, const T* __restrict__ teacher,
                                 const Shifts<T> shifts, int padded, T* __restrict__ lp,
                                 T* __restrict__ lq, T* __restrict__ p, T* __restrict__ q,
                                 T* __restrict__ gap, T* __restrict__ lp_low,
                                 T* __restrict__ lq_low) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e = entry_of(student[i], teacher[i], shifts);
    lp[i] = e.lp;
    lq[i] = e.lq;
    p[i] = e.p;
    q[i] = e.q;
    gap[i] = e.gap;
    lp_low[i] = e.lp_low;
    lq_low[i] = e.lq_low;
  }
}

// The teacher's side of the entries becomes weight * teacher + (1 - weight) * student.
template <class T>
OPD_ELEMENTWISE void mixture_block(T weight, T rest, const T* __restrict__ lq,
                                   const T* __restrict__ q, int padded, T* __restrict__ lp,
                                   T* __restrict__ p, T* __restrict__ gap,
                                   T* __restrict__ through) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e{lp[i], lq[i], p[i], q[i], gap[i]};
    const Mixture<T> mix = mixture(e, weight, rest);
    const T log_m = e.teacher_larger() ? e.lp + mix.lm_lp : e.lq + mix.lm_lq;
    const bool absent = e.absent();
    lp[i] = absent ? e.lp : log_m;
    p[i] = absent ? e.p : mix.m;
    gap[i] = absent ? e.gap : -mix.lm_lq;
    through[i] = absent ? T(0) : rest * mix.q_over_m;
  }
}

template <class T>
void mix_target(T weight, int padded, Entries<T>& e) {
  if (weight != T(1)) std::fill(e.lp_low.values, e.lp_low.values + padded, T(0));
  if (weight == T(1)) {
    std::fill(e.through.values, e.through.values + padded, T(0));
    return;
  }
  if (weight == T(0)) {
    std::copy(e.lq.values, e.lq.values + padded, e.lp.values);
    std::copy(e.q.values, e.q.values + padded, e.p.values);
    std::fill(e.gap.values, e.gap.values + padded, T(0));
    std::fill(e.through.values, e.through.values + padded, T(1));
    return;
  }
  mixture_block(weight, T(1) - weight, e.lq.values, e.q.values, padded, e.lp.values, e.p.values,
                e.gap.values, e.through.values);
}

// -- divergences ---------------------------------------------------------------------------------------

template <class F>
struct TextbookForm : F {
  explicit TextbookForm(const F& base) : F(base) {}
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return this->dterm_textbook(e);
  }
};

template <class T, class F>
OPD_ELEMENTWISE void term_block(const F f, const T* __restrict__ lp, const T* __restrict__ lq,
                                const T* __restrict__ p, const T* __restrict__ q,
                                const T* __restrict__ gap, const T* __restrict__ lp_low,
                                const T* __restrict__ lq_low, int padded, T* __restrict__ term,
                                T* __restrict__ dterm) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e{lp[i], lq[i], p[i], q[i], gap[i], lp_low[i], lq_low[i]};
    term[i] = f.term(e);
    dterm[i] = f.dterm(e);
  }
}

template <class T, class F>
OPD_ELEMENTWISE void dterm_teacher_block(const F f, const T* __restrict__ lp,
                                         const T* __restrict__ lq, const T* __restrict__ p,
                                         const T* __restrict__ q, const T* __restrict__ gap,
                                         const T* __restrict__ lp_low,
                                         const T* __restrict__ lq_low, int padded,
                                         T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    out[i] = f.dterm_teacher(Entry<T>{lp[i], lq[i], p[i], q[i], gap[i], lp_low[i], lq_low[i]});
  }
}

template <class T, class F>
OPD_ELEMENTWISE void row_sum_block(const F f, const T* __restrict__ lp, const T* __restrict__ lq,
                                   const T* __restrict__ p, const T* __restrict__ q,
                                   const T* __restrict__ gap, const T* __restrict__ lp_low,
                                   const T* __restrict__ lq_low, int padded, T* __restrict__ first,
                                   T* __restrict__ second, T* __restrict__ third) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    T sums[3] = {};
    f.row_sums(Entry<T>{lp[i], lq[i], p[i], q[i], gap[i], lp_low[i], lq_low[i]}, sums);
    first[i] = sums[0];
    second[i] = sums[1];
    third[i] = sums[2];
  }
}

// Calls fn with the functor of a component as the sums in its state make it.
template <class Fn>
void visit_component(const opd_divergence_component_t& component, const double* state, Fn&& fn) {
  visit_divergence(
      component.divergence, component.param0, component.param1, [&](auto functor) {
        using F = decltype(functor);
        if constexpr (F::kNeedsThreshold) functor = functor.with_threshold(state[kThreshold]);
        if constexpr (F::kRowSums > 0) functor = functor.with_row_sums(state + kRowSum);
        fn(functor);
      });
}

// Calls fn with it, in the form that suits the overlap of the two laws.
template <class Fn>
void visit_form(const opd_divergence_component_t& component, const double* state, Fn&& fn) {
  visit_component(component, state, [&](auto functor) {
    using F = decltype(functor);
    if constexpr (F::kHasTextbook) {
      if (functor.barely_overlaps()) return fn(TextbookForm<F>(functor));
    }
    fn(functor);
  });
}

template <class T>
void component_terms(const opd_divergence_component_t& component, const double* state,
                     const Entries<T>& e, int padded, T* term, T* dterm) {
  visit_form(component, state, [&](const auto& functor) {
    term_block(functor, e.lp.values, e.lq.values, e.p.values, e.q.values, e.gap.values,
               e.lp_low.values, e.lq_low.values, padded, term, dterm);
  });
}

template <class T>
void component_dterm_teacher(const opd_divergence_component_t& component, const double* state,
                             const Entries<T>& e, int padded, T* out) {
  visit_component(component, state, [&](auto functor) {
    dterm_teacher_block(functor, e.lp.values, e.lq.values, e.p.values, e.q.values, e.gap.values,
                        e.lp_low.values, e.lq_low.values, padded, out);
  });
}

inline int num_row_sums(const opd_divergence_component_t& component) {
  int count = 0;
  visit_divergence(component.divergence, component.param0, component.param1,
                   [&](auto functor) { count = decltype(functor)::kRowSums; });
  return count;
}

// Calls fn with the functor of a component that sums need first, as its threshold makes it.
template <class Fn>
void visit_row_sums(const opd_divergence_component_t& component, const double* state, Fn&& fn) {
  visit_divergence(
      component.divergence, component.param0, component.param1, [&](auto functor) {
        using F = decltype(functor);
        if constexpr (F::kRowSums > 0) {
          if constexpr (F::kNeedsThreshold) functor = functor.with_threshold(state[kThreshold]);
          fn(functor);
        }
      });
}

// Adds the sums of a block to state.
template <class T>
void component_row_sums(const opd_divergence_component_t& component, const Entries<T>& e,
                        int padded, double* state) {
  visit_row_sums(component, state, [&](auto functor) {
    Block<T> sums[3];
    row_sum_block(functor, e.lp.values, e.lq.values, e.p.values, e.q.values, e.gap.values,
                  e.lp_low.values, e.lq_low.values, padded, sums[0].values, sums[1].values,
                  sums[2].values);
    for (int k = 0; k < decltype(functor)::kRowSums; ++k) {
      state[kRowSum + k] += lane_sum(sums[k].values, padded);
    }
  });
}

// The mass of Renyi's divergence once more, in double: where the float32 sum has overflowed or has
// underflowed its logarithm still is an ordinary number.
template <class T>
double mass_in_double(const opd_divergence_component_t& component, const Entries<T>& e, int count) {
  const double a = component.param0, c = 1.0 - component.param0;
  double sum = 0.0;
  for (int i = 0; i < count; ++i) {
    const double lp = static_cast<double>(e.lp.values[i]) + static_cast<double>(e.lp_low.values[i]);
    const double lq = static_cast<double>(e.lq.values[i]) + static_cast<double>(e.lq_low.values[i]);
    const bool absent = std::isinf(lp) && std::isinf(lq) && lp < 0 && lq < 0;
    sum += absent ? 0.0 : std::exp(a * lp + c * lq);
  }
  return sum;
}

inline double component_value(const opd_divergence_component_t& component, const double* state) {
  double value = 0.0;
  visit_component(component, state, [&](auto functor) { value = functor.value(state[kTermSum]); });
  return value;
}

template <class T>
OPD_ELEMENTWISE void statistics_block(const T* __restrict__ lp, const T* __restrict__ lq,
                                      const T* __restrict__ p, const T* __restrict__ q,
                                      const T* __restrict__ gap, int padded,
                                      T* __restrict__ student_entropy,
                                      T* __restrict__ teacher_entropy, T* __restrict__ forward_kl,
                                      T* __restrict__ reverse_kl) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e{lp[i], lq[i], p[i], q[i], gap[i]};
    student_entropy[i] = select(e.q == T(0), T(0), -e.q * e.lq);
    teacher_entropy[i] = select(e.p == T(0), T(0), -e.p * e.lp);
    forward_kl[i] = ForwardKl{}.term(e);
    reverse_kl[i] = ReverseKl{}.term(e);
  }
}

// -- the head of the teacher's law -----------------------------------------------------------------------

// The least log p whose {log p >= it} has mass of at most `head_mass`; the largest log p if that
// alone has more. A radix select by mass: exact, and tied tokens stay together.
// for_entries(fn) calls fn(entries, count) for each block of the row.
template <class T, class ForEntries>
T head_threshold(double head_mass, ForEntries&& for_entries) {
  constexpr int kBits = 8, kBins = 1 << kBits;
  uint64_t prefix = 0;
  double above = 0.0;
  for (int shift = static_cast<int>(sizeof(T)) * 8 - kBits; shift >= 0; shift -= kBits) {
    double mass[kBins] = {};
    bool seen[kBins] = {};
    const bool is_first = shift == static_cast<int>(sizeof(T)) * 8 - kBits;
    for_entries([&](const Entries<T>& e, int count) {
      for (int i = 0; i < count; ++i) {
        const uint64_t bits = ordered_bits(e.lp.values[i]);
        if (!is_first && (bits >> (shift + kBits)) != prefix) continue;
        mass[(bits >> shift) & (kBins - 1)] += static_cast<double>(e.p.values[i]);
        seen[(bits >> shift) & (kBins - 1)] = true;
      }
    });
    int bin = -1;
    double upto = above;
    for (int k = kBins - 1; k >= 0 && upto <= head_mass; --k) {
      if (!seen[k]) continue;
      bin = k;
      above = upto;
      upto += mass[k];
    }
    // every token fits, or the row is NaN; below, rounding alone may say so of a bin that does not
    if (is_first && !(upto > head_mass)) return -std::numeric_limits<T>::infinity();
    prefix = (prefix << kBits) | static_cast<uint64_t>(bin);
  }
  const T boundary = value_of(prefix, T{});
  // the boundary's own tokens do not fit, unless there is nothing above them
  return above > 0.0 ? std::nextafter(boundary, std::numeric_limits<T>::infinity()) : boundary;
}

}  // namespace opd
