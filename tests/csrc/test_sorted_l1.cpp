// SPDX-License-Identifier: Apache-2.0
// The kernel against the definition in double, sorted by the standard library, and the radix sort
// against std::stable_sort.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"
#include "radix_sort.h"

namespace {

constexpr int64_t kTokens = 4, kStudent = 1031, kTeacher = 777, kStride = 1037;

struct Row {
  std::vector<double> law;
  std::vector<int64_t> order;  // ids without a partner, likeliest first
};

template <class T>
Row row_of(const T* logits, int64_t size, double log_scale, const std::vector<uint8_t>& paired) {
  Row row;
  double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
  for (int64_t v = 0; v < size; ++v) largest = std::max(largest, double(logits[v]));
  for (int64_t v = 0; v < size; ++v) row.law.push_back(std::exp(double(logits[v]) - largest));
  for (const double value : row.law) sum += value;
  for (double& value : row.law) value *= std::exp(log_scale) / sum;
  for (int64_t v = 0; v < size; ++v) {
    if (paired.empty() || !paired[v]) row.order.push_back(v);
  }
  std::stable_sort(row.order.begin(), row.order.end(),
                   [&](int64_t a, int64_t b) { return row.law[a] > row.law[b]; });
  return row;
}

template <class T>
struct Call {
  std::vector<T> student, teacher, scales, weights, loss, grad, grad_scales;
  std::vector<int64_t> pairs;
  std::vector<uint8_t> paired;
  std::vector<double> workspace;
  opd_sorted_l1_args_t args{};

  Call(bool with_pairs, int64_t workers) {
    std::mt19937 generator(3);
    std::normal_distribution<double> normal(0.0, 2.0);
    student.resize(kTokens * kStride);
    teacher.resize(kTokens * kTeacher);
    for (T& value : student) value = T(normal(generator));
    for (T& value : teacher) value = T(normal(generator));
    // no probability, and a few that are the same
    for (int64_t v = 100; v < 160; ++v) student[v] = -std::numeric_limits<T>::infinity();
    for (int64_t v = 300; v < 320; ++v) student[kStride + v] = T(1.5);
    scales = {T(0), T(-0.5), T(-2), T(-0.1)};
    weights = {T(1), T(2), T(0), T(-0.5)};
    loss.assign(kTokens, T(7));
    grad.assign(kTokens * kStride, T(7));
    grad_scales.assign(kTokens, T(7));
    const int32_t dtype = sizeof(T) == 8 ? OPD_FLOAT64 : OPD_FLOAT32;
    workspace.resize(opd_sorted_l1_workspace_bytes(workers, kStudent, kTeacher, dtype) / 8 + 1);
    args.struct_size = sizeof(args);
    args.num_tokens = kTokens;
    args.student_vocab_size = kStudent;
    args.teacher_vocab_size = kTeacher;
    args.student = {{student.data(), kStride, dtype}, nullptr, 1.0, 0.0, 1.0, nullptr};
    args.teacher = {{teacher.data(), kTeacher, dtype}, nullptr, 1.0, 0.0, 1.0, nullptr};
    args.student_log_scales = scales.data();
    args.token_weights = weights.data();
    args.rest_weight = 1.0;
    args.beta = 0.5;
    if (with_pairs) {
      pairs.assign(kStudent, -1);
      paired.assign(kTeacher, 0);
      for (int64_t k = 0; k < 50; ++k) pairs[5 + 3 * k] = 2 * k, paired[2 * k] = 1;
      args.student_pairs = pairs.data();
      args.teacher_paired = paired.data();
      args.pair_weight = 0.3;
      args.rest_weight = 0.7;
      args.beta = 0.2;
    }
    args.num_workers = workers;
    args.workspace = workspace.data();
    args.loss = loss.data();
    args.grad = {grad.data(), kStride, dtype};
    args.grad_width = kStride;
    args.grad_log_scales = grad_scales.data();
  }
};

template <class T>
void check(bool with_pairs, int64_t workers, double tolerance) {
  Call<T> call(with_pairs, workers);
  const opd_sorted_l1_args_t& args = call.args;
  expect::that(opd_sorted_l1_cpu(&args) == OPD_OK, opd_last_error());
  for (int64_t t = 0; t < kTokens; ++t) {
    const double weight = call.weights[t];
    if (weight == 0.0) {
      expect::that(call.loss[t] == T(0) && call.grad_scales[t] == T(0), "a row of weight 0");
      continue;
    }
    std::vector<uint8_t> own(with_pairs ? kStudent : 0);
    for (size_t v = 0; v < own.size(); ++v) own[v] = call.pairs[v] >= 0;
    const Row q = row_of(&call.student[t * kStride], kStudent, call.scales[t], own);
    const Row p = row_of(&call.teacher[t * kTeacher], kTeacher, 0.0, call.paired);
    double loss = 0.0, total = 0.0;
    std::vector<double> summands(kStudent, 0.0);
    for (size_t i = 0; i < std::max(q.order.size(), p.order.size()); ++i) {
      const double a = i < q.order.size() ? q.law[q.order[i]] : 0.0;
      const double b = i < p.order.size() ? p.law[p.order[i]] : 0.0;
      loss += args.rest_weight * std::fabs(a - b);
      if (i < q.order.size()) {
        summands[q.order[i]] = args.rest_weight * a * (a > b ? 1.0 : a < b ? -1.0 : 0.0);
      }
    }
    for (int64_t v = 0; v < kStudent && with_pairs; ++v) {
      if (call.pairs[v] < 0) continue;
      const double a = q.law[v], b = p.law[call.pairs[v]], m = args.beta * b + (1 - args.beta) * a;
      loss += args.pair_weight * args.beta * b * std::log(b / m);
      if (a == 0.0) continue;
      summands[v] = args.pair_weight * (1 - args.beta) * a * std::log(a / m);
      loss += summands[v];
    }
    for (const double summand : summands) total += summand;
    expect::near(call.loss[t], weight * loss, tolerance, "loss");
    expect::near(call.grad_scales[t], weight * total, tolerance, "gradient of the log-scale");
    const double scale = std::exp(double(call.scales[t]));
    for (int64_t v = 0; v < kStudent; ++v) {
      const double expected = weight * (summands[v] - q.law[v] / scale * total);
      expect::near(call.grad[t * kStride + v], expected, tolerance, "gradient");
    }
    for (int64_t v = kStudent; v < kStride; ++v) {
      expect::that(call.grad[t * kStride + v] == T(0), "columns beyond the vocabulary");
    }
  }
}

void check_sort() {
  std::mt19937 generator(1);
  for (const int64_t count : {0, 1, 2, 1000, 70000}) {
    std::vector<uint64_t> items(count), spare(count);
    for (int64_t i = 0; i < count; ++i) {
      // few keys, so that many are the same, and all in a few digits
      items[i] = (uint64_t{generator() % 5000} << 32 | uint64_t(i));
    }
    std::vector<uint64_t> expected = items;
    const auto key = [](uint64_t item) { return static_cast<uint32_t>(item >> 32); };
    std::stable_sort(expected.begin(), expected.end(),
                     [&](uint64_t a, uint64_t b) { return key(a) > key(b); });
    const uint64_t* sorted = opd::sort_descending<10, 3>(items.data(), spare.data(), count, key);
    expect::that(std::equal(expected.begin(), expected.end(), sorted), "sort_descending");
  }
}

void check_refusals() {
  const auto refused = [](auto change, const char* words) {
    Call<float> call(true, 1);
    change(call.args, call);
    const bool ok = opd_sorted_l1_cpu(&call.args) == OPD_INVALID_ARGUMENT &&
                    std::strstr(opd_last_error(), words) != nullptr;
    expect::that(ok, words);
  };
  refused([](auto& args, auto&) { args.struct_size = 1; }, "struct_size must be");
  refused([](auto& args, auto&) { args.beta = 1.0; }, "beta must be in (0, 1)");
  refused([](auto& args, auto&) { args.num_workers = 0; }, "num_workers must be at least 1");
  refused([](auto& args, auto&) { args.teacher_paired = nullptr; }, "must be given together");
  refused([](auto& args, auto&) { args.workspace = nullptr; }, "must not be NULL");
  refused([](auto& args, auto&) { args.grad_width = 3; }, "grad_width must be at least");
  refused([](auto&, auto& call) { call.pairs[9] = kTeacher; }, "student_pairs must be below 777");
}

}  // namespace

int main() {
  check_sort();
  for (const bool with_pairs : {false, true}) {
    for (const int64_t workers : {int64_t{1}, int64_t{3}, int64_t{9}}) {
      check<double>(with_pairs, workers, 1e-14);
      check<float>(with_pairs, workers, 2e-6);
    }
  }
  // the gradient in the place of the logits, and a row without a law
  Call<float> apart(true, 2), in_place(true, 2);
  in_place.args.grad.data = in_place.student.data();
  expect::that(opd_sorted_l1_cpu(&apart.args) == OPD_OK, opd_last_error());
  expect::that(opd_sorted_l1_cpu(&in_place.args) == OPD_OK, opd_last_error());
  expect::that(std::memcmp(apart.grad.data(), in_place.student.data(),
                           sizeof(float) * apart.grad.size()) == 0,
               "the gradient may take the place of the logits");
  Call<float> lost(false, 1);
  lost.teacher[5] = std::nanf("");
  expect::that(opd_sorted_l1_cpu(&lost.args) == OPD_OK, opd_last_error());
  expect::that(std::isnan(lost.loss[0]) && std::isnan(lost.grad[3]) && !std::isnan(lost.loss[1]),
               "a NaN stays in its row");
  check_refusals();
  return expect::report("sorted_l1");
}
