// SPDX-License-Identifier: Apache-2.0
// Bytes that a call of speculative_verify needs beside its outputs; a file of its own, since a
// library of the CUDA kernels alone needs it too.
#include "opd/opd.h"
#include "rows.h"

int64_t opd_speculative_verify_workspace_bytes(int64_t num_rows, int64_t vocab_size) {
  return num_rows * 2 * opd::num_blocks(vocab_size) * static_cast<int64_t>(sizeof(double));
}
