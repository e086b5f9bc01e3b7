// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of token_logprobs, in words. Nothing that a pointer in them
// points to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace token_logprobs {

inline constexpr char kOp[] = "token_logprobs";

inline void check_spec(const opd_token_logprobs_spec_t& spec) {
  check_sizes(kOp, spec.num_tokens, spec.vocab_size);
  check_side(kOp, "logits", spec.logits, spec.num_tokens);
  OPD_CHECK(spec.num_tokens == 0 || spec.token_ids != nullptr, kOp,
            ": token_ids must not be NULL");
}

inline void check_args(const opd_token_logprobs_fwd_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_spec(args->spec);
  if (args->spec.num_tokens == 0) return;
  check_pointers(kOp, "every output", {args->logprobs, args->lse, args->entropy});
}

inline void check_args(const opd_token_logprobs_bwd_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_spec(args->spec);
  check_dtype(kOp, "grad_logits", args->grad_logits.dtype);
  check_gradient(kOp, args->grad_logits, args->spec.num_tokens, args->grad_width,
                 args->spec.vocab_size);
  if (args->spec.num_tokens == 0) return;
  check_pointers(kOp, "every pointer",
                 {args->grad_logprobs, args->grad_lse, args->grad_entropy, args->lse, args->entropy,
                  args->grad_logits.data});
}

}  // namespace token_logprobs
}  // namespace opd
