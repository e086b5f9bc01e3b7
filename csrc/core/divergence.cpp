// SPDX-License-Identifier: Apache-2.0
// Divergences of two rows of logits, in phases that share a row of state: log-sum-exps, sums that
// terms need first, terms, gradient. A whole row goes through them in one call; slices of a
// vocabulary go through them one call each. In place the gradient is dterm over the student's
// logits and q over the teacher's first, then (dterm - q * sum dterm) * scale, which needs no
// transcendental.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "divergence_check.h"
#include "divergence_row.h"
#include "parallel.h"
#include "rows.h"

namespace opd {
namespace {

int64_t state_size(const opd_divergence_args_t& args) {
  return kStateSize + args.num_components * kComponentState;
}

template <class T>
class Row {
 public:
  Row(const opd_divergence_args_t& args, int64_t row, double* state)
      : args_(args),
        row_(row),
        state_(state),
        laws_(args, row),
        weight_(args.token_weights ? static_cast<const T*>(args.token_weights)[row] : T(1)) {}

  Row(const opd_divergence_args_t& args, int64_t row)
      : Row(args, row, args.state ? args.state + row * state_size(args) : nullptr) {}

  bool is_active() const { return weight_ != T(0); }
  T weight() const { return weight_; }
  double* state() const { return state_; }
  const LogitsRow<T>& student() const { return laws_.student; }

  void init() const {
    std::fill(state_, state_ + state_size(args_), 0.0);
    state_[kStudentLargest] = state_[kTeacherLargest] = -std::numeric_limits<double>::infinity();
    state_[kStudentArgmax] = state_[kTeacherArgmax] = -1.0;
  }

  void add_lse() const {
    RunningLse<T> student = running(kStudentLargest, kStudentLse);
    RunningLse<T> teacher = running(kTeacherLargest, kTeacherLse);
    typename Laws<T>::Scratch staged;
    Block<T> scratch;
    for_each_block(args_.vocab_size, [&](int64_t begin, int count) {
      const T *s, *t;
      laws_.blocks(begin, count, staged, &s, &t);
      student.add(s, round_up_to_lanes(count), scratch.values);
      teacher.add(t, round_up_to_lanes(count), scratch.values);
    });
    if (args_.with_statistics) find_argmax(student.largest(), teacher.largest());
    state_[kStudentLargest] = student.largest(), state_[kStudentLse] = student.sum();
    state_[kTeacherLargest] = teacher.largest(), state_[kTeacherLse] = teacher.sum();
  }

  void close_lse() const {
    state_[kStudentLse] = state_[kStudentLargest] + std::log(state_[kStudentLse]);
    state_[kTeacherLse] = state_[kTeacherLargest] + std::log(state_[kTeacherLse]);
  }

  // Only for whole rows: the head of the teacher's law is not a sum of what slices contribute.
  void find_thresholds() const {
    for (int j = 0; j < args_.num_components; ++j) {
      if (!is_wanted(j) || !needs_threshold(args_.components[j])) continue;
      component_state(j)[kThreshold] = head_threshold<T>(args_.components[j].param0, [&](auto&& fn) {
        for_each_entries([&](int64_t, int count, Entries<T>& e) { fn(e, count); });
      });
    }
  }

  void add_row_sums() const {
    bool wanted = false;
    for (int j = 0; j < args_.num_components; ++j) {
      wanted = wanted || (is_wanted(j) && num_row_sums(args_.components[j]) > 0);
    }
    if (!wanted) return;
    double before[OPD_MAX_COMPONENTS];
    for (int j = 0; j < args_.num_components; ++j) before[j] = component_state(j)[kRowSum + 1];
    for_each_entries([&](int64_t, int count, Entries<T>& e) {
      for (int j = 0; j < args_.num_components; ++j) {
        if (!is_wanted(j)) continue;
        component_row_sums(args_.components[j], e, round_up_to_lanes(count), component_state(j));
      }
    });
    for (int j = 0; j < args_.num_components; ++j) {
      if (!is_wanted(j) || args_.components[j].divergence != OPD_RENYI) continue;
      double& mass = component_state(j)[kRowSum + 1];
      // NaN stays; it is no matter of range
      const bool out_of_range = mass - before[j] < 1e-25 || mass - before[j] > 1e37;
      if (!out_of_range) continue;
      mass = before[j];
      for_each_entries([&](int64_t, int count, Entries<T>& e) {
        mass += mass_in_double(args_.components[j], e, count);
      });
    }
  }

  // Sums over the row into state; sink(begin, count, dterm, q) per block.
  template <class Sink>
  void add_terms(Sink&& sink) const {
    // before the sink, which may write over the logits
    add_labels();
    if (args_.with_statistics) add_ids();
    Block<T> term, dterm, part;
    for_each_entries<true>([&](int64_t begin, int count, Entries<T>& e) {
      const int padded = round_up_to_lanes(count);
      terms(e, padded, term, dterm, part, [&](int j, const Block<T>& own) {
        component_state(j)[kTermSum] += lane_sum(term.values, padded);
        if (is_centred(args_.components[j]) && !is_live_mixture()) return;
        state_[kGradSum] += static_cast<double>(coefficient(j)) * lane_sum(own.values, padded);
      });
      if (is_live_geometric()) {
        state_[kTeacherGradSum] += lane_sum(part.values, padded);
      }
      sink(begin, count, dterm.values, e.q.values);
    });
  }

  // d loss / d logits before the scale, from a finished state; sink(begin, count, gradient). `out`
  // may be the row of student logits: a block is read before it is handed over.
  template <class Sink>
  void gradient(Sink&& sink) const {
    Block<T> term, dterm, part, slope;
    const T grad_sum = static_cast<T>(full_grad_sum());
    const T teacher_grad_sum = static_cast<T>(state_[kTeacherGradSum]);
    const T through_target = static_cast<T>(args_.target_student);
    for_each_entries([&](int64_t begin, int count, Entries<T>& e) {
      terms(e, round_up_to_lanes(count), term, dterm, part, [](int, const Block<T>&) {});
OPD_IVDEP
      for (int i = 0; i < count; ++i) dterm.values[i] -= e.q.values[i] * grad_sum;
      if (is_live_geometric()) {
OPD_IVDEP
        for (int i = 0; i < count; ++i) {
          dterm.values[i] += through_target * (part.values[i] - e.p.values[i] * teacher_grad_sum);
        }
      }
      subtract_labels(begin, count, dterm.values);
      if (laws_.student.has_softcap()) {
        laws_.student.slope_block(begin, count, slope.values);
OPD_IVDEP
        for (int i = 0; i < count; ++i) dterm.values[i] *= slope.values[i];
      }
      sink(begin, count, dterm.values);
    });
  }

  void finish() const {
    double loss = 0.0;
    for (int j = 0; j < args_.num_components; ++j) {
      if (!is_wanted(j)) continue;
      const double value = args_.components[j].divergence == kCrossEntropy
                               ? state_[kCrossEntropy_]
                               : component_value(args_.components[j], component_state(j));
      loss += static_cast<double>(coefficient(j)) * value;
    }
    static_cast<T*>(args_.loss)[row_] = static_cast<T>(static_cast<double>(weight_) * loss);
    if (args_.statistics) write_statistics();
  }

  // Zeros everywhere, whatever the row holds.
  void skip() const {
    if (state_) std::fill(state_, state_ + state_size(args_), 0.0);
    if (args_.loss) static_cast<T*>(args_.loss)[row_] = T(0);
    T* const out = static_cast<T*>(args_.statistics);
    for (int k = 0; out && k < OPD_NUM_STATISTICS; ++k) out[k * args_.num_tokens + row_] = T(0);
  }

  // whether anything in this row has a gradient, and whether it depends on the teacher's law
  bool has_gradient() const { return reads_teacher() || has_labels(); }
  bool reads_teacher() const {
    for (int j = 0; j < args_.num_components; ++j) {
      if (is_wanted(j) && args_.components[j].divergence != kCrossEntropy) return true;
    }
    return false;
  }

  bool is_live_geometric() const {
    return args_.target == OPD_TARGET_GEOMETRIC && args_.live_target &&
           args_.target_student != 0.0 && reads_teacher();
  }

  bool is_live_mixture() const {
    return args_.target == OPD_TARGET_MIXTURE && args_.live_target;
  }

  // sum of dterm, the labels' part included
  double full_grad_sum() const {
    double sum = state_[kGradSum];
    for_each_label([&](int64_t, T weight) { sum -= static_cast<double>(weight); });
    return sum;
  }

  void subtract_labels(int64_t begin, int count, T* dterm) const {
    for_each_label([&](int64_t label, T weight) {
      const int64_t i = label - args_.first_column - begin;
      if (i >= 0 && i < count) dterm[i] -= weight;
    });
  }

 private:
  RunningLse<T> running(State largest, State sum) const {
    return {static_cast<T>(state_[largest]), state_[sum]};
  }

  double* component_state(int j) const { return state_ + kStateSize + j * kComponentState; }

  T coefficient(int j) const {
    const T* coefficients = static_cast<const T*>(args_.components[j].coefficients);
    return coefficients ? coefficients[row_] : T(1);
  }
  bool is_wanted(int j) const { return coefficient(j) != T(0); }
  bool has_labels() const {
    bool any = false;
    for_each_label([&](int64_t, T) { any = true; });
    return any;
  }

  // First column of the largest logit of this slice, where it beats the slices before.
  void find_argmax(T student_largest, T teacher_largest) const {
    bool student_open = static_cast<double>(student_largest) > state_[kStudentLargest];
    bool teacher_open = static_cast<double>(teacher_largest) > state_[kTeacherLargest];
    typename Laws<T>::Scratch staged;
    for (int64_t begin = 0; begin < args_.vocab_size && (student_open || teacher_open);
         begin += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, args_.vocab_size - begin));
      const T *s, *t;
      laws_.blocks(begin, count, staged, &s, &t);
      const auto find = [&](const T* block, T largest, State where, bool* open) {
        for (int i = 0; *open && i < count; ++i) {
          if (block[i] == largest) {
            state_[where] = static_cast<double>(args_.first_column + begin + i);
            *open = false;
          }
        }
      };
      find(s, student_largest, kStudentArgmax, &student_open);
      find(t, teacher_largest, kTeacherArgmax, &teacher_open);
    }
  }

  // fn(begin, count, entries) per block. The padding of a last block has p = q = 0 and adds nothing.
  template <bool kWithStatistics = false, class Fn>
  void for_each_entries(Fn&& fn) const {
    const Shifts<T> shifts(state_);
    typename Laws<T>::Scratch staged;
    Entries<T> e;
    const T* mixture_weights = static_cast<const T*>(args_.mixture_weights);
    for_each_block(args_.vocab_size, [&](int64_t begin, int count) {
      const T *s, *t;
      laws_.blocks(begin, count, staged, &s, &t);
      const int padded = round_up_to_lanes(count);
      entry_block(s, t, shifts, padded, e.lp.values, e.lq.values, e.p.values, e.q.values,
                  e.gap.values, e.lp_low.values, e.lq_low.values);
      if (kWithStatistics && args_.with_statistics) add_statistics(e, padded);
      if (args_.target == OPD_TARGET_MIXTURE) mix_target(mixture_weights[row_], padded, e);
      fn(begin, count, e);
    });
  }

  // dterm of the sum of all components; `part` is that of dterm_teacher for a live geometric target
  // and scratch otherwise. on_term(j, dterm) is called while `term` is that of component j; its dterm
  // is not yet multiplied by the coefficient.
  template <class OnTerm>
  void terms(const Entries<T>& e, int padded, Block<T>& term, Block<T>& dterm, Block<T>& part,
             OnTerm&& on_term) const {
    const bool live_mixture = is_live_mixture();
    const bool live_geometric = is_live_geometric();
    Block<T> own, teacher;
    bool first = true;
    if (live_geometric) std::fill(part.values, part.values + padded, T(0));
    for (int j = 0; j < args_.num_components; ++j) {
      const opd_divergence_component_t& component = args_.components[j];
      if (!is_wanted(j) || component.divergence == kCrossEntropy) continue;
      const T c = coefficient(j);
      Block<T>& out = first && c == T(1) ? dterm : own;
      component_terms(component, component_state(j), e, padded, term.values, out.values);
      if (live_mixture || live_geometric) {
        component_dterm_teacher(component, component_state(j), e, padded, teacher.values);
      }
      if (live_mixture) {
OPD_IVDEP
        for (int i = 0; i < padded; ++i) out.values[i] += e.through.values[i] * teacher.values[i];
      }
      on_term(j, out);
      if (live_geometric) {
OPD_IVDEP
        for (int i = 0; i < padded; ++i) part.values[i] += c * teacher.values[i];
      }
      if (&out == &own && first) {
OPD_IVDEP
        for (int i = 0; i < padded; ++i) dterm.values[i] = c * own.values[i];
      } else if (&out == &own) {
OPD_IVDEP
        for (int i = 0; i < padded; ++i) dterm.values[i] += c * own.values[i];
      }
      first = false;
    }
    if (first) std::fill(dterm.values, dterm.values + padded, T(0));
  }

  void add_statistics(const Entries<T>& e, int padded) const {
    Block<T> parts[4];
    statistics_block(e.lp.values, e.lq.values, e.p.values, e.q.values, e.gap.values, padded,
                     parts[0].values, parts[1].values, parts[2].values, parts[3].values);
    for (int k = 0; k < 4; ++k) {
      state_[kStudentEntropy + k] += lane_sum(parts[k].values, padded);
    }
  }

  // log q and log p of one column of this slice.
  void logprobs_at(int64_t column, double* lq, double* lp) const {
    const Shifts<T> shifts(state_);
    typename Laws<T>::Scratch staged;
    const T *s, *t;
    laws_.blocks(column, 1, staged, &s, &t);
    *lq = static_cast<double>((*s - shifts.student.high) - shifts.student.low);
    *lp = static_cast<double>((*t - shifts.teacher.high) - shifts.teacher.low);
  }

  bool is_here(int64_t id, int64_t* column) const {
    *column = id - args_.first_column;
    return id >= 0 && *column >= 0 && *column < args_.vocab_size;
  }

  void add_ids() const {
    double lq, lp;
    int64_t column;
    if (args_.token_ids && is_here(args_.token_ids[row_], &column)) {
      logprobs_at(column, &lq, &lp);
      state_[kStudentLogprob] += lq;
      state_[kTeacherLogprob] += lp;
    }
    for (int64_t k = 0; args_.topk_ids && k < args_.num_topk; ++k) {
      if (!is_here(args_.topk_ids[row_ * args_.num_topk + k], &column)) continue;
      logprobs_at(column, &lq, &lp);
      state_[kStudentTopkMass] += std::exp(lq);
      state_[kTeacherTopkMass] += std::exp(lp);
    }
  }

  // fn(label, coefficient * weight) for the labels of this row.
  template <class Fn>
  void for_each_label(Fn&& fn) const {
    for (int j = 0; j < args_.num_components; ++j) {
      if (args_.components[j].divergence != kCrossEntropy || !is_wanted(j)) continue;
      for (int64_t k = 0; k < args_.num_labels; ++k) {
        const int64_t at = row_ * args_.num_labels + k;
        const T* weights = static_cast<const T*>(args_.label_weights);
        const T weight = weights ? weights[at] : T(1);
        if (args_.labels[at] >= 0 && weight != T(0)) fn(args_.labels[at], coefficient(j) * weight);
      }
    }
  }

  void add_labels() const {
    const T* weights = static_cast<const T*>(args_.label_weights);
    for (int64_t k = 0; args_.labels && k < args_.num_labels; ++k) {
      const int64_t at = row_ * args_.num_labels + k;
      const double weight = weights ? static_cast<double>(weights[at]) : 1.0;
      int64_t column;
      if (weight == 0.0 || !is_here(args_.labels[at], &column)) continue;
      double lq, lp;
      logprobs_at(column, &lq, &lp);
      state_[kCrossEntropy_] -= weight * lq;
    }
  }

  void write_statistics() const {
    T* const out = static_cast<T*>(args_.statistics) + row_;
    const int64_t stride = args_.num_tokens;
    const auto put = [&](int statistic, double value) {
      out[statistic * stride] = static_cast<T>(value);
    };
    for (int k = 0; k < 4; ++k) put(k, state_[kStudentEntropy + k]);
    put(OPD_STATISTIC_STUDENT_LSE, state_[kStudentLse]);
    put(OPD_STATISTIC_TEACHER_LSE, state_[kTeacherLse]);
    for (int k = 0; k < 4; ++k) put(OPD_STATISTIC_STUDENT_LOGPROBS + k, state_[kStudentLogprob + k]);
    const bool defined = !std::isnan(state_[kStudentLse]) && !std::isnan(state_[kTeacherLse]);
    const double agree = state_[kStudentArgmax] == state_[kTeacherArgmax] ? 1.0 : 0.0;
    put(OPD_STATISTIC_TOP1_AGREEMENT, defined ? agree : std::numeric_limits<double>::quiet_NaN());
  }

  const opd_divergence_args_t& args_;
  int64_t row_;
  double* state_;
  Laws<T> laws_;
  T weight_;
};

// Every phase of a whole row but the last: sink gets dterm and q while the terms are formed.
template <class T, class Sink>
void whole_row(const Row<T>& row, Sink&& sink) {
  row.init();
  row.add_lse();
  row.close_lse();
  row.find_thresholds();
  row.add_row_sums();
  row.add_terms(sink);
}

constexpr auto kNoSink = [](int64_t, int, const auto*, const auto*) {};

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
