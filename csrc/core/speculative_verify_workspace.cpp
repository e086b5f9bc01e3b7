// SPDX-License-Identifier: Apache-2.0
// Bytes that a call of speculative_verify needs beside its outputs; a file of its own, since a
// library of the CUDA kernels alone needs it too.
#include "opd/opd.h"
#include "rows.h"

// On a GPU three sums of each tile of csrc/cuda/row_tiles.cuh; on a CPU, which has room for them
// there, the mass up to the end of each block.
int64_t opd_speculative_verify_workspace_bytes(int64_t num_rows, int64_t vocab_size) {
  constexpr int64_t kTileColumns = 1024, kTileBytes = 3 * sizeof(double);
  static_assert(kTileColumns / opd::kBlock * sizeof(double) <= kTileBytes, "a CPU needs more");
  return num_rows * ((vocab_size + kTileColumns - 1) / kTileColumns) * kTileBytes;
}
