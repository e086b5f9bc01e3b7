// SPDX-License-Identifier: Apache-2.0
// The phases of one row of a divergence, which meet in its row of state.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "divergence_check.h"
#include "divergence_plain.h"
#include "divergence_row.h"
#include "rows.h"

namespace opd {

inline int64_t state_size(const opd_divergence_args_t& args) {
  return kStateSize + args.num_components * kComponentState;
}

// What takes no gradient.
struct NoSink {
  template <class... Arguments>
  void operator()(Arguments...) const {}
};

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

  // Of a whole row that nothing asks the teacher's law of, its sum is left out.
  void add_lse(bool is_whole = false) const {
    RunningLse<T> student = running(kStudentLargest, kStudentLse);
    RunningLse<T> teacher = running(kTeacherLargest, kTeacherLse);
    const bool with_teacher = !is_whole || args_.with_statistics || reads_teacher();
    typename Laws<T>::Scratch staged;
    Block<T> scratch;
    for_each_block(args_.vocab_size, [&](int64_t begin, int count) {
      const T* const s = laws_.student.block(begin, count, staged.student.values);
      student.add(s, round_up_to_lanes(count), scratch.values);
      if (!with_teacher) return;
      const T* const t = laws_.target(begin, count, s, staged);
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
    const int plain = plain_component();
    double before[OPD_MAX_COMPONENTS];
    for (int j = 0; j < args_.num_components; ++j) before[j] = component_state(j)[kRowSum + 1];
    if (plain >= 0) {
      for_each_pair([&](int64_t, int count, const T* s, const T* t, const Shifts<T>& shifts) {
        plain_row_sums(args_.components[plain], s, t, shifts, round_up_to_lanes(count),
                       component_state(plain));
      });
    } else {
      for_each_entries([&](int64_t, int count, Entries<T>& e) {
        for (int j = 0; j < args_.num_components; ++j) {
          if (!is_wanted(j)) continue;
          component_row_sums(args_.components[j], e, round_up_to_lanes(count), component_state(j));
        }
      });
    }
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

  // Whether a whole row whose terms go nowhere else takes its row sums in the same pass.
  bool sums_with_terms() const {
    const int plain = plain_component();
    return plain >= 0 && !args_.with_statistics && sums_choose_a_form(args_.components[plain]);
  }

  // Sums over the row into state; sink(begin, count, dterm, q) per block.
  template <class Sink>
  void add_terms(Sink&& sink, bool with_sums = false) const {
    // before the sink, which may write over the logits
    add_labels();
    if (args_.with_statistics) {
      add_ids();
    } else if (!reads_teacher()) {
      return give_student_law(sink);
    } else if (with_sums) {
      return add_plain_terms_and_sums(plain_component());
    } else if (plain_component() >= 0) {
      return add_plain_terms(plain_component(), sink);
    }
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
    const int plain = plain_component();
    if (plain >= 0 || !reads_teacher()) return plain_gradient_of(plain, sink);
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
      through_logits(begin, count, dterm.values, slope);
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
  // The component that is the whole loss but for labels, if the row is one of divergence_plain.h;
  // else -1.
  int plain_component() const {
    if (args_.target == OPD_TARGET_MIXTURE || is_live_geometric()) return -1;
    int found = -1;
    for (int j = 0; j < args_.num_components; ++j) {
      if (!is_wanted(j) || args_.components[j].divergence == kCrossEntropy) continue;
      if (found >= 0 || coefficient(j) != T(1)) return -1;
      found = j;
    }
    return found;
  }

  // fn(begin, count, student, target, shifts) per block of logits.
  template <class Fn>
  void for_each_pair(Fn&& fn) const {
    const Shifts<T> shifts(state_);
    typename Laws<T>::Scratch staged;
    for_each_block(args_.vocab_size, [&](int64_t begin, int count) {
      const T *s, *t;
      laws_.blocks(begin, count, staged, &s, &t);
      fn(begin, count, s, t, shifts);
    });
  }

  template <class Sink>
  void add_plain_terms(int j, Sink&& sink) const {
    constexpr bool kWithQ = !std::is_same_v<std::decay_t<Sink>, NoSink>;
    const opd_divergence_component_t& component = args_.components[j];
    double* const state = component_state(j);
    Block<T> term, dterm, q;
    for_each_pair([&](int64_t begin, int count, const T* s, const T* t, const Shifts<T>& shifts) {
      const int padded = round_up_to_lanes(count);
      plain_terms<kWithQ>(component, state, s, t, shifts, padded, term.values, dterm.values,
                          q.values);
      state[kTermSum] += lane_sum(term.values, padded);
      if (!is_centred(component)) state_[kGradSum] += lane_sum(dterm.values, padded);
      sink(begin, count, dterm.values, q.values);
    });
  }

  void add_plain_terms_and_sums(int j) const {
    double grad_sum = 0.0;
    for_each_pair([&](int64_t, int count, const T* s, const T* t, const Shifts<T>& shifts) {
      plain_terms_and_sums(args_.components[j], s, t, shifts, round_up_to_lanes(count),
                           component_state(j), &grad_sum);
    });
    state_[kGradSum] += grad_sum_of_form(args_.components[j], component_state(j), grad_sum);
  }

  // Where there are labels and nothing else.
  template <class Sink>
  void give_student_law(Sink&& sink) const {
    if (std::is_same_v<std::decay_t<Sink>, NoSink>) return;
    const Shift<T> shift(state_[kStudentLse]);
    Block<T> staged, q, dterm = {};
    for_each_block(args_.vocab_size, [&](int64_t begin, int count) {
      const T* const s = laws_.student.block(begin, count, staged.values);
      student_law_block(s, shift, T(1), round_up_to_lanes(count), q.values);
      sink(begin, count, dterm.values, q.values);
    });
  }

  // `plain` is -1 where there are labels and nothing else.
  template <class Sink>
  void plain_gradient_of(int plain, Sink&& sink) const {
    const Shifts<T> shifts(state_);
    const T grad_sum = static_cast<T>(full_grad_sum());
    typename Laws<T>::Scratch staged;
    Block<T> out, slope;
    for_each_block(args_.vocab_size, [&](int64_t begin, int count) {
      const int padded = round_up_to_lanes(count);
      const T* const s = laws_.student.block(begin, count, staged.student.values);
      if (plain < 0) {
        student_law_block(s, shifts.student, -grad_sum, padded, out.values);
      } else {
        const T* const t = laws_.target(begin, count, s, staged);
        plain_gradient(args_.components[plain], component_state(plain), s, t, shifts, grad_sum,
                       padded, out.values);
      }
      through_logits(begin, count, out.values, slope);
      sink(begin, count, out.values);
    });
  }

  // What the labels and the soft cap make of a gradient.
  void through_logits(int64_t begin, int count, T* gradient, Block<T>& slope) const {
    subtract_labels(begin, count, gradient);
    laws_.student.times_softcap_slope(begin, count, gradient, slope.values);
  }

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

}  // namespace opd
