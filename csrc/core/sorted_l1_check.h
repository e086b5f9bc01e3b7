// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of sorted_l1, in words.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace sorted_l1 {

inline constexpr char kOp[] = "sorted_l1";

inline void check_args(const opd_sorted_l1_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes_of_ids(kOp, args->num_tokens, args->student_vocab_size);
  check_sizes_of_ids(kOp, args->num_tokens, args->teacher_vocab_size);
  check_side(kOp, "student", args->student, args->num_tokens);
  check_side(kOp, "teacher", args->teacher, args->num_tokens);
  OPD_CHECK((args->student.matrix.dtype == OPD_FLOAT64) ==
                (args->teacher.matrix.dtype == OPD_FLOAT64),
            kOp, ": the logits of both sides must be float64 or neither's");
  OPD_CHECK((args->student_pairs == nullptr) == (args->teacher_paired == nullptr), kOp,
            ": student_pairs and teacher_paired must be given together");
  OPD_CHECK(args->beta > 0.0 && args->beta < 1.0, kOp, ": beta must be in (0, 1), got ",
            args->beta);
  OPD_CHECK(std::isfinite(args->pair_weight) && std::isfinite(args->rest_weight), kOp,
            ": pair_weight and rest_weight must be finite");
  OPD_CHECK(args->num_workers >= 1, kOp, ": num_workers must be at least 1, got ",
            args->num_workers);
  if (args->num_tokens == 0) return;
  check_pointers(kOp, "loss and workspace", {args->loss, args->workspace});
  if (args->grad.data == nullptr) return;
  check_pointer(kOp, "grad_log_scales", args->grad_log_scales);
  check_dtype(kOp, "grad", args->grad.dtype);
  check_gradient(kOp, args->grad, args->num_tokens, args->grad_width, args->student_vocab_size);
}

// The pairs are read row by row: an id beyond the teacher's law would be read beyond its row.
inline void check_pairs(const opd_sorted_l1_args_t& args) {
  if (args.student_pairs == nullptr) return;
  int64_t num_pairs = 0, num_paired = 0;
  for (int64_t v = 0; v < args.student_vocab_size; ++v) {
    const int64_t pair = args.student_pairs[v];
    if (pair < 0) continue;
    OPD_CHECK(pair < args.teacher_vocab_size, kOp, ": student_pairs must be below ",
              args.teacher_vocab_size, ", got ", pair, " at position ", v);
    OPD_CHECK(args.teacher_paired[pair] != 0, kOp, ": teacher_paired must mark every id of ",
              "student_pairs, got 0 for ", pair);
    ++num_pairs;
  }
  for (int64_t w = 0; w < args.teacher_vocab_size; ++w) num_paired += args.teacher_paired[w] != 0;
  OPD_CHECK(num_pairs == num_paired, kOp,
            ": pairs must hold every id of both vocabularies once at most, and none outside of "
            "them, got ",
            num_pairs, " of the student for ", num_paired, " of the teacher");
}

}  // namespace sorted_l1
}  // namespace opd
