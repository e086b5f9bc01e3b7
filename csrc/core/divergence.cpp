// SPDX-License-Identifier: Apache-2.0
// Divergence of two rows of logits. A row is read twice (log-sum-exps, then terms) and, for the
// gradient in place, written twice: first dterm over the student's logits and q over the
// teacher's, then (dterm - q * sum dterm) * scale, which needs no transcendental.
#include "opd/divergences.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "check.h"
#include "parallel.h"
#include "rows.h"

namespace opd {
namespace {

constexpr char kOp[] = "divergence";

opd_const_matrix_t as_const(opd_matrix_t matrix) {
  return {matrix.data, matrix.row_stride, matrix.dtype};
}

template <class T>
struct RowState {
  double student_lse, teacher_lse;
  T student_largest, teacher_largest;
};

// What turns two logits into an Entry.
template <class T>
struct Shifts {
  explicit Shifts(const RowState<T>& state)
      : student(state.student_lse),
        teacher(state.teacher_lse),
        gap(state.student_lse - state.teacher_lse) {}
  Shift<T> student, teacher, gap;
};

template <class T>
RowState<T> row_state(const LogitsRow<T>& student, const LogitsRow<T>& teacher) {
  RowState<T> state;
  state.student_lse = row_lse(student, &state.student_largest);
  state.teacher_lse = row_lse(teacher, &state.teacher_largest);
  return state;
}

template <class T>
OPD_HD Entry<T> make_entry(T student_logit, T teacher_logit, const Shifts<T>& shifts) {
  Entry<T> entry;
  entry.lq = (student_logit - shifts.student.high) - shifts.student.low;
  entry.lp = (teacher_logit - shifts.teacher.high) - shifts.teacher.low;
  T lost;
  const T gap = difference(student_logit, teacher_logit, &lost);
  entry.gap = (gap - shifts.gap.high) - (shifts.gap.low - lost);
  entry.q = exp(entry.lq);
  entry.p = exp(entry.lp);
  return entry;
}

template <class T, class Divergence>
OPD_ELEMENTWISE void entry_terms(const Divergence divergence, const T* __restrict__ student,
                                 const T* __restrict__ teacher, const Shifts<T> shifts,
                                 int padded, T* __restrict__ term, T* __restrict__ dterm,
                                 T* __restrict__ q) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> entry = make_entry(student[i], teacher[i], shifts);
    term[i] = divergence.term(entry);
    dterm[i] = divergence.dterm(entry);
    q[i] = entry.q;
  }
}

template <class T>
OPD_ELEMENTWISE void entry_statistics(const T* __restrict__ student, const T* __restrict__ teacher,
                                      const Shifts<T> shifts, int padded,
                                      T* __restrict__ student_entropy,
                                      T* __restrict__ teacher_entropy, T* __restrict__ forward_kl,
                                      T* __restrict__ reverse_kl) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const Entry<T> entry = make_entry(student[i], teacher[i], shifts);
    student_entropy[i] = select(entry.q == T(0), T(0), -entry.q * entry.lq);
    teacher_entropy[i] = select(entry.p == T(0), T(0), -entry.p * entry.lp);
    forward_kl[i] = ForwardKl{}.term(entry);
    reverse_kl[i] = ReverseKl{}.term(entry);
  }
}

template <class T>
OPD_ELEMENTWISE void entry_overlap(const SkewForwardKl divergence, const T* __restrict__ student,
                                   const T* __restrict__ teacher, const Shifts<T> shifts,
                                   int padded, T* __restrict__ out) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    out[i] = divergence.overlap(make_entry(student[i], teacher[i], shifts));
  }
}

template <class T>
struct Sums {
  double term = 0.0;
  double dterm = 0.0;
};

// Calls sink(begin, count, dterm, q) per block (arrays of `count` values) and returns the row sums.
// The padding of a last block has p = q = 0 and adds nothing.
template <class T, class Divergence, class Sink>
Sums<T> row_terms(const Divergence& divergence, const LogitsRow<T>& student,
                  const LogitsRow<T>& teacher, const RowState<T>& state, Sink&& sink) {
  Block<T> staged_student, staged_teacher, term, dterm, q;
  const Shifts<T> shifts(state);
  Sums<T> sums;
  for_each_block(student.vocab_size(), [&](int64_t begin, int count) {
    const T* s = student.block(begin, count, staged_student.values);
    const T* t = teacher.block(begin, count, staged_teacher.values);
    const int padded = round_up_to_lanes(count);
    entry_terms(divergence, s, t, shifts, padded, term.values, dterm.values, q.values);
    sums.term += lane_sum(term.values, padded);
    sums.dterm += lane_sum(dterm.values, padded);
    sink(begin, count, dterm.values, q.values);
  });
  return sums;
}

// The form of the divergence that suits this row; only the skewed forward KL has two. Backward
// decides again, from the same numbers and so alike.
template <class T, class Divergence>
Divergence for_row(const Divergence& divergence, const LogitsRow<T>&, const LogitsRow<T>&,
                   const RowState<T>&) {
  return divergence;
}

template <class T>
SkewForwardKl for_row(const SkewForwardKl& divergence, const LogitsRow<T>& student,
                      const LogitsRow<T>& teacher, const RowState<T>& state) {
  Block<T> staged_student, staged_teacher, terms;
  const Shifts<T> shifts(state);
  double overlap = 0.0;
  for_each_block(student.vocab_size(), [&](int64_t begin, int count) {
    const T* s = student.block(begin, count, staged_student.values);
    const T* t = teacher.block(begin, count, staged_teacher.values);
    const int padded = round_up_to_lanes(count);
    entry_overlap(divergence, s, t, shifts, padded, terms.values);
    overlap += lane_sum(terms.values, padded);
  });
  return {divergence.alpha, overlap < 0.5 ? 1.0 : 0.0};
}

// The statistics of a row, in the order of opd.h.
template <class T>
void row_statistics(const LogitsRow<T>& student, const LogitsRow<T>& teacher,
                    const RowState<T>& state, int64_t stride, T* out) {
  Block<T> staged_student, staged_teacher, parts[4];
  const Shifts<T> shifts(state);
  double sums[4] = {};
  for_each_block(student.vocab_size(), [&](int64_t begin, int count) {
    const T* s = student.block(begin, count, staged_student.values);
    const T* t = teacher.block(begin, count, staged_teacher.values);
    const int padded = round_up_to_lanes(count);
    entry_statistics(s, t, shifts, padded, parts[0].values, parts[1].values, parts[2].values,
                     parts[3].values);
    for (int k = 0; k < 4; ++k) sums[k] += lane_sum(parts[k].values, padded);
  });
  for (int k = 0; k < 4; ++k) out[k * stride] = static_cast<T>(sums[k]);
  const bool agree = first_argmax(student, state.student_largest) ==
                     first_argmax(teacher, state.teacher_largest);
  const bool defined = !std::isnan(state.student_lse) && !std::isnan(state.teacher_lse);
  const T undefined = std::numeric_limits<T>::quiet_NaN();
  out[OPD_STATISTIC_TOP1_AGREEMENT * stride] = !defined ? undefined : agree ? T(1) : T(0);
}

template <class T>
void clear_statistics(int64_t stride, T* out) {
  for (int k = 0; k < OPD_NUM_STATISTICS; ++k) out[k * stride] = T(0);
}

void check_spec(const opd_divergence_spec_t& spec, opd_const_matrix_t student,
                opd_const_matrix_t teacher) {
  check_sizes(kOp, spec.num_tokens, spec.vocab_size);
  check_temperature(kOp, "student_temperature", spec.student_temperature);
  check_temperature(kOp, "teacher_temperature", spec.teacher_temperature);
  check_dtype(kOp, "student_logits", student.dtype);
  check_dtype(kOp, "teacher_logits", teacher.dtype);
  const bool bounded = spec.divergence == OPD_JSD || spec.divergence == OPD_SKEW_FORWARD_KL ||
                       spec.divergence == OPD_SKEW_REVERSE_KL;
  OPD_CHECK(!bounded || (spec.param0 > 0.0 && spec.param0 < 1.0), kOp,
            ": param0 of this divergence must be in (0, 1), got ", spec.param0);
  check_logits(kOp, "student_logits", student, spec.num_tokens);
  check_logits(kOp, "teacher_logits", teacher, spec.num_tokens);
  OPD_CHECK((student.dtype == OPD_FLOAT64) == (teacher.dtype == OPD_FLOAT64), kOp,
            ": student_logits and teacher_logits must both be float64 or neither");
}

// fn(divergence, T{}) for the functor and the compute type of the call.
template <class Fn>
void visit(const opd_divergence_spec_t& spec, int32_t student_dtype, Fn&& fn) {
  const bool known =
      visit_divergence(spec.divergence, spec.param0, spec.param1, [&](auto divergence) {
        student_dtype == OPD_FLOAT64 ? fn(divergence, double{}) : fn(divergence, float{});
      });
  OPD_CHECK(known, kOp, ": divergence must be an opd_divergence_t, got ", spec.divergence);
}

template <class T, class Divergence>
void forward(const Divergence& divergence, const opd_divergence_fwd_args_t& args) {
  const opd_divergence_spec_t& spec = args.spec;
  const T* weights = static_cast<const T*>(args.token_weights);
  T* statistics = static_cast<T*>(args.statistics);
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const T weight = weights ? weights[row] : T(1);
    T* const loss = static_cast<T*>(args.loss) + row;
    T* const grad_sum = static_cast<T*>(args.grad_sum) + row;
    if (weight == T(0)) {
      *loss = *grad_sum = T(0);
      args.student_lse[row] = args.teacher_lse[row] = 0.0;
      if (statistics) clear_statistics(spec.num_tokens, statistics + row);
      return;
    }
    const LogitsRow<T> student(args.student_logits, row, spec.vocab_size, spec.student_temperature);
    const LogitsRow<T> teacher(args.teacher_logits, row, spec.vocab_size, spec.teacher_temperature);
    const RowState<T> state = row_state(student, teacher);
    const auto suited = for_row(divergence, student, teacher, state);
    const Sums<T> sums =
        row_terms(suited, student, teacher, state, [](int64_t, int, const T*, const T*) {});
    *loss = static_cast<T>(static_cast<double>(weight) * sums.term);
    *grad_sum = static_cast<T>(sums.dterm);
    args.student_lse[row] = state.student_lse;
    args.teacher_lse[row] = state.teacher_lse;
    if (statistics) {
      row_statistics(student, teacher, state, spec.num_tokens, statistics + row);
    }
  });
}

template <class T, class Divergence>
void backward(const Divergence& divergence, const opd_divergence_bwd_args_t& args) {
  const opd_divergence_spec_t& spec = args.spec;
  const T* weights = static_cast<const T*>(args.token_weights);
  const T* grad_loss = static_cast<const T*>(args.grad_loss);
  const T* grad_sums = static_cast<const T*>(args.grad_sum);
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const T weight = weights ? weights[row] : T(1);
    if (weight == T(0) || grad_loss[row] == T(0)) {
      zero_columns(args.grad_student_logits, row, 0, args.grad_width);
      return;
    }
    const T scale = weight * grad_loss[row] / static_cast<T>(spec.student_temperature);
    const T grad_sum = grad_sums[row];
    const LogitsRow<T> student(args.student_logits, row, spec.vocab_size, spec.student_temperature);
    const LogitsRow<T> teacher(args.teacher_logits, row, spec.vocab_size, spec.teacher_temperature);
    const RowState<T> state{args.student_lse[row], args.teacher_lse[row], T(0), T(0)};
    Block<T> gradient;
    row_terms(for_row(divergence, student, teacher, state), student, teacher, state,
              [&](int64_t begin, int count, const T* dterm, const T* q) {
OPD_IVDEP
                for (int i = 0; i < count; ++i) {
                  gradient.values[i] = scale * (dterm[i] - q[i] * grad_sum);
                }
                store_block(args.grad_student_logits, row, begin, count, gradient.values);
              });
    zero_columns(args.grad_student_logits, row, spec.vocab_size, args.grad_width);
  });
}

template <class T, class Divergence>
void forward_grad(const Divergence& divergence, const opd_divergence_fwd_grad_args_t& args) {
  const opd_divergence_spec_t& spec = args.spec;
  const T* weights = static_cast<const T*>(args.token_weights);
  T* statistics = static_cast<T*>(args.statistics);
  parallel_rows(spec.parallel_for, spec.num_tokens, [&](int64_t row) {
    const T weight = weights ? weights[row] : T(1);
    T* const loss = static_cast<T*>(args.loss) + row;
    if (weight == T(0)) {
      *loss = T(0);
      zero_columns(args.student_logits, row, 0, spec.vocab_size);
      if (statistics) clear_statistics(spec.num_tokens, statistics + row);
      return;
    }
    const LogitsRow<T> student(as_const(args.student_logits), row, spec.vocab_size,
                               spec.student_temperature);
    const LogitsRow<T> teacher(as_const(args.teacher_logits), row, spec.vocab_size,
                               spec.teacher_temperature);
    T* const student_row =
        static_cast<T*>(args.student_logits.data) + row * args.student_logits.row_stride;
    T* const teacher_row =
        static_cast<T*>(args.teacher_logits.data) + row * args.teacher_logits.row_stride;
    const RowState<T> state = row_state(student, teacher);
    if (statistics) {
      row_statistics(student, teacher, state, spec.num_tokens, statistics + row);
    }
    const auto suited = for_row(divergence, student, teacher, state);
    const Sums<T> sums = row_terms(suited, student, teacher, state,
                                   [&](int64_t begin, int count, const T* dterm, const T* q) {
                                     std::copy(dterm, dterm + count, student_row + begin);
                                     std::copy(q, q + count, teacher_row + begin);
                                   });
    *loss = static_cast<T>(static_cast<double>(weight) * sums.term);
    const T scale = weight / static_cast<T>(spec.student_temperature);
    const T grad_sum = static_cast<T>(sums.dterm);
OPD_IVDEP
    for (int64_t v = 0; v < spec.vocab_size; ++v) {
      student_row[v] = scale * (student_row[v] - teacher_row[v] * grad_sum);
    }
  });
}

}  // namespace
}  // namespace opd

using opd::guarded;

opd_status_t opd_divergence_fwd_cpu(const opd_divergence_fwd_args_t* args) {
  return guarded([&] {
    opd::check_pointer(opd::kOp, "args", args);
    opd::check_struct_size(opd::kOp, args->struct_size, sizeof(*args));
    opd::check_spec(args->spec, args->student_logits, args->teacher_logits);
    if (args->spec.num_tokens == 0) return;
    opd::check_pointers(opd::kOp, "every output but statistics",
                        {args->loss, args->grad_sum, args->student_lse, args->teacher_lse});
    opd::visit(args->spec, args->student_logits.dtype, [&](auto divergence, auto real) {
      opd::forward<decltype(real)>(divergence, *args);
    });
  });
}

opd_status_t opd_divergence_bwd_cpu(const opd_divergence_bwd_args_t* args) {
  return guarded([&] {
    opd::check_pointer(opd::kOp, "args", args);
    opd::check_struct_size(opd::kOp, args->struct_size, sizeof(*args));
    opd::check_spec(args->spec, args->student_logits, args->teacher_logits);
    if (args->spec.num_tokens == 0) return;
    opd::check_pointers(opd::kOp, "every pointer but token_weights",
                        {args->grad_loss, args->grad_sum, args->student_lse, args->teacher_lse, args->grad_student_logits.data});
    opd::check_dtype(opd::kOp, "grad_student_logits", args->grad_student_logits.dtype);
    opd::check_gradient(opd::kOp, args->grad_student_logits, args->spec.num_tokens,
                        args->grad_width, args->spec.vocab_size);
    opd::visit(args->spec, args->student_logits.dtype, [&](auto divergence, auto real) {
      opd::backward<decltype(real)>(divergence, *args);
    });
  });
}

opd_status_t opd_divergence_fwd_grad_cpu(const opd_divergence_fwd_grad_args_t* args) {
  return guarded([&] {
    opd::check_pointer(opd::kOp, "args", args);
    opd::check_struct_size(opd::kOp, args->struct_size, sizeof(*args));
    const int32_t dtype = args->student_logits.dtype;
    opd::check_spec(args->spec, opd::as_const(args->student_logits),
                    opd::as_const(args->teacher_logits));
    OPD_CHECK((dtype == OPD_FLOAT32 || dtype == OPD_FLOAT64) && args->teacher_logits.dtype == dtype,
              opd::kOp, ": logits must be float32 or float64 to be overwritten by the gradient");
    if (args->spec.num_tokens == 0) return;
    opd::check_pointer(opd::kOp, "loss", args->loss);
    for (const opd_matrix_t& matrix : {args->student_logits, args->teacher_logits}) {
      opd::check_gradient(opd::kOp, matrix, args->spec.num_tokens, args->spec.vocab_size,
                          args->spec.vocab_size);
    }
    OPD_CHECK(args->student_logits.data != args->teacher_logits.data, opd::kOp,
              ": student_logits and teacher_logits are both overwritten and must not be the same");
    opd::visit(args->spec, dtype, [&](auto divergence, auto real) {
      opd::forward_grad<decltype(real)>(divergence, *args);
    });
  });
}

opd_status_t opd_divergence_eval(int32_t divergence, double param0, double param1, int64_t n,
                                 const double* teacher_logprob, const double* student_logprob,
                                 double* term, double* dterm) {
  return guarded([&] {
    if (n == 0) return;
    opd::check_pointers(opd::kOp, "every pointer", {teacher_logprob, student_logprob, term, dterm});
    const bool known = opd::visit_divergence(divergence, param0, param1, [&](auto functor) {
      for (int64_t i = 0; i < n; ++i) {
        const opd::Entry<double> entry{teacher_logprob[i], student_logprob[i],
                                       std::exp(teacher_logprob[i]), std::exp(student_logprob[i]),
                                       student_logprob[i] - teacher_logprob[i]};
        term[i] = functor.term(entry);
        dterm[i] = functor.dterm(entry);
      }
    });
    OPD_CHECK(known, opd::kOp, ": divergence must be an opd_divergence_t, got ", divergence);
  });
}
