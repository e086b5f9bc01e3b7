// SPDX-License-Identifier: Apache-2.0
// Bytes that a call of speculative_verify needs beside its outputs, on either device: two doubles per
// block on a CPU, four per tile of two blocks on a GPU. A file of its own, since a library of the
// CUDA kernels alone needs it too.
#include "opd/opd.h"
#include "rows.h"

int64_t opd_speculative_verify_workspace_bytes(int64_t num_rows, int64_t vocab_size) {
  const int64_t tiles = (opd::num_blocks(vocab_size) + 1) / 2;
  return num_rows * tiles * 4 * static_cast<int64_t>(sizeof(double));
}
