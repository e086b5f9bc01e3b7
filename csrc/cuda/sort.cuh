// SPDX-License-Identifier: Apache-2.0
// A bitonic sort of numbers in a block's shared memory.
#pragma once

#include "launch.h"

namespace opd {
namespace cuda {

struct Larger {
  template <class Key>
  __device__ __forceinline__ bool operator()(Key a, Key b) const {
    return b < a;
  }
};

struct Smaller {
  template <class Key>
  __device__ __forceinline__ bool operator()(Key a, Key b) const {
    return a < b;
  }
};

// In place: `before(a, b)` says which of two keys comes first. `count` is a power of 2, all
// num_threads of the block come. Begins and ends with a barrier.
template <class Key, class Before>
__device__ __forceinline__ void sort_block(Key* keys, unsigned count, unsigned num_threads,
                                           Before before) {
  for (unsigned size = 2; size <= count; size *= 2) {
    for (unsigned stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (unsigned pair = threadIdx.x; pair < count / 2; pair += num_threads) {
        const unsigned left = 2 * pair - (pair & (stride - 1)), right = left + stride;
        const Key a = keys[left], b = keys[right];
        const bool is_in_order = (left & size) == 0;
        if (before(b, a) == is_in_order) {
          keys[left] = b;
          keys[right] = a;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace cuda
}  // namespace opd
