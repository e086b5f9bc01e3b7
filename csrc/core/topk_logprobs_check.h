// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of topk_logprobs, in words. Nothing that a pointer in them points
// to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace topk_logprobs {

inline constexpr char kOp[] = "topk_logprobs";

inline void check_args(const opd_topk_logprobs_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes_of_ids(kOp, args->num_tokens, args->vocab_size);
  check_side(kOp, "logits", args->logits, args->num_tokens);
  OPD_CHECK(args->num_topk >= 1 && args->num_topk <= OPD_MAX_TOPK &&
                args->num_topk <= args->vocab_size,
            kOp, ": num_topk must be in [1, ",
            args->vocab_size < OPD_MAX_TOPK ? args->vocab_size : int64_t{OPD_MAX_TOPK}, "], got ",
            args->num_topk);
  OPD_CHECK(args->num_ids >= 0 && args->num_ids <= OPD_MAX_TOPK, kOp,
            ": num_ids must be in [0, ", int64_t{OPD_MAX_TOPK}, "], got ", args->num_ids);
  if (args->num_tokens == 0) return;
  check_pointers(kOp, "every output",
                 {args->ids, args->logprobs, args->lse, args->tail_logprob, args->entropy});
  if (args->num_ids > 0) {
    check_pointers(kOp, "token_ids and token_logprobs", {args->token_ids, args->token_logprobs});
  }
  if (opd_topk_logprobs_workspace_bytes(args->num_tokens, args->vocab_size, args->num_topk) > 0) {
    check_pointer(kOp, "workspace", args->workspace);
  }
}

}  // namespace topk_logprobs
}  // namespace opd
