// SPDX-License-Identifier: Apache-2.0
// The size of a row: a file of its own, because a library of CUDA kernels alone has it too.
#include "topk_codec_check.h"

int64_t opd_topk_codec_row_bytes(int64_t num_topk, int64_t vocab_size, int32_t bits) {
  using namespace opd::topk_codec;
  if (!is_layout(num_topk, vocab_size, bits)) return -1;
  return layout_of(num_topk, vocab_size, bits).row_bytes;
}
