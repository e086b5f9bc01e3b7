// SPDX-License-Identifier: Apache-2.0
// Scalar maths shared by the CPU and CUDA kernels. Host float versions are branch-free polynomials
// so that the compiler vectorises the loops they sit in; device and double versions call the
// standard functions. Accuracy of the host float versions: docs/numerics.md, section "Elementary
// functions"; held by tests/csrc/test_math.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__FAST_MATH__)
#error "opd must not be compiled with -ffast-math or -Ofast: they drop inf, NaN and the rounding tricks"
#endif

// The float32 forms that a GPU takes: its own exp2 and log2, and no polynomial twice. Kernels that
// tests run on a CPU in the place of a GPU take them too.
#if defined(__CUDA_ARCH__) || defined(OPD_EMULATED)
#define OPD_DEVICE_FORMS 1
#else
#define OPD_DEVICE_FORMS 0
#endif

#if defined(__CUDACC__)
#define OPD_HD __host__ __device__ __forceinline__
#else
#define OPD_HD inline __attribute__((always_inline))
#endif

namespace opd {

template <class T>
OPD_HD T select(bool condition, T if_true, T if_false) {
  return condition ? if_true : if_false;
}

namespace detail {

OPD_HD float bits_to_float(int32_t bits) {
#if defined(__CUDA_ARCH__)
  return __int_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

OPD_HD int32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_int(value);
#else
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// x = n ln 2 + r, |r| <= ln 2 / 2; returns expm1(r) and 2^n. Needs -87.3 <= x <= 88.
OPD_HD float expm1_reduced(float x, float* scale) {
  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low mantissa bits
  const float shifter = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440054690583e-4f;
  const uint32_t exponent = static_cast<uint32_t>(float_to_bits(shifted)) << 23;
  *scale = bits_to_float(static_cast<int32_t>(exponent + (127u << 23)));
  // in pairs, whose products do not wait for each other
  const float square = r * r;
  const float low = 0.1666666716337204f * r + 0.5f;
  const float middle = 8.33328440785408e-3f * r + 4.166645556688309e-2f;
  const float high = 1.9908904505427957e-4f * r + 1.3934543821960688e-3f;
  return ((high * square + middle) * square + low) * square + r;
}

// log(1 + f) for sqrt(1/2) <= 1 + f <= sqrt(2), exact in f.
OPD_HD float log1p_reduced(float f) {
  float poly = -7.859894633293152e-2f;
  poly = poly * f + 0.12885838747024536f;
  poly = poly * f - 0.13130463659763336f;
  poly = poly * f + 0.14180703461170197f;
  poly = poly * f - 0.16624347865581512f;
  poly = poly * f + 0.20002302527427673f;
  poly = poly * f - 0.25000816583633423f;
  poly = poly * f + 0.33333316445350647f;
  const float square = f * f;
  return f - 0.5f * square + (square * f) * poly;
}

// 2 ulp; results below 2^-126 are 0. Of a NaN, NaN.
OPD_HD float exp2_device(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0.0f : result;
#endif
}

// 2^-22, absolute between 1/2 and 2, relative beyond.
OPD_HD float log2_device(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return std::log2(x);
#endif
}

OPD_HD float fma_device(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// The one that is not NaN.
OPD_HD float max_device(float a, float b) {
#if defined(__CUDA_ARCH__)
  return ::fmaxf(a, b);
#else
  return std::fmax(a, b);
#endif
}

// x where a 0 beside it is to win: finite or +inf, and no NaN.
OPD_HD float above_infinity(float x) { return max_device(x, -1e38f); }

// One comparison on a GPU.
OPD_HD bool within_one(float x) {
#if defined(__CUDA_ARCH__)
  return ::fabsf(x) < 1.0f;
#else
  return (x < 1.0f) & (x > -1.0f);
#endif
}

}  // namespace detail

// e^x. Exactly 0 for x < -87.33 (so exp(-inf) == 0), inf for x > 88, NaN for NaN.
OPD_HD float exp(float x) {
#if defined(__CUDA_ARCH__)
  return ::expf(x);
#else
  const float low = -87.33f;
  const float high = 88.0f;
  float clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  float scale;
  const float em1 = detail::expm1_reduced(clamped, &scale);
  float result = em1 * scale + scale;
  result = x < low ? 0.0f : result;
  return x > high ? std::numeric_limits<float>::infinity() : result;
#endif
}

// (e^x - 1 - x) / x^2 for |x| < 1, by its series; 1/2 at 0.
OPD_HD float phi_over_square(float x) {
#if OPD_DEVICE_FORMS
  float poly = 2.7722801405616337e-6f;
  poly = poly * x + 2.535482963139657e-5f;
  poly = poly * x + 1.9844024791382253e-4f;
  poly = poly * x + 1.388545148074627e-3f;
  poly = poly * x + 8.33331048488617e-3f;
  poly = poly * x + 4.166673496365547e-2f;
  poly = poly * x + 0.1666666716337204f;
  return poly * x + 0.5f;
#else
  const float square = x * x;
  const float first = 0.1666666716337204f * x + 0.5f;
  const float second = 8.33331048488617e-3f * x + 4.166673496365547e-2f;
  const float third = 1.9844024791382253e-4f * x + 1.388545148074627e-3f;
  const float fourth = 2.7722801405616337e-6f * x + 2.535482963139657e-5f;
  return (fourth * square + third) * (square * square) + (second * square + first);
#endif
}

// e^x and e^x - 1 for x <= 0, both right to the last bits.
template <class T>
struct ExpPair {
  T exp, expm1;
};

// Exactly 0 and -1 below -87.33 and at -inf; NaN for NaN.
OPD_HD ExpPair<float> exp_pair_nonpositive(float x) {
#if OPD_DEVICE_FORMS
  constexpr float kLog2E = 1.44269502f, kLog2ELow = 1.92596303e-8f, kLn2 = 0.693147182f;
  const float exponent = x * kLog2E;
  const float rounded = detail::exp2_device(exponent);
  // what the rounded exponent has lost; -1 where that is NaN, since x is infinite
  const float lost = detail::max_device(
      detail::fma_device(x, kLog2ELow, detail::fma_device(x, kLog2E, -exponent)), -1.0f);
  const float near = x + (x * x) * phi_over_square(x);
  const float far = rounded - 1.0f;
  return {detail::fma_device(rounded, lost * kLn2, rounded), x > -1.0f ? near : far};
#else
  const float low = -87.33f;
  const float clamped = x < low ? low : x;
  float scale;
  const float em1 = detail::expm1_reduced(clamped, &scale);
  const float full = em1 * scale + scale;
  return {x < low ? 0.0f : full, em1 * scale + (scale - 1.0f)};
#endif
}

// log(keep + weight e^x) for x <= 0 and keep + weight = 1, from the pair of x: right near x = 0,
// where it is log1p(weight expm1(x)), and for either weight however small. NaN for NaN.
OPD_HD float log_mix(ExpPair<float> pair, float keep, float weight) {
  const float value = keep + weight * pair.exp;
  const float f = weight * pair.expm1;
#if OPD_DEVICE_FORMS
  // both, without a branch, so that term and dterm share them
  constexpr float kLn2 = 0.693147182f;
  const float near = detail::log1p_reduced(f);
  const float far = detail::log2_device(value) * kLn2;
  return value > 0.7071f ? near : far;
#else
  const int32_t bits = detail::float_to_bits(value);
  // exponent relative to sqrt(1/2), so that the mantissa lands in [sqrt(1/2), sqrt(2))
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const uint32_t rebased = static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23);
  const float mantissa = detail::bits_to_float(static_cast<int32_t>(rebased));
  const float reduced = exponent == 0 ? f : mantissa - 1.0f;
  const float n = static_cast<float>(exponent);
  const float result =
      (n * -2.12194440054690583e-4f + detail::log1p_reduced(reduced)) + n * 0.693359375f;
  return value == value ? result : value;
#endif
}

// exp where x is at most 0 but for rounding: on a CPU a case less.
OPD_HD float exp_nonpositive(float x) {
#if OPD_DEVICE_FORMS
  return exp(x);
#else
  return exp_pair_nonpositive(x).exp;
#endif
}

OPD_HD double exp(double x) { return ::exp(x); }
OPD_HD double exp_nonpositive(double x) { return ::exp(x); }
OPD_HD ExpPair<double> exp_pair_nonpositive(double x) { return {::exp(x), ::expm1(x)}; }
OPD_HD double log_mix(ExpPair<double> pair, double keep, double weight) {
  const double value = keep + weight * pair.exp;
  return value > 0.7071 ? ::log1p(weight * pair.expm1) : ::log(value);
}

// a - b as the rounded difference and what rounding lost: the sum of both is exact. What was lost
// counts as 0 where the difference is not finite.
template <class T>
OPD_HD T difference(T a, T b, T* lost) {
  const T d = a - b;
  const T back = d - a;
  const T error = (a - (d - back)) - (b + back);
  *lost = select(d - d == T(0), error, T(0));
  return d;
}

// a * b, never as a part of a fused multiply-add.
#if defined(__CUDA_ARCH__)
OPD_HD float product(float a, float b) { return __fmul_rn(a, b); }
OPD_HD double product(double a, double b) { return __dmul_rn(a, b); }
#else
template <class T>
OPD_HD T product(T a, T b) {
  return a * b;
}
#endif

// Of an exponent: nothing is subtracted.
struct Unshifted {};

// sum - shift; what rounding it loses is added to `lost`.
template <class T>
OPD_HD T shifted(T sum, T shift, T* lost) {
  T more;
  const T result = difference(sum, shift, &more);
  *lost += more;
  return result;
}
template <class T>
OPD_HD T shifted(T sum, Unshifted, T*) {
  return sum;
}

// a * x - value in one rounding.
template <class T>
OPD_HD T beyond(T a, T x, T value) {
#if defined(__CUDA_ARCH__)
  return fma(a, x, -value);
#else
  return std::fma(a, x, -value);
#endif
}

// a * x and, in `lost`, what rounding it has lost. A factor of 0 leaves its side out, infinite or not.
template <class T>
OPD_HD T exact_product(T a, T x, T* lost) {
  const T value = select(a == T(0), T(0), product(a, x));
  *lost = beyond(a, x, value);
  return value;
}

// e^(first + second - shift + low), low small, the rounding of the exponent put back: at an exponent
// of 60 it alone would cost 4e-6 of the result.
template <class T, class Shift>
OPD_HD T exp_of_parts(T first, T second, Shift shift, T low) {
  const T sum = first + second;
  const T back = sum - first;
  T lost = (first - (sum - back)) + (second - back);
  const T exponent = shifted(sum, shift, &lost);
  lost += low;
  const T value = exp(exponent);
  const T more = value * lost;
  // nothing is lost where something is infinite
  return select(more - more == T(0), value + more, value);
}

// e^(a x + b y + low).
template <class T>
OPD_HD T exp_of_sum(T a, T x, T b, T y, T low) {
  T first_lost, second_lost;
  const T first = exact_product(a, x, &first_lost);
  const T second = exact_product(b, y, &second_lost);
  return exp_of_parts(first, second, Unshifted{}, (first_lost + second_lost) + low);
}

// e^(a x + low).
template <class T>
OPD_HD T exp_of_product(T a, T x, T low) {
  T lost;
  const T exponent = exact_product(a, x, &lost);
  lost += low;
  const T value = exp(exponent);
  const T more = value * lost;
  return select(more - more == T(0), value + more, value);
}

OPD_HD double phi_over_square(double x) {
  // 1 / (k + 2)!; the term after the last is below 1e-22 at |x| = 1
  double factorial_inverse[21];
  factorial_inverse[0] = 0.5;
  for (int k = 1; k < 21; ++k) factorial_inverse[k] = factorial_inverse[k - 1] / (k + 2);
  double poly = 0.0;
  for (int k = 20; k >= 0; --k) poly = poly * x + factorial_inverse[k];
  return poly;
}

// (phi_over_square(x) - phi_over_square(y)) / (x - y) for |x|, |y| < 1, without the cancellation.
template <class T>
OPD_HD T phi_over_square_difference(T x, T y) {
  // Horner's rule on 1 / (k + 2)! and, beside it, on its divided difference
  T value, slope;
  if constexpr (sizeof(T) == sizeof(float)) {
    // written out: an inner loop would keep the caller's from being vectorised
    value = T(1.0 / 39916800), slope = T(0);
#define OPD_HORNER(COEFFICIENT) slope = slope * x + value, value = value * y + T(COEFFICIENT)
    OPD_HORNER(1.0 / 3628800), OPD_HORNER(1.0 / 362880), OPD_HORNER(1.0 / 40320);
    OPD_HORNER(1.0 / 5040), OPD_HORNER(1.0 / 720), OPD_HORNER(1.0 / 120);
    OPD_HORNER(1.0 / 24), OPD_HORNER(1.0 / 6), OPD_HORNER(1.0 / 2);
#undef OPD_HORNER
  } else {
    T factorial_inverse[21];
    factorial_inverse[0] = T(0.5);
    for (int k = 1; k < 21; ++k) factorial_inverse[k] = factorial_inverse[k - 1] / T(k + 2);
    value = factorial_inverse[20], slope = T(0);
    for (int k = 19; k >= 0; --k) {
      slope = slope * x + value;
      value = value * y + factorial_inverse[k];
    }
  }
  return slope;
}

// a * phi(x) with phi(x) = e^x - 1 - x >= 0 and b = a e^x: the Bregman form of a KL summand, which
// keeps its relative accuracy as b -> a, where a * (-x) alone would cancel over the row.
// a == 0 gives b, its limit.
OPD_HD float bregman(float a, float b, float x) {
  const float near = a * ((x * x) * phi_over_square(x));
#if OPD_DEVICE_FORMS
  // a = 0 needs no case of its own
  const float far = (b - a) + a * detail::above_infinity(-x);
  return detail::within_one(x) ? near : far;
#else
  const float far = (b - a) - a * x;
  const float value = (x < 1.0f && x > -1.0f) ? near : far;
  return a == 0.0f ? b : value;
#endif
}

// a * x, where a = 0 leaves nothing of an x of +inf, of -inf, or of none.
template <class T>
OPD_HD T zero_wins(T a, T x) {
  return select(a == T(0), T(0), a * x);
}
#if OPD_DEVICE_FORMS
// x is -inf only where a is 0; shares its instructions with bregman(a, b, -x)
OPD_HD float zero_wins(float a, float x) { return a * detail::above_infinity(x); }
#endif

OPD_HD double bregman(double a, double b, double x) {
  if (a == 0.0) return b;
  return (x < 1.0 && x > -1.0) ? a * (x * x * phi_over_square(x)) : (b - a) - a * x;
}

}  // namespace opd
