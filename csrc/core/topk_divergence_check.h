// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of topk_divergence, in words. Nothing that a pointer in them
// points to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace topk_divergence {

inline constexpr char kOp[] = "topk_divergence";

inline void check_spec(const opd_topk_divergence_spec_t& spec) {
  check_sizes(kOp, spec.num_tokens, spec.vocab_size);
  check_side(kOp, "logits", spec.logits, spec.num_tokens);
  OPD_CHECK(spec.num_ids >= 1 && spec.num_ids <= OPD_MAX_IDS, kOp, ": num_ids must be in [1, ",
            static_cast<int64_t>(OPD_MAX_IDS), "], got ", spec.num_ids);
  OPD_CHECK(spec.num_tokens == 0 || spec.token_ids != nullptr, kOp,
            ": token_ids must not be NULL");
}

inline void check_args(const opd_topk_divergence_fwd_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_spec(args->spec);
  if (args->spec.num_tokens == 0) return;
  check_pointers(kOp, "every output",
                 {args->logprobs, args->tail_logprob, args->lse, args->entropy});
}

inline void check_args(const opd_topk_divergence_bwd_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_spec(args->spec);
  check_dtype(kOp, "grad_logits", args->grad_logits.dtype);
  check_gradient(kOp, args->grad_logits, args->spec.num_tokens, args->grad_width,
                 args->spec.vocab_size);
  if (args->spec.num_tokens == 0) return;
  check_pointers(kOp, "every pointer",
                 {args->grad_ids, args->grad_rest, args->lse, args->grad_logits.data});
}

}  // namespace topk_divergence
}  // namespace opd
