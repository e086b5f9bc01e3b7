// SPDX-License-Identifier: Apache-2.0
// Every divergence, once, for CPU and CUDA. A divergence is two scalars of one vocabulary entry:
//
//   D = sum_v term_v,        dterm_v = d term_v / d log q_v        (p teacher, q student)
//   dD/dz_v = (dterm_v - q_v * sum_u dterm_u) / temperature        (z student logits)
//
// term is written in its Bregman (generalised, unnormalised) form, which is >= 0 for each v and
// sums to the textbook value because p and q each sum to 1; docs/divergences.md derives it.
// A new divergence is one struct and one line of OPD_DIVERGENCES. The Triton mirror is
// opd_kernels/triton/_divergences.py; the independent truth is opd_kernels/reference.
#pragma once

#include "opd/math.h"

namespace opd {

// One vocabulary entry: log-probabilities and probabilities of teacher (p) and student (q), and
// gap = lq - lp, which the kernels form from the logits themselves: the difference of two rounded
// log-probabilities would have lost the digits that matter once the student is near the teacher.
template <class T>
struct Entry {
  T lp, lq;
  T p, q;
  T gap;

  OPD_HD bool teacher_larger() const { return gap <= T(0); }
  OPD_HD T larger() const { return teacher_larger() ? p : q; }
  // e^-|gap| and e^-|gap| - 1; NaN if p = q = 0, where callers look at larger() first
  OPD_HD ExpPair<T> ratio() const { return exp_pair_nonpositive(teacher_larger() ? gap : -gap); }
  // q - p, with the relative accuracy of gap
  OPD_HD T student_minus_teacher() const {
    const T excess = larger() * ratio().expm1;
    return select(larger() == T(0), T(0), teacher_larger() ? excess : -excess);
  }
};

// KL(p || q) = sum p (lp - lq).  dterm = q - p.  0 iff p == q; inf if q = 0 < p.
// Hinton et al. 2015, arXiv:1503.02531.
struct ForwardKl {
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return bregman(e.p, e.q, e.gap);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return e.student_minus_teacher();
  }
};

// KL(q || p) = sum q (lq - lp).  dterm = q (lq - lp).  inf if p = 0 < q.
// MiniLLM, arXiv:2306.08543.
struct ReverseKl {
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return bregman(e.q, e.p, -e.gap);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return select(e.q == T(0), T(0), e.q * e.gap);
  }
};

// The mixture m = w p + (1 - w) q, in the forms that the terms need. Ratios and logarithms are
// relative to the larger of p and q, so that they stay exact as p -> q, when one of them is 0, and
// when both are too small to divide by.
template <class T>
struct Mixture {
  T m;
  T lm_lp, lm_lq;          // log m - log p, log m - log q
  T p_over_m;
  T difference_over_m;     // (q - p) / m
};

template <class T>
OPD_HD Mixture<T> mixture(const Entry<T>& e, T teacher_weight, T student_weight) {
  const bool teacher_larger = e.teacher_larger();
  const ExpPair<T> ratio = e.ratio();
  const T keep = teacher_larger ? teacher_weight : student_weight;
  const T weight = teacher_larger ? student_weight : teacher_weight;
  const T m_over_larger = keep + weight * ratio.exp;
  const T from_larger = log_mix(ratio, keep, weight);
  const T from_smaller = from_larger + (teacher_larger ? -e.gap : e.gap);
  return {teacher_weight * e.p + student_weight * e.q,
          teacher_larger ? from_larger : from_smaller,
          teacher_larger ? from_smaller : from_larger,
          (teacher_larger ? T(1) : ratio.exp) / m_over_larger,
          (teacher_larger ? ratio.expm1 : -ratio.expm1) / m_over_larger};
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.  dterm = (1-beta) q (lq - lm).
// At most the binary entropy of beta; / beta -> forward KL, / (1 - beta) -> reverse KL at the ends.
// GKD, arXiv:2306.13649.
struct Jsd {
  double beta;
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const T b = T(beta), c = T(1 - beta);
    const Mixture<T> mix = mixture(e, b, c);
    return b * bregman(e.p, mix.m, mix.lm_lp) + c * bregman(e.q, mix.m, mix.lm_lq);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T b = T(beta), c = T(1 - beta);
    const Mixture<T> mix = mixture(e, b, c);
    return select(e.q == T(0), T(0), -c * e.q * mix.lm_lq);
  }
};

// KL(p || m), m = alpha p + (1 - alpha) q.  dterm = (1 - alpha) q (1 - p/m).
// At most -log alpha; alpha -> 0 is forward KL.  DistiLLM, arXiv:2402.03898.
//
// The gradient does not change when a multiple of q is added to dterm. Near p = q the form above
// does not cancel against its row sum; where the laws barely overlap it would, and the textbook's
// -(1 - alpha) q p/m does not. Rows choose by sum q p/m, which lies in [0, 1].
struct SkewForwardKl {
  double alpha;
  double textbook = 0;  // 1: the textbook's form, 0: the other
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const Mixture<T> mix = mixture(e, T(alpha), T(1 - alpha));
    return bregman(e.p, mix.m, mix.lm_lp);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T c = T(1 - alpha);
    const Mixture<T> mix = mixture(e, T(alpha), c);
    // both are finite; a choice between them would keep the loop from being vectorised
    const T factor = T(1 - textbook) * (c * mix.difference_over_m) - T(textbook) * mix.p_over_m;
    return select(e.q == T(0), T(0), c * e.q * factor);
  }
  template <class T>
  OPD_HD T overlap(const Entry<T>& e) const {
    const Mixture<T> mix = mixture(e, T(alpha), T(1 - alpha));
    return select(e.q == T(0), T(0), e.q * mix.p_over_m);
  }
};

// KL(q || m), m = (1 - alpha) p + alpha q.  dterm = q (lq - lm) + alpha q (1 - q/m), and without
// the second part when the mixture is detached.  At most -log alpha; alpha -> 0 is reverse KL.
// DistiLLM, arXiv:2402.03898; detached in DistiLLM-2, arXiv:2503.07067.
struct SkewReverseKl {
  double alpha;
  double live;  // 1: gradient flows through the mixture; 0: detached
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const Mixture<T> mix = mixture(e, T(1 - alpha), T(alpha));
    return bregman(e.q, mix.m, mix.lm_lq);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T a = T(alpha), c = T(1 - alpha);
    const Mixture<T> mix = mixture(e, c, a);
    const T through_mixture = T(live) * a * (-c * mix.difference_over_m);
    return select(e.q == T(0), T(0), e.q * (through_mixture - mix.lm_lq));
  }
};

// sum |p - q| / 2.  dterm = q sign(q - p) / 2.  In [0, 1].  f-distill, arXiv:2307.15190.
struct TotalVariation {
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const T excess = e.student_minus_teacher();
    return T(0.5) * (excess < T(0) ? -excess : excess);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    // gap itself where it is 0 or NaN
    const T negative = e.gap < T(0) ? T(-0.5) : e.gap;
    return select(e.larger() == T(0), T(0), e.q * (e.gap > T(0) ? T(0.5) : negative));
  }
};

// X(id, name, functor from (double param0, double param1)). Ids are part of the C ABI: append only.
#define OPD_DIVERGENCES(X)                                          \
  X(0, forward_kl, ForwardKl{})                                     \
  X(1, reverse_kl, ReverseKl{})                                     \
  X(2, jsd, Jsd{param0})                                         \
  X(3, skew_forward_kl, SkewForwardKl{param0})                   \
  X(4, skew_reverse_kl, (SkewReverseKl{param0, 1 - param1}))  \
  X(5, total_variation, TotalVariation{})

// Calls fn with the functor of this id; false if there is none.
template <class Fn>
bool visit_divergence(int id, double param0, double param1, Fn&& fn) {
  switch (id) {
#define OPD_CASE(ID, NAME, FUNCTOR) \
  case ID:                          \
    fn(FUNCTOR);                    \
    return true;
    OPD_DIVERGENCES(OPD_CASE)
#undef OPD_CASE
    default:
      return false;
  }
}

}  // namespace opd
