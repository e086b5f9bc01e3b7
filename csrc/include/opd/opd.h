/* SPDX-License-Identifier: Apache-2.0 */
/* The C API of opd-kernels: row kernels that take pointers and write into the caller's buffers.
 * C99. Nothing here throws, prints or exits, nor allocates but for align.h. Every function returns a
 * status; the text of the last failure on this thread is opd_last_error().
 *
 * Letters: T tokens (rows), V vocabulary. P teacher, Q student. Values are in nats.
 * The compute type is float64 if both logits are float64, else float32; "real" below means it. */
#ifndef OPD_OPD_H_
#define OPD_OPD_H_

#include <stdint.h>

#if defined(__GNUC__)
#define OPD_API __attribute__((visibility("default")))
#else
#define OPD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum opd_status_t {
  OPD_OK = 0,
  OPD_INVALID_ARGUMENT = 1,
  OPD_UNSUPPORTED = 2,
  OPD_INTERNAL = 3,
  OPD_CUDA_ERROR = 4,  /* of the CUDA runtime; opd_last_error() has its words */
  OPD_BYTES_DIFFER = 5 /* of opd_align_tokens: the two sides are not the same text */
} opd_status_t;

typedef enum opd_dtype_t {
  OPD_FLOAT32 = 0,
  OPD_FLOAT64 = 1,
  OPD_BFLOAT16 = 2,
  OPD_FLOAT16 = 3
} opd_dtype_t;

/* Ids of divergences.h's list, with what param0 and param1 are to them. */
typedef enum opd_divergence_t {
  OPD_FORWARD_KL = 0,
  OPD_REVERSE_KL = 1,
  OPD_JSD = 2,               /* beta, the weight of the teacher, in (0, 1) */
  OPD_SKEW_FORWARD_KL = 3,   /* alpha in (0, 1) */
  OPD_SKEW_REVERSE_KL = 4,   /* alpha in (0, 1); 1 detaches the mixture */
  OPD_TOTAL_VARIATION = 5,
  OPD_JEFFREYS = 6,          /* weight of the forward KL, in (0, 1) */
  OPD_SQUARED_HELLINGER = 7,
  OPD_ALPHA = 8,             /* alpha, neither 0 nor 1 */
  OPD_RENYI = 9,             /* alpha > 0, not 1 */
  OPD_PEARSON_CHI2 = 10,
  OPD_NEYMAN_CHI2 = 11,
  OPD_TODI = 12,
  OPD_ADAPTIVE_KL = 13,      /* mass of the head, in (0, 1) */
  OPD_ALPHA_BETA = 14,       /* alpha, beta; each and their sum 0 or at least 1e-3 in size */
  OPD_CONCRETE_SCORE = 15,   /* the two weights: 0 student's law, 1 teacher's, 2 uniform */
  OPD_CROSS_ENTROPY = 16     /* of the labels; reads no teacher */
} opd_divergence_t;

/* Rows of the statistics output, [OPD_NUM_STATISTICS, T]. */
enum {
  OPD_STATISTIC_STUDENT_ENTROPY = 0,
  OPD_STATISTIC_TEACHER_ENTROPY = 1,
  OPD_STATISTIC_FORWARD_KL = 2,
  OPD_STATISTIC_REVERSE_KL = 3,
  OPD_STATISTIC_TOP1_AGREEMENT = 4,
  OPD_STATISTIC_STUDENT_LSE = 5,
  OPD_STATISTIC_TEACHER_LSE = 6,
  OPD_STATISTIC_STUDENT_LOGPROBS = 7, /* of token_ids */
  OPD_STATISTIC_TEACHER_LOGPROBS = 8,
  OPD_STATISTIC_STUDENT_TOPK_MASS = 9, /* of topk_ids */
  OPD_STATISTIC_TEACHER_TOPK_MASS = 10,
  OPD_NUM_STATISTICS = 11
};

/* A row-major matrix whose last dimension is contiguous; row_stride counts elements. */
typedef struct opd_matrix_t {
  void* data;
  int64_t row_stride;
  int32_t dtype; /* opd_dtype_t */
} opd_matrix_t;

typedef struct opd_const_matrix_t {
  const void* data;
  int64_t row_stride;
  int32_t dtype;
} opd_const_matrix_t;

/* Runs body(context, begin, end) over a partition of [0, num_rows), in any order, on any threads. */
typedef void (*opd_rows_fn)(void* context, int64_t begin, int64_t end);
typedef void (*opd_parallel_for_fn)(int64_t num_rows, opd_rows_fn body, void* context);

/* One side's logits and how they become a law:
 * softmax(softcap(scale * (logits + bias)) / temperature), softcap(z) = c tanh(z / c). */
typedef struct opd_logits_t {
  opd_const_matrix_t matrix; /* data NULL: there is no such side */
  const void* bias;          /* [V] real, or NULL */
  double scale;              /* finite, not 0 */
  double softcap;            /* c > 0, or 0 for none */
  double temperature;        /* > 0 */
  const void* temperatures;  /* [T] real, > 0, in the place of temperature; or NULL */
} opd_logits_t;

/* One summand of the loss: coefficient[t] * D(P_t, Q_t). */
typedef struct opd_divergence_component_t {
  int32_t divergence; /* opd_divergence_t */
  double param0, param1;
  const void* coefficients; /* [T] real, or NULL for ones; 0 leaves the summand out */
} opd_divergence_component_t;

/* What stands in for the teacher's law in every summand. */
typedef enum opd_target_t {
  OPD_TARGET_TEACHER = 0,
  /* softmax(target_student * student + target_teacher * teacher + target_reference * reference) of
   * logits as the laws take them */
  OPD_TARGET_GEOMETRIC = 1,
  /* mixture_weights[t] P + (1 - mixture_weights[t]) Q */
  OPD_TARGET_MIXTURE = 2
} opd_target_t;

/* Doubles that a row of state holds; num_components of the call. Layout: csrc/core/divergence.cpp. */
enum { OPD_DIVERGENCE_STATE = 20, OPD_DIVERGENCE_STATE_PER_COMPONENT = 4 };

/* loss[t] = token_weights[t] * sum_j coefficients_j[t] * D_j(P_t, Q_t). Rows of weight 0 give exactly
 * 0 and are not read. One struct serves every call; which members each reads is said there. */
typedef struct opd_divergence_args_t {
  uint32_t struct_size; /* sizeof(this struct): a caller of another version is refused */
  int64_t num_tokens;
  int64_t vocab_size;   /* the columns that count; the rest of a row is never read */
  int64_t first_column; /* id of column 0, where the call sees a slice of the vocabulary; else 0 */
  opd_parallel_for_fn parallel_for; /* NULL: OpenMP if built with it, else one thread */
  opd_logits_t student, teacher, reference; /* the reference only for a geometric target */
  const opd_divergence_component_t* components;
  int32_t num_components; /* 1 .. OPD_MAX_COMPONENTS */
  int32_t target;         /* opd_target_t */
  int32_t live_target;    /* 1: the gradient also flows through the student inside the target */
  double target_student, target_teacher, target_reference;
  const void* mixture_weights; /* [T] real, in [0, 1] */
  const void* token_weights;   /* [T] real, or NULL for ones */
  const int64_t* labels;       /* [T, num_labels] for cross_entropy, or NULL; < 0 is no label */
  const void* label_weights;   /* [T, num_labels] real, or NULL for ones */
  int64_t num_labels;
  const int64_t* token_ids; /* [T] for the statistics, or NULL */
  const int64_t* topk_ids;  /* [T, num_topk] for the statistics, or NULL; < 0 is no id */
  int64_t num_topk;
  int32_t with_statistics;
  double* state;            /* [T, OPD_DIVERGENCE_STATE + num_components * .._PER_COMPONENT] */
  void* loss;               /* [T] real, out */
  void* statistics;         /* [OPD_NUM_STATISTICS, T] real, out, unweighted; or NULL */
  const void* grad_loss;    /* [T] real */
  opd_matrix_t grad;        /* out */
  int64_t grad_width;       /* columns vocab_size .. grad_width of grad are set to zero */
  opd_matrix_t scratch;     /* like grad; or data NULL */
} opd_divergence_args_t;

enum { OPD_MAX_COMPONENTS = 16 };

/* Out: loss, state, statistics. */
OPD_API opd_status_t opd_divergence_fwd_cpu(const opd_divergence_args_t* args);

/* Out: grad[t, v] = grad_loss[t] token_weights[t] d(sum)/dz_v, z the student's logits, rounded to its
 * dtype; from state as the forward call left it. */
OPD_API opd_status_t opd_divergence_bwd_cpu(const opd_divergence_args_t* args);

/* Out: loss, statistics, and in grad the gradient for grad_loss = 1. grad may be the student's logits
 * themselves. scratch, where given, is the teacher's logits, which are then overwritten: faster. (CPU only.)
 * Real (float32, float64) logits. */
OPD_API opd_status_t opd_divergence_fwd_grad_cpu(const opd_divergence_args_t* args);

/* The forward call in pieces, for logits of which only a slice of the columns exists at a time. state
 * starts as opd_divergence_init_cpu leaves it. For each slice one call of a phase adds what the slice
 * contributes; every slice must have passed a phase before the next begins. Between phases, state of
 * several processes may be combined; docs/numerics.md says how. */
typedef enum opd_divergence_phase_t {
  OPD_PHASE_LSE = 0,      /* largest logits and sums relative to them */
  OPD_PHASE_ROW_SUMS = 1, /* what terms need first; only some divergences do */
  OPD_PHASE_TERMS = 2     /* loss, sums for the gradient, statistics */
} opd_divergence_phase_t;

OPD_API opd_status_t opd_divergence_init_cpu(const opd_divergence_args_t* args);
OPD_API opd_status_t opd_divergence_phase_cpu(const opd_divergence_args_t* args, int32_t phase);
/* After the last slice of OPD_PHASE_LSE: turns maxima and sums into log-sum-exps. */
OPD_API opd_status_t opd_divergence_close_lse_cpu(const opd_divergence_args_t* args);
/* After the last phase. Out: loss, statistics. */
OPD_API opd_status_t opd_divergence_finish_cpu(const opd_divergence_args_t* args);

/* logprobs[t] = log Q_t(token_ids[t]); entropy[t] of Q_t; lse[t] of the logits that Q_t is the softmax
 * of, softcap(scale * (logits + bias)) / temperature. */
typedef struct opd_token_logprobs_spec_t {
  int64_t num_tokens;
  int64_t vocab_size; /* the columns that count; the rest of a row is never read */
  opd_parallel_for_fn parallel_for;
  opd_logits_t logits;
  const int64_t* token_ids; /* [T], each in [0, vocab_size) */
} opd_token_logprobs_spec_t;

typedef struct opd_token_logprobs_fwd_args_t {
  uint32_t struct_size;
  opd_token_logprobs_spec_t spec;
  void* logprobs; /* [T] real, out */
  double* lse;    /* [T] out */
  void* entropy;  /* [T] real, out */
} opd_token_logprobs_fwd_args_t;

OPD_API opd_status_t opd_token_logprobs_fwd_cpu(const opd_token_logprobs_fwd_args_t* args);

/* grad_logits[t, v] = (g_logprob (1[v = id] - q_v) + g_lse q_v - g_entropy q_v (log q_v + H)) *
 * d (the logits of Q_t)_v / d logits[t, v]; what a bias gets is its sum over t. grad_logits may be the
 * logits themselves (float32 or float64), or 16-bit in the memory of float32 logits: the same data,
 * twice the row_stride. */
typedef struct opd_token_logprobs_bwd_args_t {
  uint32_t struct_size;
  opd_token_logprobs_spec_t spec;
  const void* grad_logprobs; /* [T] real */
  const double* grad_lse;    /* [T] */
  const void* grad_entropy;  /* [T] real */
  const double* lse;         /* [T] from the forward call */
  const void* entropy;       /* [T] real, from the forward call */
  opd_matrix_t grad_logits;  /* out */
  int64_t grad_width;        /* columns vocab_size .. grad_width are set to zero */
} opd_token_logprobs_bwd_args_t;

OPD_API opd_status_t opd_token_logprobs_bwd_cpu(const opd_token_logprobs_bwd_args_t* args);

/* ---- A law on a few ids and, together, on all the rest. ---- */

/* Of Q_t, the softmax of the logits as their law takes them: its log-probability at each of a row's
 * ids, and of all the entries off the ids together, summed over these entries themselves. */
typedef struct opd_topk_divergence_spec_t {
  int64_t num_tokens;
  int64_t vocab_size; /* the columns that count; the rest of a row is never read */
  opd_parallel_for_fn parallel_for;
  opd_logits_t logits;
  const int64_t* token_ids; /* [T, num_ids], below vocab_size; < 0 is no id; none twice in a row */
  int64_t num_ids;          /* 1 .. OPD_MAX_IDS */
} opd_topk_divergence_spec_t;

enum { OPD_MAX_IDS = 8192 };

typedef struct opd_topk_divergence_fwd_args_t {
  uint32_t struct_size;
  opd_topk_divergence_spec_t spec;
  void* logprobs;       /* [T, num_ids] real, out; -inf where there is no id */
  double* tail_logprob; /* [T] out: log of the probability off the ids; -inf where that is 0 */
  double* lse;          /* [T] out, of the logits that Q_t is the softmax of */
  void* entropy;        /* [T] real, out, of the whole law */
} opd_topk_divergence_fwd_args_t;

OPD_API opd_status_t opd_topk_divergence_fwd_cpu(const opd_topk_divergence_fwd_args_t* args);

/* With z the logits that Q_t is the softmax of: grad_logits[t, v] = dz_v / d logits[t, v] times
 * grad_ids[t, k] where v is token_ids[t, k], and times grad_rest[t] exp(z_v - lse[t]) elsewhere; 0
 * there where grad_rest[t] is 0. lse + tail_logprob of the forward call in the place of lse divides
 * grad_rest among the entries off the ids by their share of the tail, however small that is.
 * grad_logits may be the logits themselves, as for opd_token_logprobs_bwd_cpu. */
typedef struct opd_topk_divergence_bwd_args_t {
  uint32_t struct_size;
  opd_topk_divergence_spec_t spec;
  const void* grad_ids;     /* [T, num_ids] real; not read where there is no id */
  const void* grad_rest;    /* [T] real */
  const double* lse;        /* [T] */
  opd_matrix_t grad_logits; /* out */
  int64_t grad_width;       /* columns vocab_size .. grad_width are set to zero */
} opd_topk_divergence_bwd_args_t;

OPD_API opd_status_t opd_topk_divergence_bwd_cpu(const opd_topk_divergence_bwd_args_t* args);

/* A gradient [T, V] on the columns that some row needs. A row's entries count relative to the size of
 * its token weight, which the gradient carries; a NaN or an infinity is always needed. Rows of weight
 * 0 are not read. Both calls read grad_logits (float32 or float64) once. */
typedef struct opd_sparse_gradient_args_t {
  uint32_t struct_size;
  int64_t num_tokens;
  int64_t vocab_size;
  opd_parallel_for_fn parallel_for;
  opd_const_matrix_t grad_logits;
  const void* token_weights; /* [T] real, or NULL for ones */
  double tolerance;          /* >= 0 */
  uint8_t* kept;             /* [V] */
  const int64_t* columns;    /* [num_columns], ascending */
  int64_t num_columns;
  opd_matrix_t packed;       /* [T, num_columns] out, in the dtype of grad_logits */
  void* dropped;             /* [T] real, out */
} opd_sparse_gradient_args_t;

/* Out: kept[v] = 1 where |grad_logits[t, v]| > tolerance * |token_weights[t]| for any t, else 0. */
OPD_API opd_status_t opd_sparse_gradient_mark_cpu(const opd_sparse_gradient_args_t* args);

/* Out: packed[t, k] = grad_logits[t, columns[k]], and dropped[t], the sum of
 * |grad_logits[t, v]| / |token_weights[t]| over the v with kept[v] = 0, added up in float64. */
OPD_API opd_status_t opd_sparse_gradient_pack_cpu(const opd_sparse_gradient_args_t* args);

/* target[columns[k], :] += rows[k, :]. */
typedef struct opd_sparse_gradient_add_args_t {
  uint32_t struct_size;
  int64_t num_columns;
  int64_t vocab_size;     /* rows of target */
  int64_t width;          /* columns of both */
  opd_parallel_for_fn parallel_for;
  const int64_t* columns; /* [num_columns], ascending */
  opd_const_matrix_t rows;
  opd_matrix_t target;    /* in, out; float32 or float64, as rows */
} opd_sparse_gradient_add_args_t;

OPD_API opd_status_t opd_sparse_gradient_add_cpu(const opd_sparse_gradient_add_args_t* args);

/* term, dterm and dterm_teacher of the n entries of one row, float64: what any port of a divergence
 * can be checked against. Entry i has log-probabilities teacher_logprob[i], student_logprob[i].
 * value: of the divergence; each output may be NULL. */
OPD_API opd_status_t opd_divergence_eval(int32_t divergence, double param0, double param1, int64_t n,
                                         const double* teacher_logprob,
                                         const double* student_logprob, double* term,
                                         double* dterm, double* dterm_teacher, double* value);

/* out[i, j] = sum_k a[i, k] b[k, j], or that added to it, in float32: the GEMMs of an LM head on a CPU
 * whose library is slow. Operands may be transposed views and of 16 bits. Every sum runs in the order
 * of k in blocks whose size is fixed: results do not depend on the number of threads. */
typedef struct opd_gemm_operand_t {
  const void* data;
  int64_t row_stride, column_stride; /* in elements; one of them is 1 */
  int32_t dtype;                     /* OPD_FLOAT32, OPD_BFLOAT16 or OPD_FLOAT16 */
} opd_gemm_operand_t;

typedef struct opd_gemm_args_t {
  uint32_t struct_size;
  int64_t m, n, k;
  opd_parallel_for_fn parallel_for;
  opd_gemm_operand_t a; /* [m, k] */
  opd_gemm_operand_t b; /* [k, n] */
  void* out;            /* [m, n] float32, out; contiguous along its rows */
  int64_t out_row_stride;
  int32_t accumulate; /* 1: out += */
  void* workspace;    /* opd_gemm_workspace_bytes(m, n, k) bytes, overwritten */
} opd_gemm_args_t;

OPD_API int64_t opd_gemm_workspace_bytes(int64_t m, int64_t n, int64_t k);
/* 1 where this is expected to be faster than the usual library: an x86 CPU with AVX2, not Intel's. */
OPD_API int32_t opd_gemm_preferred(void);
OPD_API opd_status_t opd_gemm_cpu(const opd_gemm_args_t* args);

/* ---- Two laws of different vocabularies. ---- */

/* With p = exp(teacher_log_scales[t]) P_t and q = exp(student_log_scales[t]) Q_t,
 *   D = rest_weight * sum_i |p_(i) - q_(i)| + pair_weight * sum_(v, w) JSD_beta(p_w, q_v):
 * the first sum is over the ids without a partner, each side from the largest down (by id where equal),
 * the shorter one followed by zeros; the second over the pairs, where student_pairs[v] = w.
 *   loss[t] = token_weights[t] * D;   grad[t, v] = dloss[t] / d logits[t, v];
 *   grad_log_scales[t] = dloss[t] / d student_log_scales[t].
 * Rows of weight 0 give exactly 0 and are not read; a row of either side without a law (a NaN, +inf, or
 * nothing but -inf) gives NaN. grad may be the student's logits. */
typedef struct opd_sorted_l1_args_t {
  uint32_t struct_size;
  int64_t num_tokens;
  int64_t student_vocab_size, teacher_vocab_size; /* the columns that count */
  opd_parallel_for_fn parallel_for;
  opd_logits_t student, teacher;
  const void* student_log_scales; /* [T] real, at most 0; or NULL for zeros */
  const void* teacher_log_scales;
  const int64_t* student_pairs;   /* [Vs] id of the teacher, < 0 for none; or NULL for no pairs */
  const uint8_t* teacher_paired;  /* [Vt] whether an id is in student_pairs, where it is once */
  const void* token_weights;      /* [T] real, or NULL for ones */
  double rest_weight, pair_weight, beta; /* beta: of the teacher in the JSD, in (0, 1) */
  int64_t num_workers;   /* rows that are worked on at a time, at most */
  void* workspace;       /* opd_sorted_l1_workspace_bytes(num_workers, ..) bytes, aligned to 8 */
  void* loss;            /* [T] real, out */
  opd_matrix_t grad;     /* out; data NULL: no gradient */
  int64_t grad_width;    /* columns student_vocab_size .. grad_width are set to zero */
  void* grad_log_scales; /* [T] real, out, with the gradient */
} opd_sorted_l1_args_t;

/* dtype: OPD_FLOAT64 if both logits are, else OPD_FLOAT32. */
OPD_API int64_t opd_sorted_l1_workspace_bytes(int64_t num_workers, int64_t student_vocab_size,
                                              int64_t teacher_vocab_size, int32_t dtype);
OPD_API opd_status_t opd_sorted_l1_cpu(const opd_sorted_l1_args_t* args);

/* ---- The largest entries of a law, and what they leave out. ---- */

/* Of row t's law Q_t, the softmax of z = softcap(scale * (logits + bias)) / temperature:
 *   ids, logprobs: the num_topk tokens of largest z, best first, of equal z (-0 == +0) the smaller id,
 *     and log Q of them. A token of probability 0 (z = -inf) is none of them: where fewer are left, the
 *     rest is id -1, log-prob -inf.
 *   lse: log sum_v exp z_v.   entropy: -sum_v q_v log q_v.
 *   tail_logprob: log of the mass of all other tokens, summed over them and not 1 minus that of the
 *     ids; -inf exactly where no other token has a finite z.
 *   token_logprobs: log Q of token_ids; -inf where the id is negative.
 * A row with a NaN or a +inf among its z has ids -1 and NaN everywhere else, also for negative
 * token_ids. So has a row of nothing but -inf, whose lse is -inf. The order of the ids is that of z as
 * the compute type has it: two logits that the softcap or the temperature rounds to one are equal. */
typedef struct opd_topk_logprobs_args_t {
  uint32_t struct_size;
  int64_t num_tokens;
  int64_t vocab_size; /* the columns that count; the rest of a row is never read */
  opd_parallel_for_fn parallel_for;
  opd_logits_t logits;
  int64_t num_topk;         /* 1 .. min(OPD_MAX_TOPK, vocab_size) */
  const int64_t* token_ids; /* [T, num_ids], each below vocab_size; negative: no id; or NULL */
  int64_t num_ids;          /* 0 .. OPD_MAX_TOPK */
  int32_t* ids;             /* [T, num_topk] out */
  void* logprobs;           /* [T, num_topk] real, out */
  double* lse;              /* [T] out */
  void* tail_logprob;       /* [T] real, out */
  void* entropy;            /* [T] real, out */
  void* token_logprobs;     /* [T, num_ids] real, out; or NULL if num_ids is 0 */
  void* workspace;          /* opd_topk_logprobs_workspace_bytes(..) bytes, overwritten; NULL if 0 */
} opd_topk_logprobs_args_t;

enum { OPD_MAX_TOPK = 4096 };

/* The same for both devices. */
OPD_API int64_t opd_topk_logprobs_workspace_bytes(int64_t num_tokens, int64_t vocab_size,
                                                  int64_t num_topk);
OPD_API opd_status_t opd_topk_logprobs_fwd_cpu(const opd_topk_logprobs_args_t* args);

/* num_draws ids per row, drawn with replacement from the proposal R_t, the softmax of z /
 * proposal_temperature, z as above: draw n is the first id at which the sum of R_t up to it exceeds
 * uniforms[t, n]. Distinct ids in ascending order, the rest of a row -1:
 *   weights = count / num_draws * Q_t / R_t, which is Q_t on average; 0 beside an id of -1.
 *   logprobs = log Q_t, -inf beside an id of -1.   lse: log sum_v exp z_v.
 * A row with a NaN or a +inf among its z, or of nothing but -inf, has ids -1 and NaN elsewhere (but
 * for the lse of the last, -inf). */
typedef struct opd_sample_tokens_args_t {
  uint32_t struct_size;
  int64_t num_tokens;
  int64_t vocab_size; /* the columns that count; the rest of a row is never read */
  opd_parallel_for_fn parallel_for;
  opd_logits_t logits;
  const double* uniforms; /* [T, num_draws], each in [0, 1) */
  int64_t num_draws;      /* 1 .. OPD_MAX_TOPK */
  double proposal_temperature; /* in [1e-30, 1e30] */
  int32_t* ids;           /* [T, num_draws] out */
  void* weights;          /* [T, num_draws] real, out */
  void* logprobs;         /* [T, num_draws] real, out */
  double* lse;            /* [T] out */
  void* workspace;        /* opd_sample_tokens_workspace_bytes(..) bytes, aligned to 8, overwritten */
} opd_sample_tokens_args_t;

/* The same for both devices. */
OPD_API int64_t opd_sample_tokens_workspace_bytes(int64_t num_tokens, int64_t vocab_size);
OPD_API opd_status_t opd_sample_tokens_fwd_cpu(const opd_sample_tokens_args_t* args);

/* ---- Drafts of one law, verified by another: docs/speculative.md. ---- */

/* Of row t's law, the softmax of z = softcap(scale * (logits + bias)) / temperature cut to its best
 * entries, {z >= floor}: first to those not below the top_k-th largest, then to the fewest largest of
 * what is left whose mass reaches top_p of it. What equals the last one stays.
 *   floor: the smallest z that is kept; -inf where nothing is cut.
 *   lse: log sum exp z_v over what is kept.   largest: of z.   argmax: its id, of equal z the smallest.
 *   logprobs: z - lse of token_ids; -inf below the floor, NaN without an id.
 *   ranks: how many entries come before the id, by z descending and then by id; -1 without an id.
 * A row with a NaN or a +inf among its z has lse, floor, logprobs and largest NaN, ranks and argmax -1;
 * so has a row of nothing but -inf, but for lse and largest, -inf. */
typedef struct opd_speculative_verify_rows_args_t {
  uint32_t struct_size;
  int64_t num_rows;
  int64_t vocab_size; /* the columns that count; the rest of a row is never read */
  opd_parallel_for_fn parallel_for;
  opd_logits_t logits;
  const int64_t* token_ids; /* [T], each below vocab_size; -1: none; below -1: the row is not read and
                               its outputs are those of a row with a NaN */
  int64_t top_k;            /* 0: no cut; as is vocab_size or more */
  double top_p;             /* in (0, 1]; 1: no cut */
  double* lse;              /* [T] out */
  void* floor;              /* [T] real, out */
  double* logprobs;         /* [T] out */
  int32_t* ranks;           /* [T] out */
  int32_t* argmax;          /* [T] out */
  void* largest;            /* [T] real, out */
  void* workspace;          /* opd_speculative_verify_workspace_bytes(num_rows, ..) bytes, aligned to 8 */
} opd_speculative_verify_rows_args_t;

/* A side of the residual law: its logits with what opd_speculative_verify_rows_* says of them, and
 * which of these rows each row of the call takes, times what. */
typedef struct opd_cut_law_t {
  opd_logits_t logits; /* temperatures by the rows of the matrix */
  int64_t num_rows;    /* of the matrix */
  const double* lse;   /* [num_rows] */
  const void* floor;   /* [num_rows] real */
  const int64_t* rows; /* [T], below num_rows; negative: none */
  const double* scale; /* [T], >= 0 */
} opd_cut_law_t;

/* With p and q the laws of the rows that row t takes of the teacher and of the student:
 *   r_v = max(teacher scale * p_v - student scale * q_v, 0).
 *   mass: sum_v r_v.   overlap: sum_v min(p_v, q_v).
 *   tokens: the first id at which the sum of r up to it exceeds uniforms[t] * mass, none of r_v = 0;
 *     drawn from p where r has no mass.
 *   student_logprobs, teacher_logprobs: log q and log p of the token.
 * Without a row of the student, or with a scale of 0, its law is not read: overlap is NaN. Its log-prob
 * of the token is NaN only without a row. Without a row of the teacher, or where a law that is read
 * has an lse that is not finite, tokens is -1 and all else NaN. */
typedef struct opd_speculative_verify_residual_args_t {
  uint32_t struct_size;
  int64_t num_rows;
  int64_t vocab_size;
  opd_parallel_for_fn parallel_for;
  opd_cut_law_t teacher, student; /* the student's matrix may be NULL if all its rows are negative */
  int32_t draws;            /* 0: tokens are -1 and their log-probs NaN; uniforms are not read */
  const double* uniforms;   /* [T], each in [0, 1) */
  double* mass;             /* [T] out */
  double* overlap;          /* [T] out */
  int32_t* tokens;          /* [T] out */
  double* student_logprobs; /* [T] out */
  double* teacher_logprobs; /* [T] out */
  void* workspace;          /* opd_speculative_verify_workspace_bytes(num_rows, ..) bytes, aligned to 8 */
} opd_speculative_verify_residual_args_t;

/* The same for both calls and both devices. */
OPD_API int64_t opd_speculative_verify_workspace_bytes(int64_t num_rows, int64_t vocab_size);
OPD_API opd_status_t opd_speculative_verify_rows_cpu(const opd_speculative_verify_rows_args_t* args);
OPD_API opd_status_t
opd_speculative_verify_residual_cpu(const opd_speculative_verify_residual_args_t* args);

/* ---- Segments: per-token values packed one segment (sequence, turn, group) after another. ---- */

/* Segment s is the tokens offsets[s] .. offsets[s + 1] - 1; empty segments are allowed. */
typedef struct opd_segments_t {
  const int64_t* offsets; /* [num_segments + 1]: from 0 to num_tokens, never decreasing */
  int64_t num_segments;
  int64_t num_tokens;
  int32_t dtype; /* OPD_FLOAT32 or OPD_FLOAT64: "real" of the four entry points below */
  opd_parallel_for_fn parallel_for;
} opd_segments_t;

/* out[i] = sum_k discount^k values[i + k stride], first_step <= k < first_step + num_steps, over the
 * k whose token is in the segment of i; i - k stride with prefix = 1. Its gradient with respect to
 * values is the same sum of grad_out with the other prefix. 0^0 = 1, and a factor of 0 reads
 * nothing. Sums are float64. */
typedef struct opd_segment_scan_args_t {
  uint32_t struct_size;
  opd_segments_t segments;
  double discount;    /* in [0, 1] */
  int64_t first_step; /* >= 0 */
  int64_t num_steps;  /* >= 1; INT64_MAX is the whole segment */
  int64_t stride;     /* >= 1 */
  int32_t prefix;     /* 0: towards the end of the segment, 1: towards its beginning */
  const void* values; /* [num_tokens] real */
  void* out;          /* [num_tokens] real; not the values */
  double* scratch;    /* [num_tokens], or NULL if num_steps is 1 or at least num_tokens */
} opd_segment_scan_args_t;

OPD_API opd_status_t opd_segment_scan_cpu(const opd_segment_scan_args_t* args);

typedef enum opd_reduction_t {
  OPD_SUM = 0,  /* sum_i w_i x_i; 0 if nothing counts */
  OPD_MEAN = 1, /* the same divided by sum_i w_i; 0 where that is 0 */
  OPD_MAX = 2,  /* over w_i != 0, NaN if one is; -inf if nothing counts */
  OPD_MIN = 3   /* likewise; inf if nothing counts */
} opd_reduction_t;

/* One value per segment. Tokens of weight 0 do not count and their values are not read. */
typedef struct opd_segment_reduce_args_t {
  uint32_t struct_size;
  opd_segments_t segments;
  int32_t reduction;   /* opd_reduction_t */
  const void* values;  /* [num_tokens] real */
  const void* weights; /* [num_tokens] real, or NULL for ones */
  void* out;           /* [num_segments] real */
  int64_t* index;      /* [num_segments] out, of OPD_MAX and OPD_MIN: the first token that attains
                          it, -1 if nothing counts; NULL if not wanted */
} opd_segment_reduce_args_t;

OPD_API opd_status_t opd_segment_reduce_cpu(const opd_segment_reduce_args_t* args);

/* out[i] = weights[i] segment_values[segment of i], exactly 0 where the weight is 0: the transpose of
 * OPD_SUM. */
typedef struct opd_segment_broadcast_args_t {
  uint32_t struct_size;
  opd_segments_t segments;
  const void* segment_values; /* [num_segments] real */
  const void* weights;        /* [num_tokens] real, or NULL for ones */
  void* out;                  /* [num_tokens] real */
} opd_segment_broadcast_args_t;

OPD_API opd_status_t opd_segment_broadcast_cpu(const opd_segment_broadcast_args_t* args);

/* Statistics of each group over its members that count. mean is 0 of no member; std is the root of
 * sum (x - mean)^2 / (count - correction), 0 if count <= correction; leave_one_out_mean[i] is the mean
 * of the members other than i, 0 if there is none. A member that does not count still gets one. */
typedef struct opd_group_statistics_args_t {
  uint32_t struct_size;
  opd_segments_t segments;
  int32_t correction;       /* 0: population, 1: sample */
  const void* values;       /* [num_tokens] real */
  const uint8_t* mask;      /* [num_tokens], 0 = does not count and is not read; NULL: all count */
  int64_t* count;           /* [num_segments] out */
  void* mean;               /* [num_segments] real, out */
  void* std;                /* [num_segments] real, out */
  void* leave_one_out_mean; /* [num_tokens] real, out */
} opd_group_statistics_args_t;

OPD_API opd_status_t opd_group_statistics_cpu(const opd_group_statistics_args_t* args);

/* ---- Top-k laws as rows of bytes: docs/topk_codec.md. ---- */

/* What is wrong with a row; of several faults the smallest number. */
typedef enum opd_codec_status_t {
  OPD_CODEC_OK = 0,
  /* of encode: the row is then marked as refused, and decoding it says so */
  OPD_CODEC_NAN = 1,       /* a log-prob is NaN */
  OPD_CODEC_POSITIVE = 2,  /* a log-prob is above 2^-10 */
  OPD_CODEC_ID = 3,        /* an id is neither -1 nor in [0, vocab_size) */
  OPD_CODEC_PADDING = 4,   /* an id of -1 has a log-prob, or an entry after it */
  OPD_CODEC_ORDER = 5,     /* a log-prob is larger than the one before it */
  OPD_CODEC_DUPLICATE = 6, /* an id is there twice */
  /* of decode: ids are then -1, log-probs NaN */
  OPD_CODEC_ROW_REFUSED = 7, /* encode has refused it */
  OPD_CODEC_ROW_HEADER = 8,  /* count, scale, largest log-prob or tail can't be */
  OPD_CODEC_ROW_IDS = 9,     /* ids don't ascend in [0, vocab_size), or are not as many as counted */
  OPD_CODEC_ROW_CODES = 10,  /* a code that its scale doesn't have, or no largest entry */
  OPD_CODEC_ROW_PADDING = 11 /* bits that must be 0 are not */
} opd_codec_status_t;

/* Rows of opd_topk_codec_row_bytes(): ids exactly, log-probs to half a step of the row, the tail
 * exactly. encode reads ids [T, num_topk] (best first; -1 is none), logprobs and tail_logprob, and
 * writes codes. decode reads codes, any bytes, and writes the others; equal log-probs come back by
 * id. Both write status. CPU and CUDA agree bit for bit. */
typedef struct opd_topk_codec_args_t {
  uint32_t struct_size;
  int64_t num_tokens;
  int64_t vocab_size; /* 1 .. 2^31 */
  int64_t num_topk;   /* 1 .. 4096, at most vocab_size */
  int32_t bits;       /* of a log-prob, 4 .. 16 */
  opd_parallel_for_fn parallel_for;
  int32_t* ids;        /* [T, num_topk] */
  float* logprobs;     /* [T, num_topk] nats */
  float* tail_logprob; /* [T] log of the mass outside; -inf for none */
  uint8_t* codes;      /* [T, row_bytes] */
  int32_t* status;     /* [T] opd_codec_status_t */
} opd_topk_codec_args_t;

/* A multiple of 4; -1 if there is no such row. */
OPD_API int64_t opd_topk_codec_row_bytes(int64_t num_topk, int64_t vocab_size, int32_t bits);
OPD_API opd_status_t opd_topk_codec_encode_cpu(const opd_topk_codec_args_t* args);
OPD_API opd_status_t opd_topk_codec_decode_cpu(const opd_topk_codec_args_t* args);

/* ---- The same on a CUDA GPU. ---- */

/* As the entry point of the same name on the CPU, on the current device. Every pointer is device
 * memory, but for `args` itself and its array of components, whose coefficients are device memory.
 * What they point to is read and written in the order of `stream` (a cudaStream_t; NULL is the
 * default stream); the call returns before. Nothing is allocated and nothing waits, so that a call
 * can be captured into a CUDA graph. Logits are float32, bfloat16 or float16, arithmetic is float32;
 * segments may be float64. parallel_for is not used. Values are not checked: an id beyond the
 * vocabulary, a temperature that is not positive or a mixture weight outside [0, 1] gives an
 * undefined value in its own row, and nothing beyond a buffer is read or written. A library built
 * without CUDA returns OPD_UNSUPPORTED. */
OPD_API opd_status_t opd_divergence_fwd_cuda(const opd_divergence_args_t* args, void* stream);
OPD_API opd_status_t opd_divergence_bwd_cuda(const opd_divergence_args_t* args, void* stream);
/* grad may be of 16 bits, also in the memory of the student's float32 logits: then grad.row_stride is
 * twice student.matrix.row_stride, and each row's gradient lies in the first half of its own logits.
 * scratch is not used. An id beyond the vocabulary makes what it is asked for NaN. */
OPD_API opd_status_t opd_divergence_fwd_grad_cuda(const opd_divergence_args_t* args, void* stream);
OPD_API opd_status_t opd_divergence_init_cuda(const opd_divergence_args_t* args, void* stream);
OPD_API opd_status_t opd_divergence_phase_cuda(const opd_divergence_args_t* args,
                                               int32_t phase, void* stream);
OPD_API opd_status_t opd_divergence_close_lse_cuda(const opd_divergence_args_t* args, void* stream);
OPD_API opd_status_t opd_divergence_finish_cuda(const opd_divergence_args_t* args, void* stream);
OPD_API opd_status_t opd_token_logprobs_fwd_cuda(const opd_token_logprobs_fwd_args_t* args,
                                                 void* stream);
OPD_API opd_status_t opd_token_logprobs_bwd_cuda(const opd_token_logprobs_bwd_args_t* args,
                                                 void* stream);
OPD_API opd_status_t opd_topk_logprobs_fwd_cuda(const opd_topk_logprobs_args_t* args, void* stream);
/* Uniforms are not checked either: one outside [0, 1) draws the first token of its row or the last. */
OPD_API opd_status_t opd_sample_tokens_fwd_cuda(const opd_sample_tokens_args_t* args, void* stream);
OPD_API opd_status_t opd_topk_divergence_fwd_cuda(const opd_topk_divergence_fwd_args_t* args,
                                                  void* stream);
OPD_API opd_status_t opd_topk_divergence_bwd_cuda(const opd_topk_divergence_bwd_args_t* args,
                                                  void* stream);
OPD_API opd_status_t opd_speculative_verify_rows_cuda(const opd_speculative_verify_rows_args_t* args,
                                                      void* stream);
OPD_API opd_status_t
opd_speculative_verify_residual_cuda(const opd_speculative_verify_residual_args_t* args, void* stream);
OPD_API opd_status_t opd_sparse_gradient_mark_cuda(const opd_sparse_gradient_args_t* args,
                                                   void* stream);
OPD_API opd_status_t opd_sparse_gradient_pack_cuda(const opd_sparse_gradient_args_t* args,
                                                   void* stream);
OPD_API opd_status_t opd_sparse_gradient_add_cuda(const opd_sparse_gradient_add_args_t* args,
                                                  void* stream);
OPD_API opd_status_t opd_segment_scan_cuda(const opd_segment_scan_args_t* args, void* stream);
OPD_API opd_status_t opd_segment_reduce_cuda(const opd_segment_reduce_args_t* args, void* stream);
OPD_API opd_status_t opd_segment_broadcast_cuda(const opd_segment_broadcast_args_t* args,
                                                void* stream);
OPD_API opd_status_t opd_group_statistics_cuda(const opd_group_statistics_args_t* args,
                                               void* stream);

OPD_API opd_status_t opd_topk_codec_encode_cuda(const opd_topk_codec_args_t* args, void* stream);
OPD_API opd_status_t opd_topk_codec_decode_cuda(const opd_topk_codec_args_t* args, void* stream);

/* Text of the last failure on this thread; "" if there was none. Owned by the library. */
OPD_API const char* opd_last_error(void);

OPD_API const char* opd_version(void);

#ifdef __cplusplus
}
#endif

#include "opd/align.h"

#endif /* OPD_OPD_H_ */
