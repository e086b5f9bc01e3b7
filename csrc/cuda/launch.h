// SPDX-License-Identifier: Apache-2.0
// Launches with an explicit stream, a cluster size and dynamic shared memory; failures in words.
// Kernels take all their shared memory through shared_memory(), so that tests/csrc/emulation can run
// them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "check.h"
#include "opd/opd.h"

namespace opd {
namespace cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw Error(OPD_CUDA_ERROR, concat("CUDA error in ", what, ": ", cudaGetErrorString(error)));
  }
}

#if defined(OPD_EMULATED)
inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulation::self().block->shared);
}
#elif defined(__CUDACC__)
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char opd_shared[];
  return opd_shared;
}
#endif

// What the choice of a kernel depends on, of a device.
struct Device {
  int multiprocessors, capability, shared_bytes_per_block;
  int ordinal = 0;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline Device ask_device(int ordinal) {
  return {device_attribute(cudaDevAttrMultiProcessorCount, ordinal),
          10 * device_attribute(cudaDevAttrComputeCapabilityMajor, ordinal) +
              device_attribute(cudaDevAttrComputeCapabilityMinor, ordinal),
          device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal), ordinal};
}

// The current one; asked once.
inline Device current_device() {
  constexpr int kMostDevices = 64, kFieldBits = 21;
  constexpr uint64_t kField = (uint64_t{1} << kFieldBits) - 1;
  static std::atomic<uint64_t> known[kMostDevices] = {};
  int ordinal = 0;
  check_cuda(cudaGetDevice(&ordinal), "cudaGetDevice");
  if (ordinal >= kMostDevices) return ask_device(ordinal);
  uint64_t fields = known[ordinal].load(std::memory_order_relaxed);
  if (fields == 0) {
    const Device device = ask_device(ordinal);
    fields = static_cast<uint64_t>(device.multiprocessors) << 2 * kFieldBits |
             static_cast<uint64_t>(device.capability) << kFieldBits |
             static_cast<uint64_t>(device.shared_bytes_per_block);
    known[ordinal].store(fields, std::memory_order_relaxed);
  }
  return {static_cast<int>(fields >> 2 * kFieldBits),
          static_cast<int>(fields >> kFieldBits & kField), static_cast<int>(fields & kField),
          ordinal};
}

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;  // blocks; a divisor of `blocks`
};

// The launch configuration of a shape; `attribute` is storage that must outlive it.
inline cudaLaunchConfig_t config_of(const Shape& shape, void* stream,
                                    cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config{};
#if defined(OPD_EMULATED)
  config.gridDim_ = {static_cast<unsigned>(shape.blocks), 1, 1};
  config.blockDim_ = {static_cast<unsigned>(shape.threads), 1, 1};
#else
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), 1, 1);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads), 1, 1);
#endif
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attribute;
  config.numAttrs = 0;
  if (shape.cluster > 1) {
    attribute->id = cudaLaunchAttributeClusterDimension;
    attribute->val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute->val.clusterDim.y = 1;
    attribute->val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
  return config;
}

// Devices by kernel, kept by whoever finds them first. No locks and no memory of its own, so that
// any thread may launch, also into a stream whose work is captured.
class KnownKernels {
 public:
  // The bits of the devices of a kernel; nullptr if there is no room for it.
  std::atomic<uint64_t>* devices_of(const void* kernel) {
    constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u;
    const uint64_t first = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(kernel)) * kOdd >> 56;
    for (int i = 0; i < kNear; ++i) {
      Entry& entry = entries_[(first + static_cast<uint64_t>(i)) % kEntries];
      const void* there = nullptr;
      if (entry.kernel.compare_exchange_strong(there, kernel) || there == kernel) {
        return &entry.devices;
      }
    }
    return nullptr;
  }

 private:
  static constexpr int kEntries = 256, kNear = 32;
  struct Entry {
    std::atomic<const void*> kernel{nullptr};
    std::atomic<uint64_t> devices{0};
  };
  Entry entries_[kEntries];
};

// Those that may have all the shared memory that a block may.
inline KnownKernels& allowed_kernels() {
  static KnownKernels kernels;
  return kernels;
}

// Lets a kernel have all the shared memory that a block of the current device may, not what one
// shape needs: the attribute is the kernel's, and another thread's launch or a graph that has been
// captured may need more. Once for each kernel and device.
template <class Kernel>
void allow_shared_memory(Kernel kernel) {
  const Device device = current_device();
  constexpr auto kSharedBytes = cudaFuncAttributeMaxDynamicSharedMemorySize;
  std::atomic<uint64_t>* const devices =
      allowed_kernels().devices_of(reinterpret_cast<const void*>(kernel));
  const uint64_t bit = device.ordinal < 64 ? uint64_t{1} << device.ordinal : 0;
  if (devices && (devices->load(std::memory_order_acquire) & bit) != 0) return;
  check_cuda(cudaFuncSetAttribute(kernel, kSharedBytes, device.shared_bytes_per_block),
             "shared memory");
  if (devices) devices->fetch_or(bit, std::memory_order_release);
}

// A kernel that needs more shared memory than any has by default is allowed it here. More than 8
// blocks in a cluster it has to be allowed first: occupancy.h.
template <class... Parameters, class... Arguments>
void launch(const Shape& shape, void* stream, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  if (shape.blocks == 0) return;
  OPD_CHECK(shape.blocks <= 0x7fffffff, "a launch has at most 2^31 - 1 blocks, got ", shape.blocks);
  constexpr int64_t kSharedByDefault = 48 * 1024;
  if (shape.shared_bytes > kSharedByDefault) {
    const int64_t most = current_device().shared_bytes_per_block;
    if (shape.shared_bytes > most) {
      throw Error(OPD_UNSUPPORTED,
                  concat("a block needs ", shape.shared_bytes, " bytes of shared memory, this GPU ",
                         "has ", most, " for it. Ask for fewer ids in a row, use a GPU with more, ",
                         "or call the CPU's entry point."));
    }
    allow_shared_memory(kernel);
  }
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = config_of(shape, stream, &attribute);
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

}  // namespace cuda
}  // namespace opd
