// SPDX-License-Identifier: Apache-2.0
// Every divergence, once, for CPU and CUDA. A divergence is two scalars of one vocabulary entry:
//
//   D = value(sum_v term_v),   dterm_v = d term_v / d log q_v      (p teacher, q student)
//   dD/dz_v = (dterm_v - q_v * sum_u dterm_u) / temperature        (z student logits)
//
// term is written in its Bregman (generalised, unnormalised) form where it has one, which is >= 0
// for each v and sums to the textbook value because p and q each sum to 1. A multiple of q added to
// dterm changes no gradient; dterm is written so that it vanishes with each entry's own gap. Where
// the laws barely overlap that form would cancel against its row sum and the textbook's does not:
// divergences with an `overlap` have both. docs/divergences.md derives all of it.
//
// What a functor has besides term and dterm:
//   kRowSums, row_sums, with_row_sums   sums over the row that term and dterm need first
//   value(sum)                          D from sum of term; the identity unless it says otherwise
//   dterm_teacher                       d term / d log p, for targets that contain the student
//   dterm_textbook, barely_overlaps     the second form, and when to use it; term is of one form, and
//   textbook_sum                        sum of dterm_textbook, which is a multiple of the row sum
//   kNeedsThreshold                     a row statistic of the teacher's law comes first
//
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
  // what the rounding of lp and lq has lost; powers of p and q need it
  T lp_low = T(0), lq_low = T(0);

  OPD_HD bool teacher_larger() const { return gap <= T(0); }
  OPD_HD T larger() const { return teacher_larger() ? p : q; }
  // e^-|gap| and e^-|gap| - 1; NaN if p = q = 0, where callers look at larger() first
  OPD_HD ExpPair<T> ratio() const { return exp_pair_nonpositive(teacher_larger() ? gap : -gap); }
  // q - p, with the relative accuracy of gap
  OPD_HD T student_minus_teacher() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      // a divergence's bregman(p, q, gap) is made of the same parts
      const T near = p * gap + p * ((gap * gap) * phi_over_square(gap));
      return detail::within_one(gap) ? near : q - p;
    } else {
      const T excess = larger() * ratio().expm1;
      return select(larger() == T(0), T(0), teacher_larger() ? excess : -excess);
    }
  }
  // -inf logits on both sides, as in the padding of a block: counts for nothing
  OPD_HD bool absent() const {
    const T lowest = -std::numeric_limits<T>::infinity();
    return (lp == lowest) & (lq == lowest);
  }
  OPD_HD Entry swapped() const { return {lq, lp, q, p, -gap, lq_low, lp_low}; }
};

// What most divergences are: one pass, D = sum of term.
struct Separable {
  static constexpr int kRowSums = 0;
  static constexpr bool kHasTextbook = false;
  static constexpr bool kNeedsThreshold = false;
  OPD_HD double value(double sum) const { return sum; }
};

// What T loses of an exponent: 0.3 in float32, times a log-probability of 40, is off by 4e-7.
template <class T>
OPD_HD T low_part(double value) {
  return T(value - static_cast<double>(T(value)));
}

// factor * x with 0 * inf = 0: a power of exponent 0 is 1 and a weight of 0 leaves out, whatever x is.
template <class T>
OPD_HD T zero_times(T factor, T x) {
  return select(factor == T(0), T(0), factor * x);
}

// KL(p || q) = sum p (lp - lq).  dterm = q - p.  0 iff p == q; inf if q = 0 < p.
// Hinton et al. 2015, arXiv:1503.02531.
struct ForwardKl : Separable {
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return bregman(e.p, e.q, e.gap);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return e.student_minus_teacher();
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return select(e.p == T(0), T(0), -e.p * e.gap);
  }
};

// KL(q || p) = sum q (lq - lp).  dterm = q (lq - lp).  inf if p = 0 < q.
// MiniLLM, arXiv:2306.08543.
struct ReverseKl : Separable {
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return bregman(e.q, e.p, -e.gap);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return zero_wins(e.q, e.gap);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return -e.student_minus_teacher();
  }
};

// weight KL(p || q) + (1 - weight) KL(q || p).  dterm: the same sum of theirs.
struct Jeffreys : Separable {
  double weight, rest;
  OPD_HD explicit Jeffreys(double weight) : weight(weight), rest(1 - weight) {}
  OPD_HD Jeffreys(double weight, double rest) : weight(weight), rest(rest) {}
  // a weight of 0, as adaptive_kl may have, leaves its side out, infinite or not
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return zero_times(T(weight), ForwardKl{}.term(e)) +
           zero_times(T(rest), ReverseKl{}.term(e));
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return T(weight) * ForwardKl{}.dterm(e) + T(rest) * ReverseKl{}.dterm(e);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return T(weight) * ForwardKl{}.dterm_teacher(e) + T(rest) * ReverseKl{}.dterm_teacher(e);
  }
};

// The mixture m = w p + (1 - w) q, in the forms that the terms need. Ratios and logarithms are
// relative to the larger of p and q, so that they stay exact as p -> q, when one of them is 0, and
// when both are too small to divide by.
template <class T>
struct Mixture {
  T m;
  T lm_lp, lm_lq;          // log m - log p, log m - log q
  T p_over_m, q_over_m;
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
  const T larger_over_m = T(1) / m_over_larger;
  const T smaller_over_m = ratio.exp * larger_over_m;
  return {teacher_weight * e.p + student_weight * e.q,
          teacher_larger ? from_larger : from_smaller,
          teacher_larger ? from_smaller : from_larger,
          teacher_larger ? larger_over_m : smaller_over_m,
          teacher_larger ? smaller_over_m : larger_over_m,
          (teacher_larger ? ratio.expm1 : -ratio.expm1) * larger_over_m};
}

// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.  dterm = (1-beta) q (lq - lm).
// At most the binary entropy of beta; / beta -> forward KL, / (1 - beta) -> reverse KL at the ends.
// GKD, arXiv:2306.13649.
struct Jsd : Separable {
  double beta, rest;
  OPD_HD explicit Jsd(double beta) : beta(beta), rest(1 - beta) {}
  OPD_HD Jsd(double beta, double rest) : beta(beta), rest(rest) {}
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const T b = T(beta), c = T(rest);
    const Mixture<T> mix = mixture(e, b, c);
    return b * bregman(e.p, mix.m, mix.lm_lp) + c * bregman(e.q, mix.m, mix.lm_lq);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T b = T(beta), c = T(rest);
    const Mixture<T> mix = mixture(e, b, c);
    return select(e.q == T(0), T(0), -c * e.q * mix.lm_lq);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return Jsd{rest, beta}.dterm(e.swapped());
  }
};

// KL(q || m), m = (1 - alpha) p + alpha q.  dterm = q (lq - lm) + alpha q (1 - q/m), and without
// the second part when the mixture is detached.  At most -log alpha; alpha -> 0 is reverse KL.
// DistiLLM, arXiv:2402.03898; detached in DistiLLM-2, arXiv:2503.07067.
struct SkewReverseKl : Separable {
  double alpha;
  double live;  // 1: gradient flows through the mixture; 0: detached
  OPD_HD SkewReverseKl(double alpha, double live) : alpha(alpha), live(live) {}
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
  // d/dlp = -(1 - alpha) q p/m, here + (1 - alpha) p; nothing if the mixture is detached
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    const Mixture<T> mix = mixture(e, T(1 - alpha), T(alpha));
    const T c = T(live * (1 - alpha));
    return select(e.p == T(0), T(0), -c * e.p * T(1 - alpha) * mix.difference_over_m);
  }
};

// KL(p || m), m = alpha p + (1 - alpha) q.  dterm = (1 - alpha) q (1 - p/m).
// At most -log alpha; alpha -> 0 is forward KL.  DistiLLM, arXiv:2402.03898.
struct SkewForwardKl : Separable {
  static constexpr int kRowSums = 1;
  static constexpr bool kHasTextbook = true;
  double alpha;
  double overlap = 1;  // sum q p/m
  OPD_HD explicit SkewForwardKl(double alpha, double overlap = 1)
      : alpha(alpha), overlap(overlap) {}
  template <class T>
  OPD_HD void row_sums(const Entry<T>& e, T* sums) const {
    const Mixture<T> mix = mixture(e, T(alpha), T(1 - alpha));
    sums[0] = select(e.q == T(0), T(0), e.q * mix.p_over_m);
  }
  OPD_HD SkewForwardKl with_row_sums(const double* sums) const {
    return SkewForwardKl(alpha, sums[0]);
  }
  OPD_HD bool barely_overlaps() const { return overlap < 0.5; }
  OPD_HD double textbook_sum() const { return -(1 - alpha) * overlap; }
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const Mixture<T> mix = mixture(e, T(alpha), T(1 - alpha));
    return bregman(e.p, mix.m, mix.lm_lp);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T c = T(1 - alpha);
    const Mixture<T> mix = mixture(e, T(alpha), c);
    return select(e.q == T(0), T(0), c * e.q * (c * mix.difference_over_m));
  }
  template <class T>
  OPD_HD T dterm_textbook(const Entry<T>& e) const {
    const T c = T(1 - alpha);
    const Mixture<T> mix = mixture(e, T(alpha), c);
    return select(e.q == T(0), T(0), -c * e.q * mix.p_over_m);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return SkewReverseKl(alpha, 1).dterm(e.swapped());
  }
};

// sum |p - q| / 2.  dterm = q sign(q - p) / 2.  In [0, 1].  f-distill, arXiv:2307.15190.
struct TotalVariation : Separable {
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
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return dterm(e.swapped());
  }
};

// p^alpha q^(1 - alpha) e^-shift. With the low parts of the log-probabilities and of both products the
// exponent is exact to the square of a rounding, so that it cancels without harm where the laws are
// close.
template <class T, class Shift>
OPD_HD T geometric_mean(const Entry<T>& e, double alpha, Shift shift) {
  const T a = T(alpha), c = T(1 - alpha);
  const T a_low = low_part<T>(alpha), c_low = low_part<T>(1 - alpha);
  T first_lost, second_lost;
  const T first = exact_product(a, e.lp, &first_lost);
  const T second = exact_product(c, e.lq, &second_lost);
  const T low = (a * e.lp_low + a_low * e.lp) + (c * e.lq_low + c_low * e.lq) + first_lost;
  const T r = exp_of_parts(first, second, shift, low + second_lost);
  return select(e.absent(), T(0), r);
}

// scale (sum r - 1) / (alpha (alpha - 1)), r = p^alpha q^(1 - alpha), alpha neither 0 nor 1.
// dterm = scale (q - r) / alpha.  term = scale (r - alpha p - (1-alpha) q) / (alpha (alpha - 1)).
// alpha 1/2 and scale 1/4 is the squared Hellinger distance, 2 and 2 Pearson's chi^2 (over the
// student), -1 and 2 Neyman's (over the teacher). Unbounded outside of 0 < alpha < 1.
struct Alpha : Separable {
  static constexpr int kRowSums = 1;
  static constexpr bool kHasTextbook = true;
  double alpha, scale;
  double mass = 1;  // sum r
  OPD_HD explicit Alpha(double alpha, double scale = 1, double mass = 1)
      : alpha(alpha), scale(scale), mass(mass) {}

  template <class T>
  OPD_HD T geometric(const Entry<T>& e) const {
    return geometric_mean(e, alpha, Unshifted{});
  }
  // whether gap, alpha gap and (1 - alpha) gap are all within the series' reach
  template <class T>
  OPD_HD bool near(const Entry<T>& e) const {
    const double a = alpha < 0 ? -alpha : alpha, c = alpha > 1 ? alpha - 1 : 1 - alpha;
    const double most = a > c ? a : c;
    const T reach = T(most > 1 ? 1 / most : 1);
    return (e.gap < reach) & (e.gap > -reach);
  }
  template <class T>
  OPD_HD void row_sums(const Entry<T>& e, T* sums) const {
    sums[0] = geometric(e);
  }
  OPD_HD Alpha with_row_sums(const double* sums) const { return Alpha(alpha, scale, sums[0]); }
  OPD_HD bool barely_overlaps() const { return mass < 0.5; }
  OPD_HD double textbook_sum() const { return -scale / alpha * mass; }
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const T a = T(alpha), c = T(1 - alpha), factor = T(scale / (alpha * (alpha - 1)));
    const T x = e.gap, cx = c * x;
    // r - alpha p - c q = p (phi(c x) - c phi(x)), phi(y) = e^y - 1 - y
    const T by_series = e.p * (x * x) * (c * (c * phi_over_square(cx) - phi_over_square(x)));
    const T directly = (geometric(e) - a * e.p) - c * e.q;
    return select(e.absent(), T(0), factor * (near(e) ? by_series : directly));
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T y = T(-alpha) * e.gap;
    const T by_series = e.q * (e.gap * (T(1) + y * phi_over_square(y)));
    const T directly = (e.q - geometric(e)) * T(1 / alpha);
    return select(e.absent(), T(0), T(scale) * (near(e) ? by_series : directly));
  }
  template <class T>
  OPD_HD T dterm_textbook(const Entry<T>& e) const {
    return T(-scale / alpha) * geometric(e);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return Alpha(1 - alpha, scale).dterm(e.swapped());
  }
};

// log(sum r) / (alpha - 1), r = p^alpha q^(1 - alpha), alpha > 0 and not 1.  dterm = q - r / sum r.
// alpha -> 1 is forward KL.
struct Renyi : Separable {
  static constexpr int kRowSums = 2;
  double alpha;
  double log_mass = 0;  // log sum r
  OPD_HD explicit Renyi(double alpha, double log_mass = 0) : alpha(alpha), log_mass(log_mass) {}
  template <class T>
  OPD_HD void row_sums(const Entry<T>& e, T* sums) const {
    const Alpha base(alpha);
    sums[0] = base.term(e);
    sums[1] = base.geometric(e);
  }
  OPD_HD Renyi with_row_sums(const double* sums) const {
    return Renyi(alpha, log_of(sums[0], sums[1]));
  }
  OPD_HD double value(double) const { return log_mass / (alpha - 1); }
  template <class T>
  OPD_HD T term(const Entry<T>&) const {
    return T(0);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T y = T(-alpha) * e.gap - T(log_mass);
    const T by_series = -e.q * (y + (y * y) * phi_over_square(y));
    const T r = geometric_mean(e, alpha, T(log_mass));
    const T value = (y < T(1)) & (y > T(-1)) ? by_series : e.q - r;
    return select(e.absent(), T(0), value);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return T(alpha / (1 - alpha)) * Renyi(1 - alpha, log_mass).dterm(e.swapped());
  }

 private:
  // from the divergence where the mass is near 1, from the mass itself elsewhere
  OPD_HD double log_of(double divergence, double mass) const {
    const bool near = mass > 0.5 && mass < 2;
    return near ? ::log1p(alpha * (alpha - 1) * divergence) : ::log(mass);
  }
};

// sum w p (lp - lq) + (1 - w) q (lq - lp), w = p / (p + q) detached; its value is forward + reverse
// KL, its gradient is not.  dterm = (q^2 - p^2 + q^2 (lq - lp)) / (p + q).
// ToDi, arXiv:2505.16297.
struct Todi : Separable {
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return select(e.larger() == T(0), T(0), e.student_minus_teacher() * e.gap);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const ExpPair<T> ratio = e.ratio();
    const T student_share = (e.teacher_larger() ? ratio.exp : T(1)) / (T(1) + ratio.exp);
    return e.student_minus_teacher() +
           select(e.q == T(0), T(0), e.q * e.gap * student_share);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return dterm(e.swapped());
  }
};

// (g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), g = sum |p - q| over the teacher's
// most probable tokens (of mass head_mass at most) and over the rest; g detached.
// AKL, arXiv:2404.02657.
struct AdaptiveKl : Separable {
  static constexpr int kRowSums = 2;
  static constexpr bool kNeedsThreshold = true;
  double head_mass;
  double threshold = 0;  // log p of the least probable token of the head
  double forward = 0.5, reverse = 0.5;
  OPD_HD explicit AdaptiveKl(double head_mass, double threshold = 0, double forward = 0.5)
      : head_mass(head_mass), threshold(threshold), forward(forward), reverse(1 - forward) {}
  template <class T>
  OPD_HD void row_sums(const Entry<T>& e, T* sums) const {
    const T excess = e.student_minus_teacher();
    const T distance = excess < T(0) ? -excess : excess;
    sums[0] = e.lp >= T(threshold) ? distance : T(0);
    sums[1] = e.lp >= T(threshold) ? T(0) : distance;
  }
  OPD_HD AdaptiveKl with_threshold(double lp) const { return AdaptiveKl(head_mass, lp); }
  OPD_HD AdaptiveKl with_row_sums(const double* sums) const {
    const double total = sums[0] + sums[1];
    return AdaptiveKl(head_mass, threshold, total == 0 ? 0.5 : sums[0] / total);
  }
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    return weighted().term(e);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return weighted().dterm(e);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return weighted().dterm_teacher(e);
  }

 private:
  OPD_HD Jeffreys weighted() const { return Jeffreys(forward, reverse); }
};

// -1/(a b) sum [p^a q^b - a/s p^s - b/s q^s], s = a + b, and its limits where a, b or s is 0.
// dterm = -(p^a q^b - q^s) / a = q^s (lq - lp) where a = 0.
//
// p^s and q^s do not sum to 1, so an error common to all gaps, as the log-sum-exps leave it, would
// not cancel as it does elsewhere. Both laws being normalised, sum (q - p) measures that error.
// (1, 0) is forward KL, (0, 1) reverse KL, (a, 1 - a) alpha.  ABKD, arXiv:2505.04560.
struct AlphaBeta : Separable {
  static constexpr int kRowSums = 1;
  double a, b, s;
  double offset = 0;  // common error of the gaps
  // far from p = q: term = mixed p^a q^b + (p0 + px gap) p^s + (q0 + qx gap) q^s
  double mixed = 0, p0 = 0, px = 0, q0 = 0, qx = 0;
  double cross_p = 0, cross_q = 0;  // a and b where mixed is not 0
  double inverse_a;
  double reach;
  OPD_HD AlphaBeta(double alpha, double beta)
      : a(alpha), b(beta), s(alpha + beta), inverse_a(alpha == 0 ? 0 : 1 / alpha) {
    // alpha + beta as a user means it: 0.1 - 0.1 is 0, and so is 0.3 - 0.1 - 0.2 after rounding
    if (s < 1e-12 && s > -1e-12) s = 0;
    if (a == 0 && b == 0) {
      // x^2 / 2: the series is exact, and what is out of its reach is infinite
      q0 = std::numeric_limits<double>::infinity();
    } else if (a == 0) {
      p0 = 1 / (b * b), q0 = -p0, qx = 1 / b;
    } else if (b == 0) {
      q0 = 1 / (a * a), p0 = -q0, px = -1 / a;
    } else if (s == 0) {
      mixed = 1 / (a * a), p0 = -mixed, px = 1 / a;
    } else {
      mixed = -1 / (a * b), p0 = 1 / (b * s), q0 = 1 / (a * s);
    }
    cross_p = mixed == 0 ? 0 : a, cross_q = mixed == 0 ? 0 : b;
    double most = a < 0 ? -a : a;
    most = (b < 0 ? -b : b) > most ? (b < 0 ? -b : b) : most;
    most = (s < 0 ? -s : s) > most ? (s < 0 ? -s : s) : most;
    reach = most == 0 ? 1e30 : 1 / most;
  }
  template <class T>
  OPD_HD void row_sums(const Entry<T>& e, T* sums) const {
    sums[0] = e.student_minus_teacher();
  }
  OPD_HD AlphaBeta with_row_sums(const double* sums) const {
    AlphaBeta out = *this;
    out.offset = sums[0];
    return out;
  }
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const T x = e.gap - T(offset);
    const T ps = exp_of_product(T(s), e.lp, low(s, e.lp, e.lp_low));
    const T qs = exp_of_product(T(s), e.lq, low(s, e.lq, e.lq_low));
    const T cross = exp_of_sum(T(cross_p), e.lp, T(cross_q), e.lq,
                               low(cross_p, e.lp, e.lp_low) + low(cross_q, e.lq, e.lq_low));
    const T by_series =
        ps * (x * x) *
        (phi_over_square(T(s) * x) +
         T(b) * x * phi_over_square_difference(T(s) * x, T(b) * x));
    const T from_p = T(p0) * ps + select(ps == T(0), T(0), zero_times(T(px), x) * ps);
    const T from_q = T(q0) * qs + select(qs == T(0), T(0), zero_times(T(qx), x) * qs);
    const T sum = (T(mixed) * cross + from_p) + from_q;
    // powers that overflow against each other: the term itself grows without bound
    const T directly = (sum == sum) | (x != x) ? sum : std::numeric_limits<T>::infinity();
    const bool near = (x < T(reach)) & (x > T(-reach));
    // NaN stays NaN where an exponent of 0 would leave it out
    return select(e.absent(), T(0), x != x ? x : near ? by_series : directly);
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    const T x = e.gap - T(offset);
    // finite, so that y is 0 where a is
    const T below = x > T(1e30) ? T(1e30) : x;
    const T y = T(-a) * (below < T(-1e30) ? T(-1e30) : below);
    const T qs = exp_of_product(T(s), e.lq, low(s, e.lq, e.lq_low));
    const T cross = exp_of_sum(T(a), e.lp, T(b), e.lq,
                               low(a, e.lp, e.lp_low) + low(b, e.lq, e.lq_low));
    const T slope = T(1) + y * phi_over_square(y);
    const T by_series = select(qs == T(0), T(0), qs * (x * slope));
    const T directly = (qs - cross) * T(inverse_a);
    // a = 0 is always near: y is 0 then, x however large
    const bool near = (y < T(1)) & (y > T(-1));
    return select(e.absent(), T(0), x != x ? x : near ? by_series : directly);
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    AlphaBeta dual(b, a);
    dual.offset = -offset;
    return dual.dterm(e.swapped());
  }

 private:
  // of exponent * x, what its rounded factors have lost
  template <class T>
  OPD_HD static T low(double exponent, T x, T x_low) {
    return T(exponent) * x_low + low_part<T>(exponent) * x;
  }
};

// sum_xv w1(v) w2(x) (d_x - d_v)^2 / 2, d the gap of the logits, w1 and w2 detached: the student's
// law, the teacher's, or uniform over the entries.  dterm = w1 (d - E2 d) + w2 (d - E1 d).
// Concrete score distillation, arXiv:2509.25837.
struct ConcreteScore : Separable {
  static constexpr int kRowSums = 3;
  // w_i = student q + teacher p + uniform
  struct Weight {
    double student, teacher, uniform;
  };
  Weight first, second;
  double mean_first = 0, mean_second = 0;  // E1 and E2 of the gap
  OPD_HD ConcreteScore(Weight first, Weight second, double mean_first = 0, double mean_second = 0)
      : first(first), second(second), mean_first(mean_first), mean_second(mean_second) {}
  // 0: the student's law, 1: the teacher's, 2: uniform
  OPD_HD static Weight weight_of(double kind) {
    return {kind == 0 ? 1.0 : 0.0, kind == 1 ? 1.0 : 0.0, kind == 2 ? 1.0 : 0.0};
  }
  template <class T>
  OPD_HD static T of(const Weight& weight, const Entry<T>& e) {
    const T infinity = std::numeric_limits<T>::infinity();
    // uniform over the tokens that both laws allow
    const bool one_sided = (e.gap == infinity) | (e.gap == -infinity);
    const T uniform = one_sided ? T(0) : T(weight.uniform);
    const T value = T(weight.student) * e.q + T(weight.teacher) * e.p + uniform;
    return select(e.absent(), T(0), value);
  }
  // weight * value, where a weight of 0 wins over an infinite gap
  template <class T>
  OPD_HD static T weighted(T weight, T value) {
    return select(weight == T(0), T(0), weight * value);
  }
  template <class T>
  OPD_HD void row_sums(const Entry<T>& e, T* sums) const {
    sums[0] = weighted(of(first, e), e.gap);
    sums[1] = weighted(of(second, e), e.gap);
    sums[2] = of(Weight{0, 0, 1}, e);
  }
  OPD_HD ConcreteScore with_row_sums(const double* sums) const {
    const double count = sums[2];
    ConcreteScore out(first, second);
    out.first.uniform = first.uniform / count;
    out.second.uniform = second.uniform / count;
    out.mean_first = first.uniform == 0 ? sums[0] : sums[0] / count;
    out.mean_second = second.uniform == 0 ? sums[1] : sums[1] / count;
    return out;
  }
  OPD_HD double value(double sum) const {
    // an infinite gap makes its own mean infinite, and inf - inf would hide it
    const double infinity = std::numeric_limits<double>::infinity();
    const bool finite = mean_first - mean_first == 0 && mean_second - mean_second == 0;
    const bool defined = mean_first == mean_first && mean_second == mean_second;
    const double apart = mean_first - mean_second;
    return finite || !defined ? sum + 0.5 * apart * apart : infinity;
  }
  template <class T>
  OPD_HD T term(const Entry<T>& e) const {
    const T x = e.gap - T(mean_first), y = e.gap - T(mean_second);
    return T(0.5) * (weighted(of(first, e), x * x) + weighted(of(second, e), y * y));
  }
  template <class T>
  OPD_HD T dterm(const Entry<T>& e) const {
    return weighted(of(first, e), e.gap - T(mean_second)) +
           weighted(of(second, e), e.gap - T(mean_first));
  }
  template <class T>
  OPD_HD T dterm_teacher(const Entry<T>& e) const {
    return -dterm(e);
  }
};

// X(id, name, functor from (double param0, double param1)). Ids are part of the C ABI: append only.
#define OPD_DIVERGENCES(X)                                         \
  X(0, forward_kl, ForwardKl{})                                    \
  X(1, reverse_kl, ReverseKl{})                                    \
  X(2, jsd, Jsd(param0))                                           \
  X(3, skew_forward_kl, SkewForwardKl(param0))                     \
  X(4, skew_reverse_kl, SkewReverseKl(param0, 1 - param1))         \
  X(5, total_variation, TotalVariation{})                          \
  X(6, jeffreys, Jeffreys(param0))                                 \
  X(7, squared_hellinger, Alpha(0.5, 0.25))                        \
  X(8, alpha, Alpha(param0))                                       \
  X(9, renyi, Renyi(param0))                                       \
  X(10, pearson_chi2, Alpha(2, 2))                                 \
  X(11, neyman_chi2, Alpha(-1, 2))                                 \
  X(12, todi, Todi{})                                              \
  X(13, adaptive_kl, AdaptiveKl(param0))                           \
  X(14, alpha_beta, AlphaBeta(param0, param1))                     \
  X(15, concrete_score,                                            \
    ConcreteScore(ConcreteScore::weight_of(param0), ConcreteScore::weight_of(param1)))

// -sum_k weight_k log q(label_k): no term of p, so the kernels add it beside the sum over V.
constexpr int kCrossEntropy = 16;

// Calls fn with the functor of this id; false if there is none. fn decides whether this may be called
// on the device.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
template <class Fn>
__host__ __device__ __forceinline__
#else
template <class Fn>
#endif
bool visit_divergence(int id, double param0, double param1, Fn&& fn) {
  (void)param0, (void)param1;
  switch (id) {
#define OPD_CASE(ID, NAME, ...) \
  case ID:                      \
    fn(__VA_ARGS__);            \
    return true;
    OPD_DIVERGENCES(OPD_CASE)
#undef OPD_CASE
    default:
      return false;
  }
}

}  // namespace opd
