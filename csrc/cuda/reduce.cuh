// SPDX-License-Identifier: Apache-2.0
// Reductions over the threads of a warp and of a block, in an order that is always the same.
#pragma once

#include <limits>

#include "launch.h"

namespace opd {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.4426950408889634f;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// A NaN on either side stays: fmax would drop it.
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return (a > b) | (a != a) ? a : b;
  }
};

struct Min {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

struct BitOr {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a | b;
  }
};

// Every lane gets the result; a butterfly adds the same pairs in every lane, so all agree bit for bit.
template <class Op, class T>
__device__ __forceinline__ T reduce_warp(T value, Op op) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sum of this lane's value and those of the lanes before it.
template <class T>
__device__ __forceinline__ T sum_to_lane(T value) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T left = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(distance));
    if (static_cast<int>(threadIdx.x % kWarp) >= distance) value += left;
  }
  return value;
}

// Every thread gets the result. `scratch`: 32 values of shared memory that nobody else is using; it
// may be used again after the call. blockDim.x is a multiple of 32.
template <class Op, class T>
__device__ __forceinline__ T reduce_block(T value, T* scratch, T identity, Op op) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  value = reduce_warp(value, op);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  const int num_warps = blockDim.x / kWarp;
  value = reduce_warp(lane < num_warps ? scratch[lane] : identity, op);
  __syncthreads();
  return value;
}

}  // namespace cuda
}  // namespace opd
