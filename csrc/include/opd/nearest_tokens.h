/* SPDX-License-Identifier: Apache-2.0 */
/* Of a vocabulary, the token with the fewest byte edits from each of some byte strings. Part of the
 * C API of opd.h, whose words on status and errors hold here. */
#ifndef OPD_NEAREST_TOKENS_H_
#define OPD_NEAREST_TOKENS_H_

#include "opd/opd.h"

#ifdef __cplusplus
extern "C" {
#endif

/* nearest[i] is the id in `vocabulary` with the fewest insertions, deletions and substitutions of
 * bytes from those of id i in `queries`, the lowest of equally near ones; distances[i] how many. Ids
 * with a symbol or without bytes are near nothing: both are -1 for such a query, and where no id of
 * the vocabulary is left. Allocates 16 bytes per id of the vocabulary for the time of the call. */
typedef struct opd_nearest_tokens_args_t {
  uint32_t struct_size;
  opd_token_table_t queries;
  opd_token_table_t vocabulary;
  int64_t* nearest;                 /* [queries.vocab_size] */
  int64_t* distances;               /* the same, or NULL */
  opd_parallel_for_fn parallel_for; /* NULL: OpenMP if built with it, else one thread */
} opd_nearest_tokens_args_t;

OPD_API opd_status_t opd_nearest_tokens(const opd_nearest_tokens_args_t* args);

#ifdef __cplusplus
}
#endif

#endif /* OPD_NEAREST_TOKENS_H_ */
