// SPDX-License-Identifier: Apache-2.0
// Rows in tiles of a fixed number of columns, each the work of one warp: which warp of which block
// takes a tile, and where in memory a row begins, changes no bit of what comes of it.
#pragma once

#include "laws.cuh"

namespace opd {
namespace cuda {

constexpr int kTileVectors = 8;  // of a lane
constexpr int kTileColumns = kTileVectors * kWarp * kVector;

inline int tiles_of(int64_t vocab_size) {
  return static_cast<int>((vocab_size + kTileColumns - 1) / kTileColumns);
}

// The column of a lane's first value of its k-th vector; the next vector is a warp's columns on.
__device__ __forceinline__ int column_of(int tile, int k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return tile * kTileColumns + (k * kWarp + lane) * kVector;
}

// This lane's logits of the law in kCount vectors of a tile from the k-th on; -inf beyond the row.
template <int kCount, bool kGeneral>
__device__ __forceinline__ void load_tile(const SideRow<kGeneral>& row, int vocab_size, int tile,
                                          int k, float (&z)[kCount][kVector]) {
  uint4 bits[kCount] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = column_of(tile, k + i);
    if (column < vocab_size) bits[i] = row.load(column, vocab_size - column);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = column_of(tile, k + i);
    if (column < vocab_size) {
      float uncapped[kVector];
      row.widen(bits[i], column, vocab_size - column, z[i], uncapped);
    } else {
#pragma unroll
      for (int j = 0; j < kVector; ++j) z[i][j] = kMinusInfinity;
    }
  }
}

// The logit of the law in one column.
template <bool kGeneral>
__device__ __forceinline__ float logit_at(const SideRow<kGeneral>& row, int column) {
  float z[kVector], uncapped[kVector];
  row.widen(row.load(column, 1), column, 1, z, uncapped);
  return z[0];
}

// Work of one warp each, in blocks of kWarps: the index of this warp's, and the blocks of a launch.
template <int kWarps>
__device__ __forceinline__ int64_t index_of_warp() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
}
template <int kWarps>
int64_t blocks_of_warps(int64_t count) {
  return (count + kWarps - 1) / kWarps;
}

}  // namespace cuda
}  // namespace opd
