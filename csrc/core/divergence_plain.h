// SPDX-License-Identifier: Apache-2.0
// The blocks of divergence_row.h for the usual row: one divergence, of coefficient 1, of the teacher's
// law or a geometric target without gradient. Entries stay in registers between the logits and what is
// made of them, and what nobody asks for is not computed: a third of the time of a row otherwise goes
// into arrays of entries.
#pragma once

#include "divergence_row.h"

namespace opd {

// What a row needs first, from logits.
template <class T, class F>
OPD_ELEMENTWISE void plain_row_sum_block(const F f, const T* __restrict__ student,
                                         const T* __restrict__ teacher, const Shifts<T> shifts,
                                         int padded, T* __restrict__ first,
                                         T* __restrict__ second, T* __restrict__ third) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    T sums[3] = {};
    f.row_sums(entry_of(student[i], teacher[i], shifts), sums);
    first[i] = sums[0];
    if constexpr (F::kRowSums > 1) second[i] = sums[1];
    if constexpr (F::kRowSums > 2) third[i] = sums[2];
  }
}

// term, dterm and the row sum, which they do not depend on but for their form.
template <class T, class F>
OPD_ELEMENTWISE void plain_term_sum_block(const F f, const T* __restrict__ student,
                                          const T* __restrict__ teacher, const Shifts<T> shifts,
                                          int padded, T* __restrict__ term,
                                          T* __restrict__ dterm, T* __restrict__ sum) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e = entry_of(student[i], teacher[i], shifts);
    term[i] = f.term(e);
    dterm[i] = f.dterm(e);
    T sums[3] = {};
    f.row_sums(e, sums);
    sum[i] = sums[0];
  }
}

// term and dterm, and q for who writes a gradient in place.
template <bool kWithQ, class T, class F>
OPD_ELEMENTWISE void plain_term_block(const F f, const T* __restrict__ student,
                                      const T* __restrict__ teacher, const Shifts<T> shifts,
                                      int padded, T* __restrict__ term, T* __restrict__ dterm,
                                      T* __restrict__ q) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e = entry_of(student[i], teacher[i], shifts);
    term[i] = f.term(e);
    dterm[i] = f.dterm(e);
    if constexpr (kWithQ) q[i] = e.q;
  }
}

// dterm - q * grad_sum.
template <class T, class F>
OPD_ELEMENTWISE void plain_gradient_block(const F f, const T* __restrict__ student,
                                          const T* __restrict__ teacher, const Shifts<T> shifts,
                                          T grad_sum, int padded, T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> e = entry_of(student[i], teacher[i], shifts);
    out[i] = f.dterm(e) - e.q * grad_sum;
  }
}

// factor * q.
template <class T>
OPD_ELEMENTWISE void student_law_block(const T* __restrict__ student, const Shift<T> shift, T factor,
                                       int padded, T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    T lost;
    const T below = difference(student[i], shift.high, &lost);
    out[i] = factor * exp_nonpositive(below - (shift.low - lost));
  }
}

template <class T>
void plain_row_sums(const opd_divergence_component_t& component, const T* student, const T* teacher,
                    const Shifts<T>& shifts, int padded, double* state) {
  visit_row_sums(component, state, [&](const auto& functor) {
    Block<T> sums[3];
    plain_row_sum_block(functor, student, teacher, shifts, padded, sums[0].values, sums[1].values,
                        sums[2].values);
    for (int k = 0; k < std::decay_t<decltype(functor)>::kRowSums; ++k) {
      state[kRowSum + k] += lane_sum(sums[k].values, padded);
    }
  });
}

// Whether terms and row sums may be formed in one pass: the sums choose a form, which shows in
// nothing but the sum of dterm.
inline bool sums_choose_a_form(const opd_divergence_component_t& component) {
  bool only = false;
  visit_divergence(component.divergence, component.param0, component.param1,
                   [&](auto functor) { only = decltype(functor)::kHasTextbook; });
  return only;
}

// Adds both of a block to state; the sum of dterm in the form that is not the textbook's.
template <class T>
void plain_terms_and_sums(const opd_divergence_component_t& component, const T* student,
                          const T* teacher, const Shifts<T>& shifts, int padded, double* state,
                          double* grad_sum) {
  visit_row_sums(component, state, [&](const auto& functor) {
    if constexpr (std::decay_t<decltype(functor)>::kHasTextbook) {
      Block<T> term, dterm, sum;
      plain_term_sum_block(functor, student, teacher, shifts, padded, term.values, dterm.values,
                           sum.values);
      state[kTermSum] += lane_sum(term.values, padded);
      state[kRowSum] += lane_sum(sum.values, padded);
      *grad_sum += lane_sum(dterm.values, padded);
    }
  });
}

// What the sum of dterm is in the form that suits the overlap of the two laws.
inline double grad_sum_of_form(const opd_divergence_component_t& component, const double* state,
                               double grad_sum) {
  visit_component(component, state, [&](auto functor) {
    if constexpr (decltype(functor)::kHasTextbook) {
      if (functor.barely_overlaps()) grad_sum = functor.textbook_sum();
    }
  });
  return grad_sum;
}

template <bool kWithQ, class T>
void plain_terms(const opd_divergence_component_t& component, const double* state, const T* student,
                 const T* teacher, const Shifts<T>& shifts, int padded, T* term, T* dterm, T* q) {
  visit_form(component, state, [&](const auto& functor) {
    plain_term_block<kWithQ>(functor, student, teacher, shifts, padded, term, dterm, q);
  });
}

template <class T>
void plain_gradient(const opd_divergence_component_t& component, const double* state,
                    const T* student, const T* teacher, const Shifts<T>& shifts, T grad_sum,
                    int padded, T* out) {
  visit_form(component, state, [&](const auto& functor) {
    plain_gradient_block(functor, student, teacher, shifts, grad_sum, padded, out);
  });
}

}  // namespace opd
