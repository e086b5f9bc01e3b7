// SPDX-License-Identifier: Apache-2.0
// Hopper's thread-block clusters, memory barriers and bulk copies (sm_90 and later). On an older
// architecture a kernel that uses them is compiled to nothing and must not be launched.
#pragma once

#include "launch.h"

#if defined(OPD_EMULATED) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define OPD_HAS_CLUSTERS 1
#else
#define OPD_HAS_CLUSTERS 0
#endif

namespace opd {
namespace cuda {

#if defined(OPD_EMULATED)

inline unsigned cluster_rank() { return emulation::self().block->rank; }
inline unsigned cluster_size() { return emulation::machine().cluster_size; }
inline void sync_cluster() { emulation::sync_cluster(); }
template <class T>
T* in_block(T* shared, unsigned rank) {
  return static_cast<T*>(emulation::peer(shared, rank));
}

// A phase ends when its arrivals have come and the bytes of its copies and stores have landed;
// phases alternate between parity 0 and 1.
struct alignas(8) MemoryBarrier {
  int32_t bytes;
  uint8_t count, pending, parity;
};
inline void init(MemoryBarrier* barrier, unsigned count = 1) {
  *barrier = {0, static_cast<uint8_t>(count), static_cast<uint8_t>(count), 0};
}
inline void fence_barrier_init() {}
inline void arrive(MemoryBarrier* barrier) {
  // over, though nobody has waited for it yet
  if (barrier->pending == 0 && barrier->bytes == 0) {
    barrier->pending = barrier->count;
    barrier->parity ^= 1;
  }
  if (barrier->pending == 0) emulation::fail("more arrivals than a memory barrier counts");
  --barrier->pending;
  ++emulation::machine().progress;
}
inline void arrive_in_block(MemoryBarrier* barrier, unsigned rank) {
  arrive(in_block(barrier, rank));
}
inline void expect_bytes(MemoryBarrier* barrier, uint32_t bytes) {
  barrier->bytes += static_cast<int32_t>(bytes);
  arrive(barrier);
}
inline void copy_bulk(void* shared, const void* global, uint32_t bytes, MemoryBarrier* barrier) {
  barrier->bytes -= static_cast<int32_t>(emulation::copy_bulk(shared, global, bytes, barrier));
}
inline void store_in_block(double* shared, double value, MemoryBarrier* barrier, unsigned rank) {
  barrier = in_block(barrier, rank);
  const size_t landed = emulation::store_value(in_block(shared, rank), value, barrier);
  barrier->bytes -= static_cast<int32_t>(landed);
}
inline void wait(MemoryBarrier* barrier, uint32_t parity) {
  while (barrier->parity == parity) {
    if (barrier->pending == 0) {
      barrier->bytes -= static_cast<int32_t>(emulation::land(barrier));
      if (barrier->bytes < 0) emulation::fail("more bytes than a memory barrier expected");
      if (barrier->bytes == 0) {
        barrier->pending = barrier->count;
        barrier->parity ^= 1;
        ++emulation::machine().progress;
        return;
      }
    }
    emulation::machine().waiting_for = "a memory barrier";
    emulation::yield();
  }
}
inline void wait_for_cluster(MemoryBarrier* barrier, uint32_t parity) { wait(barrier, parity); }
inline void fence_reads_before_copy() {}

#elif OPD_HAS_CLUSTERS

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Also orders what each thread has written to any block's shared memory before it.
__device__ __forceinline__ void sync_cluster() {
  // the aligned form wants a warp in one piece
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
               ::: "memory");
}
// The same address in the shared memory of another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, unsigned rank) {
  uint64_t mapped;
  asm volatile("mapa.u64 %0, %1, %2;"
               : "=l"(mapped)
               : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
}

// A phase ends when its arrivals have come and the bytes of its copies and stores have landed;
// phases alternate between parity 0 and 1.
struct alignas(8) MemoryBarrier {
  uint64_t state;
};
// One thread, before anybody else uses it.
__device__ __forceinline__ void init(MemoryBarrier* barrier, unsigned count = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// What the thread has written before is seen by those who wait for the phase.
__device__ __forceinline__ void arrive(MemoryBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// ... at the barrier of a block of the cluster; the pointer is this block's. That block waits for it
// with wait_for_cluster().
__device__ __forceinline__ void arrive_in_block(MemoryBarrier* barrier, unsigned rank) {
  asm volatile(
      "{\n"
      ".reg .b32 signal;\n"
      "mapa.shared::cluster.u32 signal, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [signal];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives, and adds to the bytes that the phase waits for.
__device__ __forceinline__ void expect_bytes(MemoryBarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// One thread. 16-byte addresses and sizes.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, uint32_t bytes,
                                          MemoryBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Into the shared memory of a block of the cluster, 8 bytes of a phase of that block's barrier;
// both pointers are this block's. That block waits for it with wait_for_cluster().
__device__ __forceinline__ void store_in_block(double* shared, double value,
                                               MemoryBarrier* barrier, unsigned rank) {
  asm volatile(
      "{\n"
      ".reg .b32 to, signal;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 signal, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [to], %1, [signal];\n"
      "}\n" ::"r"(shared_address(shared)),
      "l"(__double_as_longlong(value)), "r"(shared_address(barrier)), "r"(rank)
      : "memory");
}
// Until the phase of this parity has ended.
#define OPD_WAIT(SCOPE)                                                       \
  asm volatile(                                                               \
      "{\n"                                                                   \
      ".reg .pred done;\n"                                                    \
      "again:\n"                                                              \
      "mbarrier.try_wait.parity." SCOPE "shared::cta.b64 done, [%0], %1;\n"   \
      "@done bra finished;\n"                                                 \
      "bra again;\n"                                                          \
      "finished:\n"                                                           \
      "}\n" ::"r"(shared_address(barrier)),                                   \
      "r"(parity)                                                             \
      : "memory")
__device__ __forceinline__ void wait(MemoryBarrier* barrier, uint32_t parity) { OPD_WAIT(""); }
// ... where other blocks have stored
__device__ __forceinline__ void wait_for_cluster(MemoryBarrier* barrier, uint32_t parity) {
  OPD_WAIT("acquire.cluster.");
}
#undef OPD_WAIT
// Between a thread's last access to shared memory and a bulk copy that overwrites it.
__device__ __forceinline__ void fence_reads_before_copy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace cuda
}  // namespace opd
