// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 as bit patterns, converted without branches so that loops vectorise.
#pragma once

#include <cstdint>

#include "opd/math.h"

namespace opd {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

OPD_HD float to_real(float x) { return x; }
OPD_HD double to_real(double x) { return x; }

OPD_HD float to_real(BFloat16 x) {
  return detail::bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16));
}

OPD_HD float to_real(Float16 x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  // a power-of-two product rebiases the exponent and normalises subnormals in one step
  const float rebiased =
      detail::bits_to_float(static_cast<int32_t>(magnitude)) * 5.192296858534828e+33f;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return detail::bits_to_float(
      static_cast<int32_t>(static_cast<uint32_t>(detail::float_to_bits(rebiased)) | special | sign));
#endif
}

OPD_HD void from_real(float x, float* out) { *out = x; }
OPD_HD void from_real(double x, double* out) { *out = x; }

// round to nearest even; a NaN stays one
OPD_HD void from_real(float x, BFloat16* out) {
  const uint32_t bits = static_cast<uint32_t>(detail::float_to_bits(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

OPD_HD void from_real(float x, Float16* out) {
  const uint32_t bits = static_cast<uint32_t>(detail::float_to_bits(x));
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // normal: rebias and round to nearest even on the 13 dropped bits
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // subnormal: adding 0.5 aligns the value so that the low bits are the rounded half significand
  const float aligned = detail::bits_to_float(static_cast<int32_t>(magnitude)) + 0.5f;
  const uint32_t subnormal = static_cast<uint32_t>(detail::float_to_bits(aligned)) - 0x3f000000u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = x != x ? 0x7e00u : result;
  out->bits = static_cast<uint16_t>(result | sign);
}

}  // namespace opd
