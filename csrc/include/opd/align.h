/* SPDX-License-Identifier: Apache-2.0 */
/* Byte-exact alignment of two tokenizations of the same texts: docs/alignment.md. Included by opd.h. */
#ifndef OPD_ALIGN_H_
#define OPD_ALIGN_H_

#include <stdint.h>

#include "opd/opd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bits of a token's symbol: the roles of a special token, which has no bytes. */
enum { OPD_ROLE_BOS = 1, OPD_ROLE_EOS = 2, OPD_ROLE_EOT = 4, OPD_ROLE_PAD = 8, OPD_ROLE_UNK = 16 };

/* The bytes of every id of a tokenizer: those of id v are data[offsets[v]] .. data[offsets[v + 1]]. */
typedef struct opd_token_table_t {
  const uint8_t* data;    /* [data_size] */
  int64_t data_size;
  const int64_t* offsets; /* [vocab_size + 1] */
  const uint8_t* symbols; /* [vocab_size] 0, or roles: then the id's bytes are not read. NULL: all 0 */
  int64_t vocab_size;
} opd_token_table_t;

/* A batch of token sequences: sequence b is ids[offsets[b]] .. ids[offsets[b + 1]], int32 or int64. */
typedef struct opd_token_ids_t {
  const void* ids;              /* [offsets[num_sequences]], or NULL: each lies elsewhere */
  const void* const* sequences; /* [num_sequences] then, the first id of each */
  int32_t id_bytes;             /* 4 or 8 */
  const int64_t* offsets;       /* [num_sequences + 1] */
} opd_token_ids_t;

typedef enum opd_align_mode_t {
  OPD_ALIGN_STRICT = 0, /* other bytes: OPD_BYTES_DIFFER */
  OPD_ALIGN_REPAIR = 1  /* minimum edit distance, what differs is not aligned */
} opd_align_mode_t;

enum { OPD_MAX_ALIGN_EDITS = 4096 };

/* The finest chunks that both tokenizations have in common. Chunk c is tokens student_offsets[c] ..
 * student_offsets[c + 1] of the packed student and the same of the teacher; chunks tile every
 * sequence. At most num_student_tokens + num_teacher_tokens chunks come out (N below). Every id,
 * offset and length that is used is checked. This call allocates host memory for its scratch. */
typedef struct opd_align_tokens_args_t {
  uint32_t struct_size;
  int64_t num_sequences;
  opd_token_ids_t student, teacher;
  opd_token_table_t student_table, teacher_table;
  int32_t mode;             /* opd_align_mode_t */
  int32_t max_edits;        /* 1 .. OPD_MAX_ALIGN_EDITS; a sequence whose sides are further apart is
                               taken in pieces of so many, and where that finds no way it is one
                               chunk that is not aligned */
  opd_parallel_for_fn parallel_for;
  int64_t* student_offsets; /* [N + 1] out, of which num_chunks + 1 count */
  int64_t* teacher_offsets; /* [N + 1] likewise */
  uint8_t* is_aligned;      /* [N] out: both sides have tokens, and these the same bytes */
  int64_t* num_bytes;       /* [N] out, of the student's tokens */
  int64_t* chunk_ends;      /* [num_sequences] out: end of each sequence's chunks */
} opd_align_tokens_args_t;

OPD_API opd_status_t opd_align_tokens(const opd_align_tokens_args_t* args);

#ifdef __cplusplus
}
#endif

#endif /* OPD_ALIGN_H_ */
