/* SPDX-License-Identifier: Apache-2.0 */
/* Of a vocabulary, the token with the fewest byte edits from each of some byte strings. Part of the
 * C API of opd.h, whose words on status and errors hold here. */
#ifndef OPD_NEAREST_TOKENS_H_
#define OPD_NEAREST_TOKENS_H_

#include "opd/opd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* String i is data[offsets[i]] to data[offsets[i + 1] - 1]; offsets hold num_strings + 1 values from
 * 0, never decreasing. */
typedef struct opd_byte_strings_t {
  const uint8_t* data;
  const int64_t* offsets;
  int64_t num_strings;
} opd_byte_strings_t;

/* nearest[i] is the id in `vocabulary` with the fewest insertions, deletions and substitutions of
 * bytes from queries' string i, the lowest of equally near ones; distances[i] how many. Both -1 for
 * an empty query, and where the vocabulary has no token with bytes that counts.
 * Allocates 16 bytes per token of the vocabulary for the time of the call. */
typedef struct opd_nearest_tokens_args_t {
  uint32_t struct_size;
  opd_byte_strings_t queries;
  opd_byte_strings_t vocabulary;
  const uint8_t* is_special; /* [vocabulary.num_strings], not 0: never near anything; or NULL */
  int64_t* nearest;          /* [queries.num_strings] */
  int64_t* distances;        /* the same, or NULL */
  opd_parallel_for_fn parallel_for; /* NULL: OpenMP's threads */
} opd_nearest_tokens_args_t;

OPD_API opd_status_t opd_nearest_tokens_cpu(const opd_nearest_tokens_args_t* args);

#ifdef __cplusplus
}
#endif

#endif /* OPD_NEAREST_TOKENS_H_ */
