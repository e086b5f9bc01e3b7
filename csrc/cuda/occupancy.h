// SPDX-License-Identifier: Apache-2.0
// How many clusters of a kernel a device holds at once. A device is asked once for each shape: a
// query takes microseconds, a launch may not. No locks and no memory of its own, so that any thread
// may launch, also into a stream whose work is captured.
#pragma once

#include <atomic>

#include "launch.h"

namespace opd {
namespace cuda {

// Numbers by key, kept by whoever finds them first; what there is no room for is found again. Keys
// have 40 bits, numbers 23.
class KnownNumbers {
 public:
  bool find(uint64_t key, int* number) const {
    for (int i = 0; i < kNear; ++i) {
      const uint64_t entry = entries_[place(key, i)].load(std::memory_order_acquire);
      if (entry == 0) return false;
      if (entry >> kNumberBits != key) continue;
      *number = static_cast<int>(entry & kLargest) - 1;
      return true;
    }
    return false;
  }
  void put(uint64_t key, int number) {
    const bool fits = number >= 0 && static_cast<uint64_t>(number) < kLargest;
    if (!fits || key >> (64 - kNumberBits) != 0) return;
    const uint64_t entry = key << kNumberBits | (static_cast<uint64_t>(number) + 1);
    for (int i = 0; i < kNear; ++i) {
      uint64_t empty = 0;
      if (entries_[place(key, i)].compare_exchange_strong(empty, entry)) return;
      if (empty == entry) return;
    }
    entries_[place(key, 0)].store(entry, std::memory_order_release);
  }

 private:
  static constexpr int kEntries = 64, kNear = 8, kNumberBits = 24;
  static constexpr uint64_t kLargest = (uint64_t{1} << kNumberBits) - 1;
  static int place(uint64_t key, int i) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
    return static_cast<int>((key * kOdd >> 58) + static_cast<uint64_t>(i)) % kEntries;
  }
  std::atomic<uint64_t> entries_[kEntries] = {};
};

// All the shared memory that a block of the current device may have, and clusters of any size.
template <class Kernel>
void allow_any_shape(Kernel kernel) {
  allow_shared_memory(kernel);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
             "cluster size");
}

// Clusters of this shape that the current device holds at once, 0 if it has no room for one: a part
// of a GPU may not. `known` is the kernel's. From here on the kernel may be launched in this shape.
template <class Kernel>
int resident_clusters(Kernel kernel, const Shape& shape, const Device& device,
                      KnownNumbers* known) {
  const uint64_t key = static_cast<uint64_t>(device.ordinal) << 32 |
                       static_cast<uint64_t>(shape.cluster) << 27 |
                       static_cast<uint64_t>(shape.threads / 32) << 21 |
                       static_cast<uint64_t>(shape.shared_bytes >> 4);
  int count = 0;
  if (known->find(key, &count)) return count;
  allow_any_shape(kernel);
  cudaError_t error;
  if (shape.cluster == 1) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &count, kernel, shape.threads, static_cast<size_t>(shape.shared_bytes));
    count *= device.multiprocessors;
  } else {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(shape, nullptr, &attribute);
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  }
  if (error != cudaSuccess) {
    // not an error of the call, which has other kernels
    cudaGetLastError();
    count = 0;
  }
  known->put(key, count);
  return count;
}

}  // namespace cuda
}  // namespace opd
