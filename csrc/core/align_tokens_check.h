// SPDX-License-Identifier: Apache-2.0
// What opd_align_tokens refuses before it reads a token, in words.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace align_tokens {

inline constexpr char kOp[] = "align_tokens";
inline constexpr uint8_t kRoles =
    OPD_ROLE_BOS | OPD_ROLE_EOS | OPD_ROLE_EOT | OPD_ROLE_PAD | OPD_ROLE_UNK;
// positions are counted in 32 bits, in both sides together
inline constexpr int64_t kMaxSymbols = int64_t{1} << 30;

inline void check_ids(const char* side, const opd_token_ids_t& ids, int64_t num_sequences) {
  OPD_CHECK(ids.id_bytes == 4 || ids.id_bytes == 8, kOp, ": id_bytes of the ", side,
            " must be 4 or 8, got ", ids.id_bytes);
  check_pointer(kOp, "offsets", ids.offsets);
  OPD_CHECK(ids.offsets[0] == 0, kOp, ": offsets of the ", side, " must start at 0, got ",
            ids.offsets[0]);
  for (int64_t b = 0; b < num_sequences; ++b) {
    OPD_CHECK(ids.offsets[b] <= ids.offsets[b + 1], kOp, ": offsets of the ", side,
              " must not decrease, got ", ids.offsets[b + 1], " after ", ids.offsets[b],
              " at position ", b + 1);
  }
  if (ids.sequences == nullptr) {
    if (ids.offsets[num_sequences] > 0) check_pointer(kOp, "ids", ids.ids);
    return;
  }
  OPD_CHECK(ids.ids == nullptr, kOp, ": ids must be NULL where sequences are given");
  for (int64_t b = 0; b < num_sequences; ++b) {
    if (ids.offsets[b] < ids.offsets[b + 1]) check_pointer(kOp, "a sequence", ids.sequences[b]);
  }
}

inline void check_table(const char* side, const opd_token_table_t& table) {
  OPD_CHECK(table.vocab_size >= 0, kOp, ": vocab_size of the ", side, " must be >= 0, got ",
            table.vocab_size);
  OPD_CHECK(table.data_size >= 0, kOp, ": data_size of the ", side, " must be >= 0, got ",
            table.data_size);
  if (table.vocab_size > 0) check_pointer(kOp, "offsets of the token table", table.offsets);
  if (table.data_size > 0) check_pointer(kOp, "data of the token table", table.data);
}

inline void check_args(const opd_align_tokens_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  OPD_CHECK(args->num_sequences >= 0, kOp, ": num_sequences must be >= 0, got ",
            args->num_sequences);
  OPD_CHECK(args->mode == OPD_ALIGN_STRICT || args->mode == OPD_ALIGN_REPAIR, kOp,
            ": mode must be an opd_align_mode_t, got ", args->mode);
  OPD_CHECK(args->max_edits >= 1 && args->max_edits <= OPD_MAX_ALIGN_EDITS, kOp,
            ": max_edits must be in [1, ", static_cast<int>(OPD_MAX_ALIGN_EDITS), "], got ",
            args->max_edits);
  check_ids("student", args->student, args->num_sequences);
  check_ids("teacher", args->teacher, args->num_sequences);
  check_table("student", args->student_table);
  check_table("teacher", args->teacher_table);
  check_pointers(kOp, "student_offsets and teacher_offsets",
                 {args->student_offsets, args->teacher_offsets});
  if (args->num_sequences > 0) check_pointer(kOp, "chunk_ends", args->chunk_ends);
  if (args->student.offsets[args->num_sequences] + args->teacher.offsets[args->num_sequences] > 0) {
    check_pointers(kOp, "is_aligned and num_bytes", {args->is_aligned, args->num_bytes});
  }
}

}  // namespace align_tokens
}  // namespace opd
