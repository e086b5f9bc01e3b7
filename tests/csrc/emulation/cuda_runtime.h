// SPDX-License-Identifier: Apache-2.0
// In the place of CUDA's header of this name: the part of the runtime that csrc/cuda uses, on top of
// emulation.h. A .cu file compiled as C++ with this directory on its include path runs on the CPU.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "emulation.h"

#define OPD_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using dim3 = emulation::Dim;
#define threadIdx (::emulation::self().index)
#define blockIdx (::emulation::self().block->index)
#define blockDim (::emulation::self().machine->threads)
#define gridDim (::emulation::self().machine->grid)

inline void __syncthreads() { emulation::sync_block(); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::sync_warp(); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::self().lane ^ static_cast<unsigned>(mask));
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = emulation::self().lane;
  return emulation::exchange(value, lane < delta ? lane : lane - delta);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  const unsigned lane = emulation::self().lane;
  return emulation::exchange(value, lane + delta > 31 ? lane : lane + delta);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return static_cast<unsigned>(emulation::ballot(value));
}
inline int __syncthreads_or(int value) { return emulation::sync_block_or(value != 0); }
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  for (unsigned mask = 16; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, static_cast<int>(mask));
  }
  return value;
}
inline int __reduce_max_sync(unsigned, int value) {
  for (unsigned mask = 16; mask > 0; mask /= 2) {
    value = std::max(value, __shfl_xor_sync(0xffffffffu, value, static_cast<int>(mask)));
  }
  return value;
}
inline int __reduce_min_sync(unsigned mask, int value) { return ~__reduce_max_sync(mask, ~value); }
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}
template <class T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at = before | value;
  return before;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidClusterSize = 912;
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize
};
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
struct cudaLaunchAttributeValue {
  dim3 clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim_, blockDim_;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// an H200's figures, but for the number of multiprocessors, which a test may set: persistent kernels
// walk more than one row only if there are fewer than rows
inline int& emulated_multiprocessors() {
  static int count = 4;
  return count;
}
inline int emulated_capability() {
  const char* const text = std::getenv("OPD_EMULATION_CAPABILITY");
  return text ? std::atoi(text) : 90;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulated_multiprocessors();
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulated_capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = emulated_capability() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = emulated_capability() == 80 ? 163 * 1024 : 227 * 1024;
      break;
    case cudaDevAttrL2CacheSize:
      *value = 60 << 20;
      break;
  }
  return cudaSuccess;
}
// blocks of the largest cluster that there is room for: a part of a GPU may have less than 16
inline int& emulated_largest_cluster() {
  static int blocks = 16;
  return blocks;
}
// A device of other figures is another device, as on a machine with many.
inline cudaError_t cudaGetDevice(int* device) {
  static std::mutex mutex;
  static std::vector<std::array<int, 3>> seen;
  const std::array<int, 3> figures{emulated_multiprocessors(), emulated_capability(),
                                   emulated_largest_cluster()};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = std::find(seen.begin(), seen.end(), figures);
  *device = static_cast<int>(at - seen.begin());
  if (at == seen.end()) seen.push_back(figures);
  return cudaSuccess;
}
// what a launch should not cost: attributes that are set, occupancies that are asked for
inline std::atomic<int>& emulated_questions() {
  static std::atomic<int> count{0};
  return count;
}
// The dynamic shared memory that a launch of a kernel may have on the current device: 48 KiB, or
// what its attribute has been set to.
class EmulatedAllowances {
 public:
  void set(const void* kernel, int bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bytes_[key(kernel)] = bytes;
  }
  size_t of(const void* kernel) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto at = bytes_.find(key(kernel));
    return at == bytes_.end() ? 48 * 1024 : static_cast<size_t>(at->second);
  }

 private:
  using Key = std::pair<int, const void*>;
  static Key key(const void* kernel) {
    int device = 0;
    cudaGetDevice(&device);
    return {device, kernel};
  }
  std::mutex mutex_;
  std::map<Key, int> bytes_;
};
inline EmulatedAllowances& emulated_allowances() {
  static EmulatedAllowances allowances;
  return allowances;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute attribute, int value) {
  ++emulated_questions();
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (value < 0 || value > most) return cudaErrorInvalidValue;
  emulated_allowances().set(reinterpret_cast<const void*>(kernel), value);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel, int, size_t shared) {
  ++emulated_questions();
  *count = std::max(1, 227 * 1024 / static_cast<int>(shared + 1024));
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  unsigned size = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      size = config->attrs[i].val.clusterDim.x;
    }
  }
  ++emulated_questions();
  if (static_cast<int>(size) > emulated_largest_cluster()) return cudaErrorInvalidClusterSize;
  *count = std::max(1, emulated_multiprocessors() / static_cast<int>(size));
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config->attrs[i].val.clusterDim.x;
    }
  }
  const size_t allowed = emulated_allowances().of(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  emulation::launch(config->gridDim_, config->blockDim_, cluster, config->dynamicSmemBytes,
                    [&] { kernel(static_cast<Parameters>(arguments)...); });
  return cudaSuccess;
}
