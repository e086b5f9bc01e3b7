// SPDX-License-Identifier: Apache-2.0
// Divergences of two rows of logits, in phases that share a row of state: log-sum-exps, sums that
// terms need first, terms, gradient. A whole row goes through them in one call; slices of a
// vocabulary go through them one call each. In place the gradient is dterm over the student's
// logits and q over the teacher's first, then (dterm - q * sum dterm) * scale, which needs no
// transcendental.
#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "divergence_check.h"
#include "divergence_phases.h"
#include "divergence_row.h"
#include "parallel.h"
#include "rows.h"

namespace opd {
namespace {

// Every phase of a whole row but the last: sink gets dterm and q while the terms are formed.
template <class T, class Sink>
void whole_row(const Row<T>& row, Sink&& sink) {
  row.init();
  row.add_lse(true);
  row.close_lse();
  row.find_thresholds();
  const bool together = std::is_same_v<std::decay_t<Sink>, NoSink> && row.sums_with_terms();
  if (!together) row.add_row_sums();
  row.add_terms(sink, together);
}

constexpr NoSink kNoSink{};

template <class T>
void forward(const opd_divergence_args_t& args) {
  parallel_rows(args.parallel_for, args.num_tokens, [&](int64_t index) {
    const Row<T> row(args, index);
    if (!row.is_active()) return row.skip();
    whole_row(row, kNoSink);
    row.finish();
  });
}

template <class T>
void write_gradient(const opd_divergence_args_t& args, int64_t index, const Row<T>& row,
                    T grad_loss) {
  const T scale = row.weight() * grad_loss * row.student().slope();
  row.gradient([&](int64_t begin, int count, T* gradient) {
OPD_IVDEP
    for (int i = 0; i < count; ++i) gradient[i] *= scale;
    store_block(args.grad, index, begin, count, gradient);
  });
  zero_columns(args.grad, index, args.vocab_size, args.grad_width);
}

template <class T>
void backward(const opd_divergence_args_t& args) {
  const T* grad_loss = static_cast<const T*>(args.grad_loss);
  parallel_rows(args.parallel_for, args.num_tokens, [&](int64_t index) {
    const Row<T> row(args, index);
    if (!row.is_active() || grad_loss[index] == T(0) || !row.has_gradient()) {
      zero_columns(args.grad, index, 0, args.grad_width);
      return;
    }
    write_gradient(args, index, row, grad_loss[index]);
  });
}

template <class T>
void forward_grad(const opd_divergence_args_t& args) {
  parallel_rows(args.parallel_for, args.num_tokens, [&](int64_t index) {
    double state[kStateSize + OPD_MAX_COMPONENTS * kComponentState];
    const Row<T> row(args, index, state);
    if (!row.is_active()) {
      zero_columns(args.grad, index, 0, args.grad_width);
      return row.skip();
    }
    if (!row.has_gradient()) {
      whole_row(row, kNoSink);
      row.finish();
      zero_columns(args.grad, index, 0, args.grad_width);
      return;
    }
    if (args.scratch.data == nullptr || row.is_live_geometric() || row.student().has_softcap()) {
      whole_row(row, kNoSink);
      row.finish();
      return write_gradient(args, index, row, T(1));
    }
    T* const dterm_row = static_cast<T*>(args.grad.data) + index * args.grad.row_stride;
    T* const q_row = static_cast<T*>(args.scratch.data) + index * args.scratch.row_stride;
    whole_row(row, [&](int64_t begin, int count, const T* dterm, const T* q) {
      std::copy(dterm, dterm + count, dterm_row + begin);
      std::copy(q, q + count, q_row + begin);
      row.subtract_labels(begin, count, dterm_row + begin);
    });
    row.finish();
    const T scale = row.weight() * row.student().slope();
    const T grad_sum = static_cast<T>(row.full_grad_sum());
OPD_IVDEP
    for (int64_t v = 0; v < args.vocab_size; ++v) {
      dterm_row[v] = scale * (dterm_row[v] - q_row[v] * grad_sum);
    }
  });
}

// fn(T{}) for the compute type of the call, after the checks; no tokens, no call.
template <class Fn>
opd_status_t run(const opd_divergence_args_t* args, Fn&& fn) {
  return guarded([&] {
    check_pointer(kOp, "args", args);
    check_args(*args);
    if (args->num_tokens == 0) return;
    const bool is_double = args->student.matrix.dtype == OPD_FLOAT64;
    is_double ? check_values<double>(*args) : check_values<float>(*args);
    is_double ? fn(double{}) : fn(float{});
  });
}

// fn(row) for each row of weight other than 0, or all of them.
template <class T, class Fn>
void each_row(const opd_divergence_args_t& args, Fn&& fn) {
  parallel_rows(args.parallel_for, args.num_tokens, [&](int64_t index) { fn(Row<T>(args, index)); });
}

}  // namespace
}  // namespace opd

opd_status_t opd_divergence_fwd_cpu(const opd_divergence_args_t* args) {
  return opd::run(args, [&](auto real) {
    opd::check_pointers(opd::kOp, "loss and state", {args->loss, args->state});
    opd::check_all_ids(*args);
    opd::forward<decltype(real)>(*args);
  });
}

opd_status_t opd_divergence_bwd_cpu(const opd_divergence_args_t* args) {
  return opd::run(args, [&](auto real) {
    opd::check_pointers(opd::kOp, "grad_loss, state and grad",
                        {args->grad_loss, args->state, args->grad.data});
    opd::check_dtype(opd::kOp, "grad", args->grad.dtype);
    opd::check_gradient(opd::kOp, args->grad, args->num_tokens, args->grad_width,
                        args->vocab_size);
    opd::backward<decltype(real)>(*args);
  });
}

opd_status_t opd_divergence_fwd_grad_cpu(const opd_divergence_args_t* args) {
  return opd::run(args, [&](auto real) {
    const int32_t dtype = args->student.matrix.dtype;
    OPD_CHECK(dtype == OPD_FLOAT32 || dtype == OPD_FLOAT64, opd::kOp,
              ": logits must be float32 or float64 to be overwritten by the gradient");
    OPD_CHECK(args->grad.dtype == dtype, opd::kOp, ": grad must have the dtype of the logits");
    opd::check_pointers(opd::kOp, "loss and grad", {args->loss, args->grad.data});
    opd::check_all_ids(*args);
    opd::check_gradient(opd::kOp, args->grad, args->num_tokens, args->grad_width,
                        args->vocab_size);
    if (args->scratch.data) {
      OPD_CHECK(args->scratch.dtype == dtype, opd::kOp, ": scratch must have the logits' dtype");
      OPD_CHECK(args->scratch.data != args->grad.data, opd::kOp,
                ": grad and scratch are both overwritten and must not be the same");
      opd::check_gradient(opd::kOp, args->scratch, args->num_tokens, args->vocab_size,
                          args->vocab_size);
    }
    opd::forward_grad<decltype(real)>(*args);
  });
}

opd_status_t opd_divergence_init_cpu(const opd_divergence_args_t* args) {
  return opd::run(args, [&](auto real) {
    opd::check_pointer(opd::kOp, "state", args->state);
    opd::each_row<decltype(real)>(*args, [](const auto& row) { row.init(); });
  });
}

opd_status_t opd_divergence_phase_cpu(const opd_divergence_args_t* args, int32_t phase) {
  return opd::run(args, [&](auto real) {
    opd::check_pointer(opd::kOp, "state", args->state);
    OPD_CHECK(phase >= OPD_PHASE_LSE && phase <= OPD_PHASE_TERMS, opd::kOp,
              ": phase must be an opd_divergence_phase_t, got ", phase);
    for (int j = 0; j < args->num_components; ++j) {
      OPD_CHECK(!opd::needs_threshold(args->components[j]), opd::kOp,
                ": adaptive_kl sorts the teacher's law and needs whole rows");
    }
    opd::each_row<decltype(real)>(*args, [&](const auto& row) {
      if (!row.is_active()) return;
      if (phase == OPD_PHASE_LSE) row.add_lse();
      if (phase == OPD_PHASE_ROW_SUMS) row.add_row_sums();
      if (phase == OPD_PHASE_TERMS) row.add_terms(opd::kNoSink);
    });
  });
}

opd_status_t opd_divergence_close_lse_cpu(const opd_divergence_args_t* args) {
  return opd::run(args, [&](auto real) {
    opd::check_pointer(opd::kOp, "state", args->state);
    opd::each_row<decltype(real)>(*args, [](const auto& row) {
      if (row.is_active()) row.close_lse();
    });
  });
}

opd_status_t opd_divergence_finish_cpu(const opd_divergence_args_t* args) {
  return opd::run(args, [&](auto real) {
    opd::check_pointers(opd::kOp, "loss and state", {args->loss, args->state});
    opd::each_row<decltype(real)>(*args, [](const auto& row) {
      row.is_active() ? row.finish() : row.skip();
    });
  });
}

opd_status_t opd_divergence_eval(int32_t divergence, double param0, double param1, int64_t n,
                                 const double* teacher_logprob, const double* student_logprob,
                                 double* term, double* dterm, double* dterm_teacher,
                                 double* value) {
  return opd::guarded([&] {
    if (n == 0) return;
    opd::check_pointers(opd::kOp, "both log-probabilities", {teacher_logprob, student_logprob});
    const auto entry = [&](int64_t i) {
      return opd::Entry<double>{teacher_logprob[i], student_logprob[i],
                                std::exp(teacher_logprob[i]), std::exp(student_logprob[i]),
                                student_logprob[i] - teacher_logprob[i]};
    };
    const bool known = opd::visit_divergence(divergence, param0, param1, [&](auto functor) {
      using F = decltype(functor);
      double sums[3] = {};
      if constexpr (F::kNeedsThreshold) {
        opd::Entries<double> block;
        functor = functor.with_threshold(opd::head_threshold<double>(param0, [&](auto&& fn) {
          for (int64_t i = 0; i < n; ++i) {
            block.lp.values[0] = entry(i).lp;
            block.p.values[0] = entry(i).p;
            fn(block, 1);
          }
        }));
      }
      if constexpr (F::kRowSums > 0) {
        for (int64_t i = 0; i < n; ++i) {
          double parts[3] = {};
          functor.row_sums(entry(i), parts);
          for (int k = 0; k < F::kRowSums; ++k) sums[k] += parts[k];
        }
        functor = functor.with_row_sums(sums);
      }
      double total = 0.0;
      for (int64_t i = 0; i < n; ++i) {
        const double one = functor.term(entry(i));
        total += one;
        if (term) term[i] = one;
        if (dterm) dterm[i] = functor.dterm(entry(i));
        if (dterm_teacher) dterm_teacher[i] = functor.dterm_teacher(entry(i));
      }
      if (value) *value = functor.value(total);
    });
    OPD_CHECK(known, opd::kOp, ": divergence must be an opd_divergence_t, got ", divergence);
  });
}
