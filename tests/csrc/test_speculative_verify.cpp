// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

// no multiple of a block, and more blocks than one
constexpr int64_t kRows = 4, kVocab = 1300, kStride = 1307;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

opd_logits_t logits_of(const std::vector<double>& values) {
  return {{values.data(), kStride, OPD_FLOAT64}, nullptr, 1.0, 0.0, 1.0, nullptr};
}

struct RowsOutputs {
  std::vector<double> lse = std::vector<double>(kRows), floor = lse, logprobs = lse, largest = lse;
  std::vector<int32_t> ranks = std::vector<int32_t>(kRows), argmax = ranks;
  std::vector<char> workspace =
      std::vector<char>(opd_speculative_verify_workspace_bytes(kRows, kVocab));
};

opd_speculative_verify_rows_args_t rows_args(const std::vector<double>& logits,
                                             const std::vector<int64_t>& ids, int64_t top_k,
                                             double top_p, RowsOutputs& out) {
  opd_speculative_verify_rows_args_t args{};
  args.struct_size = sizeof(args);
  args.num_rows = kRows;
  args.vocab_size = kVocab;
  args.logits = logits_of(logits);
  args.token_ids = ids.data();
  args.top_k = top_k;
  args.top_p = top_p;
  args.lse = out.lse.data();
  args.floor = out.floor.data();
  args.logprobs = out.logprobs.data();
  args.ranks = out.ranks.data();
  args.argmax = out.argmax.data();
  args.largest = out.largest.data();
  args.workspace = out.workspace.data();
  return args;
}

// The law of a row that is cut to z >= floor.
std::vector<double> law_of(const double* z, double floor) {
  std::vector<double> law(kVocab);
  long double sum = 0;
  for (int64_t v = 0; v < kVocab; ++v) {
    if (z[v] >= floor) sum += std::exp(static_cast<long double>(z[v]));
  }
  for (int64_t v = 0; v < kVocab; ++v) {
    if (z[v] >= floor) law[v] = static_cast<double>(std::exp(static_cast<long double>(z[v])) / sum);
  }
  return law;
}

void check_rows(const std::vector<double>& logits, int64_t top_k, double top_p) {
  const std::vector<int64_t> ids = {0, kVocab - 1, 700, -1};
  RowsOutputs out;
  const auto args = rows_args(logits, ids, top_k, top_p, out);
  expect::that(opd_speculative_verify_rows_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kRows; ++t) {
    const double* z = &logits[t * kStride];
    std::vector<double> sorted(z, z + kVocab);
    std::sort(sorted.begin(), sorted.end(), std::greater<double>());
    double floor = top_k > 0 ? sorted[top_k - 1] : -kInfinity;
    if (top_p < 1.0) {
      const std::vector<double> law = law_of(z, floor);
      std::vector<double> masses(law);
      std::sort(masses.begin(), masses.end(), std::greater<double>());
      double reached = 0;
      int64_t last = 0;
      while ((reached += masses[last]) < top_p) ++last;
      floor = sorted[last];
    }
    expect::that(out.floor[t] == floor, "floor");
    expect::that(out.largest[t] == sorted[0] && z[out.argmax[t]] == sorted[0], "argmax");
    const std::vector<double> law = law_of(z, floor);
    const int64_t best = std::max_element(law.begin(), law.end()) - law.begin();
    expect::near(out.lse[t], sorted[0] - std::log(law[best]), 1e-11, "lse");
    if (ids[t] < 0) {
      expect::that(out.ranks[t] == -1 && std::isnan(out.logprobs[t]), "no id");
      continue;
    }
    const double own = z[ids[t]];
    int rank = 0;
    for (int64_t v = 0; v < kVocab; ++v) rank += z[v] > own || (z[v] == own && v < ids[t]);
    expect::that(out.ranks[t] == rank, "rank");
    if (own < floor) {
      expect::that(out.logprobs[t] == -kInfinity, "logprob below the floor");
    } else {
      expect::near(out.logprobs[t], std::log(law[ids[t]]), 1e-11, "logprob");
    }
  }
}

struct ResidualOutputs {
  std::vector<double> mass = std::vector<double>(kRows), overlap = mass, student = mass,
                      teacher = mass;
  std::vector<int32_t> tokens = std::vector<int32_t>(kRows);
  std::vector<char> workspace =
      std::vector<char>(opd_speculative_verify_workspace_bytes(kRows, kVocab));
};

void check_residual(const std::vector<double>& teacher, const std::vector<double>& student) {
  const std::vector<int64_t> none(kRows, -1);
  RowsOutputs of_teacher, of_student;
  auto rows = rows_args(teacher, none, 400, 0.95, of_teacher);
  expect::that(opd_speculative_verify_rows_cpu(&rows) == OPD_OK, opd_last_error());
  rows = rows_args(student, none, 0, 1.0, of_student);
  expect::that(opd_speculative_verify_rows_cpu(&rows) == OPD_OK, opd_last_error());

  // the last has no row of the teacher, and the one before a student that is only scored
  const std::vector<int64_t> teacher_rows = {2, 0, 3, -1}, student_rows = {1, -1, 0, 0};
  const std::vector<double> teacher_scale = {0.8, 1.0, 1.0, 1.0}, student_scale = {1, 1, 0, 1};
  std::vector<double> uniforms = {0.37, 0.0, 1.0 - std::numeric_limits<double>::epsilon() / 2, 0.5};
  ResidualOutputs out;
  opd_speculative_verify_residual_args_t args{};
  args.struct_size = sizeof(args);
  args.num_rows = kRows;
  args.vocab_size = kVocab;
  args.teacher = {logits_of(teacher),      kRows, of_teacher.lse.data(), of_teacher.floor.data(),
                  teacher_rows.data(), teacher_scale.data()};
  args.student = {logits_of(student),      kRows, of_student.lse.data(), of_student.floor.data(),
                  student_rows.data(), student_scale.data()};
  args.draws = 1;
  args.uniforms = uniforms.data();
  args.mass = out.mass.data();
  args.overlap = out.overlap.data();
  args.tokens = out.tokens.data();
  args.student_logprobs = out.student.data();
  args.teacher_logprobs = out.teacher.data();
  args.workspace = out.workspace.data();
  expect::that(opd_speculative_verify_residual_cpu(&args) == OPD_OK, opd_last_error());

  for (int64_t t = 0; t < 3; ++t) {
    const std::vector<double> p =
        law_of(&teacher[teacher_rows[t] * kStride], of_teacher.floor[teacher_rows[t]]);
    std::vector<double> q(kVocab);
    if (student_rows[t] >= 0) q = law_of(&student[student_rows[t] * kStride], -kInfinity);
    const bool subtracts = student_rows[t] >= 0 && student_scale[t] > 0;
    double mass = 0, overlap = 0, upto = 0;
    std::vector<double> r(kVocab);
    for (int64_t v = 0; v < kVocab; ++v) {
      r[v] = std::max(0.0, teacher_scale[t] * p[v] - (subtracts ? q[v] : 0.0));
      mass += r[v];
      overlap += std::min(p[v], q[v]);
    }
    expect::near(out.mass[t], mass, 1e-12, "mass");
    if (subtracts) {
      expect::near(out.overlap[t], overlap, 1e-12, "overlap");
    } else {
      expect::that(std::isnan(out.overlap[t]), "no overlap without a student");
    }
    int64_t token = -1;
    for (int64_t v = 0; v < kVocab; ++v) {
      if (r[v] > 0) token = v;
      upto += r[v];
      if (r[v] > 0 && uniforms[t] * mass < upto) break;
    }
    expect::that(out.tokens[t] == token, "token");
    expect::near(out.teacher[t], std::log(p[token]), 1e-11, "teacher_logprob");
    if (student_rows[t] >= 0) {
      expect::near(out.student[t], std::log(q[token]), 1e-11, "student_logprob");
    } else {
      expect::that(std::isnan(out.student[t]), "no student_logprob without a student");
    }
  }
  expect::that(out.tokens[3] == -1 && std::isnan(out.mass[3]) && std::isnan(out.teacher[3]),
               "no row of the teacher");

  args.draws = 0;
  args.uniforms = nullptr;
  const std::vector<double> masses = out.mass;
  expect::that(opd_speculative_verify_residual_cpu(&args) == OPD_OK, opd_last_error());
  expect::that(std::equal(masses.begin(), masses.end() - 1, out.mass.begin()), "the same masses");
  expect::that(out.tokens[0] == -1 && std::isnan(out.teacher[0]), "nothing is drawn");

  const auto refused = [&](auto change, const char* words) {
    auto bad = args;
    change(bad);
    expect::that(opd_speculative_verify_residual_cpu(&bad) == OPD_INVALID_ARGUMENT, words);
    expect::that(std::strstr(opd_last_error(), words) != nullptr, words);
  };
  using Args = opd_speculative_verify_residual_args_t;
  refused([](Args& bad) { bad.struct_size = 8; }, "struct_size must be");
  refused([](Args& bad) { bad.draws = 1; }, "uniforms must not be NULL");
  refused([](Args& bad) { bad.workspace = nullptr; }, "every pointer must not be NULL");
  refused([](Args& bad) { bad.student.num_rows = 1; }, "rows of the student must be below 1");
  refused([](Args& bad) { bad.teacher.lse = nullptr; }, "lse and floor of a side");
  refused([](Args& bad) { bad.student.logits.matrix.dtype = OPD_FLOAT32; }, "both sides or for");
  args.draws = 1;
  args.uniforms = uniforms.data();
  uniforms[2] = 1.0;
  refused([](Args&) {}, "uniforms must be in [0, 1), got 1 at position 2");
}

void check_refusals_and_bad_rows(std::vector<double> logits) {
  logits[3] = std::nan("");
  logits[kStride + kVocab - 1] = kInfinity;
  std::fill_n(logits.begin() + 2 * kStride, kVocab, -kInfinity);
  std::vector<int64_t> ids = {1, 1, 1, -2};
  RowsOutputs out;
  const auto good = rows_args(logits, ids, 3, 0.5, out);
  expect::that(opd_speculative_verify_rows_cpu(&good) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kRows; ++t) {
    const bool is_nothing = t == 2;
    expect::that(is_nothing ? out.lse[t] == -kInfinity : std::isnan(out.lse[t]), "lse of no law");
    expect::that(std::isnan(out.floor[t]) && std::isnan(out.logprobs[t]) && out.ranks[t] == -1 &&
                     out.argmax[t] == -1,
                 "no law");
  }
  const auto refused = [&](auto change, const char* words) {
    auto args = good;
    change(args);
    expect::that(opd_speculative_verify_rows_cpu(&args) == OPD_INVALID_ARGUMENT, words);
    expect::that(std::strstr(opd_last_error(), words) != nullptr, words);
  };
  using Args = opd_speculative_verify_rows_args_t;
  refused([](Args& args) { args.struct_size = 8; }, "struct_size must be");
  refused([](Args& args) { args.top_k = -1; }, "top_k must be >= 0");
  refused([](Args& args) { args.top_p = 0.0; }, "top_p must be in (0, 1]");
  refused([](Args& args) { args.top_p = std::nan(""); }, "top_p must be in (0, 1]");
  refused([](Args& args) { args.ranks = nullptr; }, "every pointer must not be NULL");
  ids[1] = kVocab;
  refused([](Args&) {}, "token_ids must be below 1300, got 1300 at position 1");
  auto none = good;
  none.num_rows = 0;
  none.lse = nullptr;
  expect::that(opd_speculative_verify_rows_cpu(&none) == OPD_OK, "no rows");
}

}  // namespace

int main() {
  std::mt19937 generator(5);
  std::normal_distribution<double> normal(0.0, 3.0);
  std::vector<double> teacher(kRows * kStride, std::nan("")), student = teacher;
  for (int64_t t = 0; t < kRows; ++t) {
    for (int64_t v = 0; v < kVocab; ++v) {
      teacher[t * kStride + v] = normal(generator);
      student[t * kStride + v] = teacher[t * kStride + v] + 0.3 * normal(generator);
    }
  }
  check_rows(teacher, 0, 1.0);
  check_rows(teacher, 5, 1.0);
  check_rows(teacher, 900, 0.7);
  check_rows(teacher, 0, 0.93);
  check_residual(teacher, student);
  check_refusals_and_bad_rows(teacher);
  return expect::report("speculative_verify");
}
