// SPDX-License-Identifier: Apache-2.0
// What a row of two laws is made of on a GPU: scales, log-sum-exps, entries.
#pragma once

#include <type_traits>

#include "cluster.cuh"
#include "half.h"
#include "opd/divergences.h"
#include "reduce.cuh"
#include "tuning.h"

namespace opd {
namespace cuda {

// A side's logits are factor * what is stored, and e to them is 2^(exponents * what is stored).
// Every exponential of a row uses the same rounded `exponents`, so that its law is normalised
// exactly and the rounding is a temperature of 1 + 6e-8. Both are positive.
struct Factor {
  double factor;
  float exponents;
};

OPD_HD Factor factor_of(double scale, double temperature) {
  constexpr double kLog2E = 1.4426950408889634;
  const double factor = scale / temperature;
  return {factor, static_cast<float>(factor * kLog2E)};
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
static_assert(sizeof(RowLaws) <= kScalarBytes - 48, "tuning.h must leave room for a row's scalars");

// A sum of exponentials relative to that of the largest logit, as stored.
struct RelativeSum {
  double largest, sum;
};

OPD_HD RowLaws::Side side_of(const Factor& factor, const RelativeSum& of, double* lse) {
  constexpr double kLn2 = 0.6931471805599453;
  const double above = ::log2(of.sum);
  *lse = of.largest * factor.factor + above * kLn2;
  const double log2_sum = of.largest * static_cast<double>(factor.exponents) + above;
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

OPD_HD RowLaws laws_of(const Factor& student, const Factor& teacher, const RelativeSum& student_sum,
                       const RelativeSum& teacher_sum, double* student_lse, double* teacher_lse) {
  RowLaws laws;
  laws.student = side_of(student, student_sum, student_lse);
  laws.teacher = side_of(teacher, teacher_sum, teacher_lse);
  laws.ratio = static_cast<float>(student.factor / teacher.factor);
  const double gap = *student_lse - *teacher_lse;
  laws.gap = static_cast<float>(gap);
  laws.gap_low = low_part<float>(gap);
  return laws;
}

// -- log-sum-exps --------------------------------------------------------------------------------

constexpr int kNoColumn = 0x7fffffff;

__device__ __forceinline__ float largest_of(const float4& x) {
  return detail::max_device(detail::max_device(x.x, x.y), detail::max_device(x.z, x.w));
}

// Over the lanes of a warp, none of which is NaN.
__device__ __forceinline__ float warp_largest(float value) {
  // order of the whole numbers is order of the values
  const int bits = detail::float_to_bits(value);
  const int largest = __reduce_max_sync(kAllLanes, bits >= 0 ? bits : bits ^ 0x7fffffff);
  return detail::bits_to_float(largest >= 0 ? largest : largest ^ 0x7fffffff);
}

// Two sums over a warp at once: the first in lanes 0 .. 15, the second in the others.
__device__ __forceinline__ double reduce_pair(double first, double second, int lane) {
  constexpr int kHalf = kWarp / 2;
  const bool low = lane < kHalf;
  const double other = __shfl_xor_sync(kAllLanes, low ? second : first, kHalf);
  double sum = (low ? first : second) + other;
#pragma unroll
  for (int distance = kHalf / 2; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  }
  return sum;
}

// A lane's part of a side's sum, relative to the largest logit that its warp has seen.
template <bool kWithColumn>
struct LaneLse {
  float exponents, largest, reference;
  float sums[4];
  int column;  // the first that attains the largest, of this warp's columns

  __device__ __forceinline__ void begin(float with_exponents) {
    exponents = with_exponents, largest = kMinusInfinity, reference = 0.0f, column = kNoColumn;
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = 0.0f;
  }
  // The same in every lane.
  __device__ __forceinline__ void raise(float to) {
    if (!(to > largest)) return;
    const float scale = detail::exp2_device((largest - to) * exponents);
    // nothing but -inf so far: the sums are 0, or NaN
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] *= scale;
    largest = reference = to;
    column = kNoColumn;
  }
  __device__ __forceinline__ void add(const float4& quad, int first_column) {
    const float logits[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sums[j] += detail::exp2_device((logits[j] - reference) * exponents);
      if constexpr (kWithColumn) {
        // columns come in order
        const bool first =
            (logits[j] == largest) & (column == kNoColumn) & (largest != kMinusInfinity);
        column = first ? first_column + j : column;
      }
    }
  }
  __device__ __forceinline__ double sum() const {
    double sum = sums[0];
#pragma unroll
    for (int j = 1; j < 4; ++j) sum += sums[j];
    return sum;
  }
};

// -- entries -------------------------------------------------------------------------------------

// What NaN stands for in what a rounding has lost: the value is infinite, and this does not change
// it.
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

OPD_HD float probability(float logit, const RowLaws::Side& side) {
  return side.scale * detail::exp2_device(detail::fma_device(logit, side.exponents, -side.shift));
}

template <bool kLowParts>
OPD_HD Entry<float> entry_of(float student, float teacher, const RowLaws& laws) {
  Entry<float> e;
  const RowLaws::Side& s = laws.student;
  const RowLaws::Side& t = laws.teacher;
  e.q = probability(student, s);
  e.p = probability(teacher, t);
  // difference() of math.h, but that an infinite one costs a single instruction
  const float scaled = product(laws.ratio, student);
  const float apart = scaled - teacher;
  const float back = apart - scaled;
  const float lost = detail::max_device((scaled - (apart - back)) - (teacher + back), kNothingLost);
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

// -- two 16-bit values, one instruction ----------------------------------------------------------

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
