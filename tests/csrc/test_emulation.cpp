// SPDX-License-Identifier: Apache-2.0
// The emulation of CUDA that the kernels are tested under: barriers, shuffles, clusters, bulk copies.
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cluster.cuh"
#include "expect.h"
#include "reduce.cuh"
#include "vectorized.cuh"

namespace {

using namespace opd::cuda;

__global__ void block_sums(const float* values, int per_block, float* sums) {
  float* const scratch = reinterpret_cast<float*>(shared_memory());
  float mine = 0;
  for (int i = threadIdx.x; i < per_block; i += blockDim.x) {
    mine += values[blockIdx.x * per_block + i];
  }
  const float sum = reduce_block(mine, scratch, 0.0f, Sum());
  const float largest = reduce_block(mine, scratch, -1e30f, Max());
  if (threadIdx.x == 0) sums[2 * blockIdx.x] = sum, sums[2 * blockIdx.x + 1] = largest;
}

void check_block() {
  constexpr int kBlocks = 3, kPerBlock = 1000;
  std::vector<float> values(kBlocks * kPerBlock, 1.0f), sums(2 * kBlocks);
  launch({kBlocks, 96, 32 * sizeof(float)}, nullptr, &block_sums, values.data(), kPerBlock,
         sums.data());
  for (int b = 0; b < kBlocks; ++b) {
    expect::near(sums[2 * b], kPerBlock, 0, "sum over a block");
    expect::near(sums[2 * b + 1], 11, 0, "largest over a block");
  }
}

__global__ void votes(int voter, unsigned* out) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool first = __syncthreads_or(thread == voter) != 0;
  const bool second = __syncthreads_or(0) != 0;
  const unsigned sum = __reduce_add_sync(kAllLanes, threadIdx.x % kWarp);
  if (first && !second && sum == 496) atomicAdd(out, 1u);
}

void check_votes() {
  for (int voter : {0, 40, 95, -1}) {
    unsigned agreed = 0;
    launch({1, 96}, nullptr, &votes, voter, &agreed);
    expect::that(agreed == (voter < 0 ? 0u : 96u), "every thread learns of one that votes");
  }
}

// Each block of a cluster takes a slice of the row through two bulk copies and adds up everybody's.
__global__ void cluster_sums(const float* row, int slice, float* sums) {
  unsigned char* const shared = shared_memory();
  float* const part = reinterpret_cast<float*>(shared);
  MemoryBarrier* const barrier = reinterpret_cast<MemoryBarrier*>(shared + 16);
  float* const values = reinterpret_cast<float*>(shared + 128);
  if (threadIdx.x == 0) {
    init(barrier);
    fence_barrier_init();
    const uint32_t half = slice / 2 * sizeof(float);
    expect_bytes(barrier, 2 * half);
    const float* const from = row + blockIdx.x * slice;
    copy_bulk(values, from, half, barrier);
    copy_bulk(values + slice / 2, from + slice / 2, half, barrier);
  }
  __syncthreads();
  wait(barrier, 0);
  float mine = 0;
  for (int i = threadIdx.x; i < slice; i += blockDim.x) mine += values[i];
  mine = reduce_warp(mine, Sum());
  if (threadIdx.x == 0) *part = mine;
  sync_cluster();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += *in_block(part, rank);
    sums[blockIdx.x] = sum;
  }
  sync_cluster();
}

void check_cluster() {
  constexpr int kCluster = 4, kClusters = 2, kSlice = 64;
  alignas(16) static float row[kCluster * kClusters * kSlice];
  float sums[kCluster * kClusters] = {};
  for (int i = 0; i < kCluster * kClusters * kSlice; ++i) row[i] = static_cast<float>(i % 7);
  launch({kCluster * kClusters, 32, 128 + kSlice * 4, kCluster}, nullptr, &cluster_sums, row, kSlice,
         sums);
  for (int b = 0; b < kCluster * kClusters; ++b) {
    double expected = 0;
    for (int i = 0; i < kCluster * kSlice; ++i) expected += row[b / kCluster * kCluster * kSlice + i];
    expect::near(sums[b], expected, 0, "sum over a cluster");
  }
}

// Two exchanges of a value between all blocks. With one barrier and one inbox for both, a fast block's
// second value reaches a block that waits for the first ones; with two of each it cannot.
__global__ void two_exchanges(int barriers, float* sums) {
  unsigned char* const shared = shared_memory();
  MemoryBarrier* const barrier = reinterpret_cast<MemoryBarrier*>(shared);
  double* const inbox = reinterpret_cast<double*>(shared + 64);
  if (threadIdx.x == 0) {
    for (int i = 0; i < barriers; ++i) init(barrier + i);
    fence_barrier_init();
  }
  sync_cluster();
  if (threadIdx.x == 0) {
    double value = 1.0 + cluster_rank();
    for (int i = 0; i < 2; ++i) {
      MemoryBarrier* const mine = barrier + i % barriers;
      double* const from = inbox + i % barriers * cluster_size();
      expect_bytes(mine, 8 * cluster_size());
      for (unsigned rank = 0; rank < cluster_size(); ++rank) {
        store_in_block(from + cluster_rank(), value, mine, rank);
      }
      wait_for_cluster(mine, i / barriers);
      value = 0;
      for (unsigned rank = 0; rank < cluster_size(); ++rank) value += from[rank];
    }
    sums[blockIdx.x] = static_cast<float>(value);
  }
  sync_cluster();
}

// Whether the right sums come of it under a seed; a race that is caught ends the process.
bool exchanges_twice(int barriers, unsigned cluster, int seed) {
  const pid_t child = fork();
  if (child == 0) {
    std::fclose(stderr);
    setenv("OPD_EMULATION_SEED", std::to_string(seed).c_str(), 1);
    std::vector<float> sums(cluster);
    launch({cluster, 32, 512, static_cast<int>(cluster)}, nullptr, &two_exchanges, barriers,
           sums.data());
    const float expected = static_cast<float>(cluster * cluster * (cluster + 1) / 2);
    for (float sum : sums) {
      if (sum != expected) _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  expect::that(waitpid(child, &status, 0) == child, "the child ends");
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void check_that_races_are_caught() {
  constexpr int kSeeds = 12;
  for (const unsigned cluster : {2u, 4u, 16u}) {
    int caught = 0;
    for (int seed = 1; seed <= kSeeds; ++seed) {
      expect::that(exchanges_twice(2, cluster, seed), "two exchanges with a buffer each");
      caught += !exchanges_twice(1, cluster, seed);
    }
    expect::that(caught >= kSeeds / 3, "two exchanges with one buffer are caught");
  }
}

__global__ void widen(const opd::BFloat16* from, float* to, opd::BFloat16* back) {
  float values[8];
  load_16(from + 8 * threadIdx.x, values);
  for (int i = 0; i < 8; ++i) to[8 * threadIdx.x + i] = values[i];
  store_16(values, back + 8 * threadIdx.x);
}

void check_vectors() {
  alignas(16) opd::BFloat16 from[64], back[64];
  float to[64];
  for (int i = 0; i < 64; ++i) opd::from_real(static_cast<float>(i) - 20.5f, &from[i]);
  launch({1, 8}, nullptr, &widen, from, to, back);
  for (int i = 0; i < 64; ++i) {
    expect::near(to[i], i - 20.5, 0, "a bfloat16 through a 16-byte load");
    expect::that(back[i].bits == from[i].bits, "a bfloat16 through a 16-byte store");
  }
}

// The last byte of the shared memory it asked for, and of which kernel it is.
template <int kKernel>
__global__ void last_byte(int shared_bytes, int* out) {
  shared_memory()[shared_bytes - 1] = static_cast<unsigned char>(kKernel);
  *out = shared_memory()[shared_bytes - 1];
}

template <int kKernel>
bool launches(int shared_bytes) {
  int out = -1;
  launch({1, 1, shared_bytes}, nullptr, &last_byte<kKernel>, shared_bytes, &out);
  return out == kKernel;
}

// What the runtime says, without launch().
template <int kKernel>
bool is_allowed(int shared_bytes) {
  int out = -1;
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = config_of({1, 1, shared_bytes}, nullptr, &attribute);
  return cudaLaunchKernelEx(&config, &last_byte<kKernel>, shared_bytes, &out) == cudaSuccess;
}

// Above 48 KiB a kernel has to be allowed on each device, which launch() does, once.
void check_shared_memory() {
  constexpr int kDefault = 48 * 1024, kMost = 227 * 1024;
  constexpr auto kAttribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  expect::that(is_allowed<0>(kDefault) && !is_allowed<0>(kDefault + 1), "48 KiB without asking");
  expect::that(cudaFuncSetAttribute(&last_byte<0>, kAttribute, kMost + 1) != cudaSuccess,
               "not more than a block may have");
  expect::that(cudaFuncSetAttribute(&last_byte<0>, kAttribute, 60000) == cudaSuccess, "more");
  expect::that(is_allowed<0>(60000) && !is_allowed<0>(60001), "what was asked for");
  expect::that(!is_allowed<1>(60000), "another kernel has to be allowed, too");

  expect::that(launches<1>(kDefault) && !is_allowed<1>(kDefault + 1), "launch() asks when it must");
  const int before = emulated_questions();
  expect::that(launches<1>(kDefault + 1) && launches<1>(kMost), "launch() allows what there is");
  expect::that(launches<1>(kDefault + 1), "and again");
  expect::that(emulated_questions() == before + 1, "once");
  expect::that(!is_allowed<2>(kDefault + 1) && launches<2>(kMost), "each kernel");
  try {
    launches<1>(kMost + 1);
    expect::that(false, "more than a block may have is refused");
  } catch (const opd::Error& error) {
    expect::that(error.status() == OPD_UNSUPPORTED &&
                     std::strstr(error.what(), "232449 bytes of shared memory") &&
                     std::strstr(error.what(), "232448"),
                 error.what());
  }

  setenv("OPD_EMULATION_CAPABILITY", "80", 1);
  expect::that(!is_allowed<1>(kDefault + 1) && launches<1>(163 * 1024), "each device");
  try {
    launches<1>(kMost);
    expect::that(false, "a smaller device refuses");
  } catch (const opd::Error& error) {
    expect::that(error.status() == OPD_UNSUPPORTED, error.what());
  }
  unsetenv("OPD_EMULATION_CAPABILITY");

  std::vector<std::thread> threads;
  std::vector<char> all_right(4);
  for (char& right : all_right) {
    threads.emplace_back([&] {
      right = launches<3>(kMost) && launches<4>(kMost) && launches<5>(kMost) && launches<3>(kMost);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (char right : all_right) expect::that(right, "threads that launch at once");
}

// More kernels than there is room for: each has bits of its own or none, and keeps them.
void check_known_kernels() {
  KnownKernels known;
  static char kernels[1000];
  int kept = 0;
  for (int round = 0; round < 2; ++round) {
    for (char& kernel : kernels) {
      std::atomic<uint64_t>* const devices = known.devices_of(&kernel);
      const uint64_t number = static_cast<uint64_t>(&kernel - kernels) + 1;
      if (devices == nullptr) continue;
      if (round == 0) {
        expect::that(devices->exchange(number) == 0, "bits that are nobody's");
        ++kept;
      } else {
        expect::that(*devices == number, "the bits of a kernel are its own");
        --kept;
      }
    }
    expect::that(round == 0 ? kept > 128 && kept <= 256 : kept == 0, "as many as have room");
  }
}

}  // namespace

int main() {
  check_block();
  check_votes();
  check_cluster();
  check_that_races_are_caught();
  check_vectors();
  check_shared_memory();
  check_known_kernels();
  return expect::report("test_emulation");
}
