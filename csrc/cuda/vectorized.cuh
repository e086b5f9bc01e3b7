// SPDX-License-Identifier: Apache-2.0
// 16 bytes of a row at a time, as float: 4 float32 or 8 16-bit values.
#pragma once

#include "half.h"
#include "launch.h"
#include "opd/math.h"

namespace opd {
namespace cuda {

template <class Storage>
constexpr int kPerLoad = static_cast<int>(16 / sizeof(Storage));

OPD_HD bool is_aligned_16(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// A GPU faults where a vector access is not aligned, a CPU does not.
OPD_HD void expect_aligned([[maybe_unused]] const void* pointer, [[maybe_unused]] int bytes) {
#if defined(OPD_EMULATED)
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) emulation::fail("an unaligned vector access");
#endif
}

// 16 bytes as they are: what is on its way from memory needs no room as float.
template <class Storage>
__device__ __forceinline__ uint4 load_bits(const Storage* __restrict__ from) {
  expect_aligned(from, 16);
  return *reinterpret_cast<const uint4*>(from);
}

template <class Storage>
__device__ __forceinline__ void values_of(uint4 bits, float* values) {
  union {
    uint4 bits;
    Storage items[kPerLoad<Storage>];
  } chunk;
  chunk.bits = bits;
#pragma unroll
  for (int i = 0; i < kPerLoad<Storage>; ++i) values[i] = to_real(chunk.items[i]);
}

// one instruction for each: a bfloat16 is the upper half of its float
template <>
__device__ __forceinline__ void values_of<BFloat16>(uint4 bits, float* values) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = detail::bits_to_float(static_cast<int32_t>(words[i] << 16));
    values[2 * i + 1] = detail::bits_to_float(static_cast<int32_t>(words[i] & 0xffff0000u));
  }
}

// values[0 .. kPerLoad) of a 16-byte address.
template <class Storage>
__device__ __forceinline__ void load_16(const Storage* __restrict__ from, float* values) {
  values_of<Storage>(load_bits(from), values);
}

template <class Storage>
__device__ __forceinline__ void store_16(const float* values, Storage* __restrict__ to) {
  union {
    uint4 bits;
    Storage items[kPerLoad<Storage>];
  } chunk;
#pragma unroll
  for (int i = 0; i < kPerLoad<Storage>; ++i) from_real(values[i], &chunk.items[i]);
  expect_aligned(to, 16);
  *reinterpret_cast<uint4*>(to) = chunk.bits;
}

}  // namespace cuda
}  // namespace opd
