// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of sparse_gradient, in words. Nothing that a pointer in them
// points to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace sparse_gradient {

inline constexpr char kOp[] = "sparse_gradient";

inline void check_columns(const int64_t* columns, int64_t num_columns, int64_t vocab_size) {
  OPD_CHECK(num_columns >= 0 && num_columns <= vocab_size, kOp,
            ": num_columns must be in [0, vocab_size], got ", num_columns);
  if (num_columns > 0) check_pointer(kOp, "columns", columns);
}

inline void check_args(const opd_sparse_gradient_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes(kOp, args->num_tokens, args->vocab_size);
  const int32_t dtype = args->grad_logits.dtype;
  OPD_CHECK(dtype == OPD_FLOAT32 || dtype == OPD_FLOAT64, kOp,
            ": grad_logits must be float32 or float64");
  check_logits(kOp, "grad_logits", args->grad_logits, args->num_tokens);
  check_pointer(kOp, "kept", args->kept);
}

inline void check_mark(const opd_sparse_gradient_args_t* args) {
  check_args(args);
  OPD_CHECK(args->tolerance >= 0.0 && std::isfinite(args->tolerance), kOp,
            ": tolerance must be >= 0 and finite, got ", args->tolerance);
}

inline void check_pack(const opd_sparse_gradient_args_t* args) {
  check_args(args);
  check_columns(args->columns, args->num_columns, args->vocab_size);
  if (args->num_tokens == 0) return;
  check_pointer(kOp, "dropped", args->dropped);
  if (args->num_columns == 0) return;
  check_pointer(kOp, "packed", args->packed.data);
  OPD_CHECK(args->packed.dtype == args->grad_logits.dtype, kOp,
            ": packed must have the dtype of grad_logits");
  check_gradient(kOp, args->packed, args->num_tokens, args->num_columns, args->num_columns);
}

inline void check_add(const opd_sparse_gradient_add_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes(kOp, args->num_columns, args->vocab_size);
  check_columns(args->columns, args->num_columns, args->vocab_size);
  if (args->num_columns == 0) return;
  const int32_t dtype = args->target.dtype;
  OPD_CHECK((dtype == OPD_FLOAT32 || dtype == OPD_FLOAT64) && args->rows.dtype == dtype, kOp,
            ": target and rows must both be float32 or float64");
  check_logits(kOp, "rows", args->rows, args->num_columns);
  check_pointer(kOp, "target", args->target.data);
  check_gradient(kOp, args->target, args->vocab_size, args->width, args->width);
}

}  // namespace sparse_gradient
}  // namespace opd
