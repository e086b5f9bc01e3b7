// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of speculative_verify, in words. Nothing that a pointer in them
// points to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace speculative_verify {

inline constexpr char kOp[] = "speculative_verify";

inline void check_args(const opd_speculative_verify_rows_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes_of_ids(kOp, args->num_rows, args->vocab_size);
  check_side(kOp, "logits", args->logits, args->num_rows);
  OPD_CHECK(args->top_k >= 0, kOp, ": top_k must be >= 0 (0: no cut), got ", args->top_k);
  OPD_CHECK(args->top_p > 0.0 && args->top_p <= 1.0, kOp, ": top_p must be in (0, 1], got ",
            args->top_p);
  if (args->num_rows == 0) return;
  check_pointers(kOp, "every pointer",
                 {args->token_ids, args->lse, args->floor, args->logprobs, args->ranks,
                  args->argmax, args->largest, args->workspace});
}

inline void check_law(const char* name, const opd_cut_law_t& law) {
  OPD_CHECK(law.num_rows >= 0, kOp, ": num_rows of ", name, " must be >= 0, got ", law.num_rows);
  check_side(kOp, name, law.logits, law.num_rows);
  if (law.num_rows > 0) check_pointers(kOp, "lse and floor of a side", {law.lse, law.floor});
}

inline void check_args(const opd_speculative_verify_residual_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes_of_ids(kOp, args->num_rows, args->vocab_size);
  check_law("teacher logits", args->teacher);
  if (args->student.logits.matrix.data != nullptr) {
    check_law("student logits", args->student);
    OPD_CHECK((args->student.logits.matrix.dtype == OPD_FLOAT64) ==
                  (args->teacher.logits.matrix.dtype == OPD_FLOAT64),
              kOp, ": float64 must be used for both sides or for none");
  }
  if (args->num_rows == 0) return;
  check_pointers(kOp, "every pointer",
                 {args->teacher.rows, args->teacher.scale, args->student.rows, args->student.scale,
                  args->mass, args->overlap, args->tokens, args->student_logprobs,
                  args->teacher_logprobs, args->workspace});
  if (args->draws) check_pointer(kOp, "uniforms", args->uniforms);
}

}  // namespace speculative_verify
}  // namespace opd
