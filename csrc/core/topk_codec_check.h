// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of topk_codec, in words. Nothing that a pointer in them points to
// is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"
#include "topk_codec_row.h"

namespace opd {
namespace topk_codec {

inline constexpr char kOp[] = "topk_codec";

inline bool is_layout(int64_t num_topk, int64_t vocab_size, int64_t bits) {
  return vocab_size >= 1 && vocab_size <= kMaxVocab && num_topk >= 1 && num_topk <= kMaxTopk &&
         num_topk <= vocab_size && bits >= kMinBits && bits <= kMaxBits;
}

inline void check_args(const opd_topk_codec_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  OPD_CHECK(args->num_tokens >= 0, kOp, ": num_tokens must be >= 0, got ", args->num_tokens);
  OPD_CHECK(is_layout(args->num_topk, args->vocab_size, args->bits), kOp,
            ": num_topk must be in [1, 4096] and at most vocab_size, vocab_size at most 2^31, bits in "
            "[4, 16], got ",
            args->num_topk, ", ", args->vocab_size, ", ", args->bits);
  if (args->num_tokens == 0) return;
  check_pointers(kOp, "ids, logprobs, tail_logprob, codes and status",
                 {args->ids, args->logprobs, args->tail_logprob, args->codes, args->status});
}

}  // namespace topk_codec
}  // namespace opd
