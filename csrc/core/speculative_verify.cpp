// SPDX-License-Identifier: Apache-2.0
// The two passes over logits that verification takes: what there is to know of each row by itself,
// and the residual law of a pair of rows, with a token drawn from it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "law_cut.h"
#include "parallel.h"
#include "rows.h"
#include "speculative_verify_check.h"

namespace opd {
namespace {

using speculative_verify::kOp;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- what there is to know of a row ----

// How many of `count` values are above `threshold`, or not below it.
template <class T>
OPD_ELEMENTWISE int count_above(const T* values, int count, T threshold, bool or_equal) {
  int above = 0;
  if (or_equal) {
OPD_IVDEP
    for (int i = 0; i < count; ++i) above += values[i] >= threshold;
  } else {
OPD_IVDEP
    for (int i = 0; i < count; ++i) above += values[i] > threshold;
  }
  return above;
}

template <class T>
void run_row(const opd_speculative_verify_rows_args_t& args, int64_t row) {
  T* floor = static_cast<T*>(args.floor) + row;
  T* largest = static_cast<T*>(args.largest) + row;
  args.lse[row] = args.logprobs[row] = kNan;
  *floor = *largest = static_cast<T>(kNan);
  args.ranks[row] = args.argmax[row] = -1;
  const int64_t token_id = args.token_ids[row];
  if (token_id < -1) return;

  const LogitsRow<T> logits(args.logits, row, args.vocab_size);
  Block<T> staged, scratch;
  const bool has_id = token_id >= 0;
  const T at_id = has_id ? *logits.block(token_id, 1, staged.values) : T(0);
  const bool has_top_k = args.top_k > 0 && args.top_k < args.vocab_size;
  const bool is_cut = has_top_k || args.top_p < 1.0;
  const int64_t blocks = num_blocks(args.vocab_size);
  double* block_maxima = static_cast<double*>(args.workspace) + 2 * row * blocks;
  RunningLse<T> running;
  int64_t best_block = 0, rank = 0;
  for_each_block(args.vocab_size, [&](int64_t begin, int count) {
    const T* block = logits.block(begin, count, staged.values);
    const int padded = round_up_to_lanes(count);
    const T before = running.largest();
    running.add(block, padded, scratch.values);
    if (running.largest() > before) best_block = begin;
    if (is_cut) block_maxima[begin / kBlock] = static_cast<double>(lane_max(block, padded));
    if (has_id) {
      const int earlier = static_cast<int>(
          std::clamp<int64_t>(token_id - begin, int64_t{0}, int64_t{count}));
      rank += count_above(block, earlier, at_id, true);
      rank += count_above(block + earlier, count - earlier, at_id, false);
    }
  });
  const double sum = running.sum();
  if (sum != sum || running.largest() == std::numeric_limits<T>::infinity()) return;
  *largest = running.largest();
  args.lse[row] = running.lse();
  if (*largest == kMinusInfinity<T>) return;

  const T* best = logits.block(
      best_block, static_cast<int>(std::min<int64_t>(kBlock, args.vocab_size - best_block)),
      staged.values);
  int64_t place = 0;
  while (best[place] != *largest) ++place;
  args.argmax[row] = static_cast<int32_t>(best_block + place);

  *floor = kMinusInfinity<T>;
  double kept = sum;
  const Measured<T> measured{logits, *largest, block_maxima};
  if (has_top_k) {
    *floor = top_k_floor(measured, args.top_k, block_maxima + blocks);
    kept = kept_sum(measured, *floor);
  }
  if (args.top_p < 1.0) {
    *floor = top_p_floor(measured, *floor, args.top_p, kept);
    kept = kept_sum(measured, *floor);
  }
  args.lse[row] = static_cast<double>(*largest) + std::log(kept);
  if (!has_id) return;
  args.ranks[row] = static_cast<int32_t>(rank);
  args.logprobs[row] = at_id >= *floor ? static_cast<double>(at_id) - args.lse[row]
                                       : kMinusInfinity<double>;
}

// ---- the residual law ----

// A law cut to z >= floor, times a factor.
template <class T>
struct Scaled {
  Shift<T> shift;
  T floor, factor;
};

template <class T>
inline T probability(T value, const Scaled<T>& law) {
  const T p = exp_nonpositive((value - law.shift.high) - law.shift.low);
  return select(value >= law.floor, p, T(0));
}

template <class T>
OPD_ELEMENTWISE void teacher_block(const T* __restrict__ values, Scaled<T> law, int padded,
                                   T* __restrict__ residual) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) residual[i] = law.factor * probability(values[i], law);
}

template <class T>
OPD_ELEMENTWISE void residual_block(const T* __restrict__ teacher, Scaled<T> p_law,
                                    const T* __restrict__ student, Scaled<T> q_law, int padded,
                                    T* __restrict__ residual, T* __restrict__ least) {
OPD_IVDEP
  for (int i = 0; i < padded; ++i) {
    const T p = probability(teacher[i], p_law), q = probability(student[i], q_law);
    const T r = p_law.factor * p - q_law.factor * q;
    residual[i] = select(r > T(0), r, T(0));
    least[i] = select(p < q, p, q);
  }
}

// The pair of rows behind one row of the call.
template <class T>
class Residual {
 public:
  Residual(const opd_speculative_verify_residual_args_t& args, int64_t row)
      : vocab_size_(args.vocab_size),
        teacher_row_(args.teacher.rows[row]),
        student_row_(args.student.rows[row]),
        has_student_(student_row_ >= 0 && args.student.scale[row] != 0.0),
        teacher_(args.teacher.logits, teacher_row_, vocab_size_),
        student_(student_row_ >= 0 ? args.student.logits : args.teacher.logits,
                 student_row_ >= 0 ? student_row_ : teacher_row_, vocab_size_),
        p_law_{Shift<T>(args.teacher.lse[teacher_row_]),
               static_cast<const T*>(args.teacher.floor)[teacher_row_],
               static_cast<T>(args.teacher.scale[row])},
        q_law_{Shift<T>(0.0), T(0), T(0)},
        p_lse_(args.teacher.lse[teacher_row_]),
        q_lse_(kNan) {
    if (student_row_ < 0) return;
    q_lse_ = args.student.lse[student_row_];
    q_law_ = {Shift<T>(q_lse_), static_cast<const T*>(args.student.floor)[student_row_],
              static_cast<T>(args.student.scale[row])};
  }

  bool is_law() const {
    return std::isfinite(p_lse_) && (!has_student_ || std::isfinite(q_lse_));
  }
  bool has_student() const { return has_student_; }

  // From now on r is p itself.
  void leave_teacher_alone() {
    has_student_ = false;
    p_law_.factor = T(1);
  }

  // r of a block, and min(p, q) where there is a student
  void block(int64_t begin, int count, T* residual, T* least) {
    const int padded = round_up_to_lanes(count);
    const T* p = teacher_.block(begin, count, staged_p_.values);
    if (!has_student_) return teacher_block(p, p_law_, padded, residual);
    const T* q = student_.block(begin, count, staged_q_.values);
    residual_block(p, p_law_, q, q_law_, padded, residual, least);
  }

  double teacher_logprob(int64_t id) const { return logprob(teacher_, p_law_, p_lse_, id); }
  double student_logprob(int64_t id) const {
    return student_row_ < 0 ? kNan : logprob(student_, q_law_, q_lse_, id);
  }

 private:
  static double logprob(const LogitsRow<T>& logits, const Scaled<T>& law, double lse, int64_t id) {
    if (!std::isfinite(lse)) return kNan;
    Block<T> staged;
    const T value = *logits.block(id, 1, staged.values);
    return value >= law.floor ? static_cast<double>(value) - lse : kMinusInfinity<double>;
  }

  const int64_t vocab_size_, teacher_row_, student_row_;
  bool has_student_;
  const LogitsRow<T> teacher_, student_;
  Scaled<T> p_law_, q_law_;
  double p_lse_, q_lse_;
  Block<T> staged_p_, staged_q_;
};

struct Sums {
  double mass, overlap;
};

// `ends`, where given, becomes the mass up to the end of each block.
template <class T>
Sums add_up(Residual<T>& residual, int64_t vocab_size, double* ends) {
  Block<T> values, least;
  Sums sums{0.0, 0.0};
  for_each_block(vocab_size, [&](int64_t begin, int count) {
    residual.block(begin, count, values.values, least.values);
    const int padded = round_up_to_lanes(count);
    sums.mass += lane_sum(values.values, padded);
    if (residual.has_student()) sums.overlap += lane_sum(least.values, padded);
    if (ends) ends[begin / kBlock] = sums.mass;
  });
  return sums;
}

// The first id at which the mass exceeds `place`. A place may be the end of all by rounding: then
// the last id that has some.
template <class T>
int64_t find(Residual<T>& residual, int64_t vocab_size, const double* ends, double place) {
  const int64_t blocks = num_blocks(vocab_size);
  int64_t block = std::upper_bound(ends, ends + blocks, place) - ends;
  if (block == blocks) {
    --block;
    while (block > 0 && ends[block] == ends[block - 1]) --block;
  }
  const int64_t begin = block * kBlock;
  const int count = static_cast<int>(std::min<int64_t>(kBlock, vocab_size - begin));
  Block<T> values, least;
  residual.block(begin, count, values.values, least.values);
  double passed = block == 0 ? 0.0 : ends[block - 1];
  // the sum inside a block runs in another order than the block's: the last possible id closes it
  int found = -1;
  for (int i = 0; i < count; ++i) {
    if (!(values.values[i] > T(0))) continue;
    found = i;
    passed += static_cast<double>(values.values[i]);
    if (place < passed) break;
  }
  return begin + found;
}

template <class T>
void run_residual(const opd_speculative_verify_residual_args_t& args, int64_t row) {
  args.mass[row] = args.overlap[row] = kNan;
  args.student_logprobs[row] = args.teacher_logprobs[row] = kNan;
  args.tokens[row] = -1;
  if (args.teacher.rows[row] < 0) return;
  Residual<T> residual(args, row);
  if (!residual.is_law()) return;
  const int64_t vocab_size = args.vocab_size;
  double* ends = nullptr;
  if (args.draws) ends = static_cast<double*>(args.workspace) + 2 * row * num_blocks(vocab_size);
  const Sums sums = add_up(residual, vocab_size, ends);
  args.mass[row] = sums.mass;
  if (residual.has_student()) args.overlap[row] = sums.overlap;
  double mass = sums.mass;
  if (!args.draws || mass != mass) return;
  if (mass == 0.0) {
    residual.leave_teacher_alone();
    mass = add_up(residual, vocab_size, ends).mass;
  }
  const int64_t token = find(residual, vocab_size, ends, args.uniforms[row] * mass);
  args.tokens[row] = static_cast<int32_t>(token);
  args.student_logprobs[row] = residual.student_logprob(token);
  args.teacher_logprobs[row] = residual.teacher_logprob(token);
}

void check_values(const opd_speculative_verify_rows_args_t& args) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    OPD_CHECK(args.token_ids[row] < args.vocab_size, kOp, ": token_ids must be below ",
              args.vocab_size, ", got ", args.token_ids[row], " at position ", row, ".");
  }
}

void check_rows_of(const char* name, const opd_cut_law_t& law, int64_t num_rows) {
  for (int64_t row = 0; row < num_rows; ++row) {
    OPD_CHECK(law.rows[row] < law.num_rows, kOp, ": rows of the ", name, " must be below ",
              law.num_rows, ", got ", law.rows[row], " at position ", row, ".");
  }
}

void check_values(const opd_speculative_verify_residual_args_t& args) {
  check_rows_of("teacher", args.teacher, args.num_rows);
  check_rows_of("student", args.student, args.num_rows);
  if (!args.draws) return;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    OPD_CHECK(args.uniforms[row] >= 0.0 && args.uniforms[row] < 1.0, kOp,
              ": uniforms must be in [0, 1), got ", args.uniforms[row], " at position ", row, ".");
  }
}

}  // namespace
}  // namespace opd

opd_status_t opd_speculative_verify_rows_cpu(const opd_speculative_verify_rows_args_t* args) {
  return opd::guarded([&] {
    opd::speculative_verify::check_args(args);
    opd::check_values(*args);
    opd::visit_real(args->logits, [&](auto real) {
      opd::parallel_rows(args->parallel_for, args->num_rows,
                         [&](int64_t row) { opd::run_row<decltype(real)>(*args, row); });
    });
  });
}

opd_status_t opd_speculative_verify_residual_cpu(
    const opd_speculative_verify_residual_args_t* args) {
  return opd::guarded([&] {
    opd::speculative_verify::check_args(args);
    opd::check_values(*args);
    opd::visit_real(args->teacher.logits, [&](auto real) {
      opd::parallel_rows(args->parallel_for, args->num_rows,
                         [&](int64_t row) { opd::run_residual<decltype(real)>(*args, row); });
    });
  });
}
