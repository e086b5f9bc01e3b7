// SPDX-License-Identifier: Apache-2.0
// Bytes that a call of sample_tokens needs beside its outputs; a file of its own, since a library of
// the CUDA kernels alone needs it too.
#include "sample_tokens_check.h"

int64_t opd_sample_tokens_workspace_bytes(int64_t num_tokens, int64_t vocab_size) {
  using opd::sample_tokens::TileSums;
  return num_tokens * opd::sample_tokens::num_tiles(vocab_size) *
         static_cast<int64_t>(sizeof(TileSums));
}
