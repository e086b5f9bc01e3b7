// SPDX-License-Identifier: Apache-2.0
// What a row of two laws is made of on a GPU: scales, log-sum-exps in base 2, entries.
#pragma once

#include <type_traits>

#include "cluster.cuh"
#include "half.h"
#include "opd/divergences.h"
#include "tuning.h"

namespace opd {
namespace cuda {

// A side's logits are factor * what is stored. exponents_of is what they are multiplied by for base
// 2: log2(e) * factor, rounded; every exponential of a row uses the same one, so that the laws are
// normalised exactly and the rounding is a temperature of 1 + 6e-8.
struct Factor {
  double factor;
  float exponents;
};

OPD_HD Factor factor_of(double scale, double temperature) {
  constexpr double kLog2E = 1.4426950408889634;
  const double factor = scale / temperature;
  return {factor, static_cast<float>(factor * kLog2E)};
}

// A sum of exponentials relative to 2^shift.
struct ScaledSum {
  double shift, sum;
  // log2 of it
  OPD_HD double log2_sum() const { return shift + ::log2(sum); }
};

OPD_HD float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);  // never part of a fused multiply-add
#else
  return a * b;
#endif
}
// The one that is not NaN.
OPD_HD float at_least(float a, float b) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, b);
#else
  return std::fmax(a, b);
#endif
}

// What turns the two logits of a column into an entry.
struct RowLaws {
  struct Side {
    float exponents, shift, scale;  // probability = scale * 2^(exponents * logit - shift)
    float factor, factor_low;       // log-probability = factor * logit - lse
    float lse, lse_low;
  } student, teacher;
  float ratio;          // of the factors, student / teacher
  float gap, gap_low;   // lse of the student - lse of the teacher
};
static_assert(sizeof(RowLaws) <= kScalarBytes - 32, "tuning.h must leave room for a row's scalars");

OPD_HD RowLaws::Side side_of(const Factor& factor, double log2_sum, double* lse) {
  // exponents / log2(e) is not quite the factor: to first order the entropy times the difference
  *lse = log2_sum * (factor.factor / static_cast<double>(factor.exponents));
  const double shift = ::rint(log2_sum);
  RowLaws::Side side;
  side.exponents = factor.exponents;
  side.shift = static_cast<float>(shift);
  side.scale = static_cast<float>(::exp2(shift - log2_sum));
  side.factor = static_cast<float>(factor.factor);
  side.factor_low = low_part<float>(factor.factor);
  side.lse = static_cast<float>(*lse);
  side.lse_low = low_part<float>(*lse);
  return side;
}

OPD_HD RowLaws laws_of(const Factor& student, const Factor& teacher, double student_log2_sum,
                       double teacher_log2_sum, double* student_lse, double* teacher_lse) {
  RowLaws laws;
  laws.student = side_of(student, student_log2_sum, student_lse);
  laws.teacher = side_of(teacher, teacher_log2_sum, teacher_lse);
  laws.ratio = static_cast<float>(student.factor / teacher.factor);
  const double gap = *student_lse - *teacher_lse;
  laws.gap = static_cast<float>(gap);
  laws.gap_low = low_part<float>(gap);
  return laws;
}

// What NaN stands for in what a rounding has lost: the value is infinite, and this does not change it.
constexpr float kNothingLost = -1e30f;

// factor * logit - lse in one rounding, and what that has lost.
OPD_HD float log_probability(float logit, const RowLaws::Side& side, float* low) {
  const float scaled = product(logit, side.factor);
  const float lost_product =
      detail::fma_device(logit, side.factor, -scaled) + logit * side.factor_low;
  float lost;
  const float below = difference(scaled, side.lse, &lost);
  const float finite = lost_product - lost_product == 0.0f ? lost_product : 0.0f;
  const float lse_low = side.lse_low - side.lse_low == 0.0f ? side.lse_low : 0.0f;
  return difference(below, lse_low - (lost + finite), low);
}

// ... in two
OPD_HD float log_probability(float logit, const RowLaws::Side& side) {
  const float low = detail::fma_device(logit, side.factor_low, -side.lse_low);
  const float high = detail::fma_device(logit, side.factor, -side.lse);
  return high + (low - low == 0.0f ? low : 0.0f);
}

template <bool kLowParts>
OPD_HD Entry<float> entry_of(float student, float teacher, const RowLaws& laws) {
  Entry<float> e;
  const RowLaws::Side& s = laws.student;
  const RowLaws::Side& t = laws.teacher;
  e.q = s.scale * detail::exp2_device(detail::fma_device(student, s.exponents, -s.shift));
  e.p = t.scale * detail::exp2_device(detail::fma_device(teacher, t.exponents, -t.shift));
  // difference() of math.h, but that an infinite one costs a single instruction
  const float scaled = product(laws.ratio, student);
  const float apart = scaled - teacher;
  const float back = apart - scaled;
  const float lost = at_least((scaled - (apart - back)) - (teacher + back), kNothingLost);
  e.gap = detail::fma_device(t.factor, apart, -laws.gap) +
          detail::fma_device(t.factor, lost, -laws.gap_low);
  if constexpr (kLowParts) {
    e.lq = log_probability(student, s, &e.lq_low);
    e.lp = log_probability(teacher, t, &e.lp_low);
  } else {
    e.lq = log_probability(student, s);
    e.lp = log_probability(teacher, t);
  }
  return e;
}

// -- two 16-bit values, one instruction -----------------------------------------------------------

template <class Storage>
__device__ __forceinline__ unsigned pack(float first, float second) {
#if defined(__CUDA_ARCH__)
  unsigned both;
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  }
  return both;
#else
  Storage low, high;
  from_real(first, &low), from_real(second, &high);
  return low.bits | static_cast<unsigned>(high.bits) << 16;
#endif
}

__device__ __forceinline__ void store_quad(const float* values, float* to) {
  *reinterpret_cast<float4*>(to) = {values[0], values[1], values[2], values[3]};
}
template <class Storage>
__device__ __forceinline__ void store_quad(const float* values, Storage* to) {
  *reinterpret_cast<uint2*>(to) = {pack<Storage>(values[0], values[1]),
                                   pack<Storage>(values[2], values[3])};
}

}  // namespace cuda
}  // namespace opd
