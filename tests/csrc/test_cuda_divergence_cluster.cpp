// SPDX-License-Identifier: Apache-2.0
// The cluster kernel under the emulation against the CPU kernel: float64 is the truth, and the
// error may be a small multiple of what the float32 CPU kernel's is. Every divergence, cluster
// size, ring depth; masks, special values, 16-bit gradients over the logits. Prints a checksum of
// all outputs: the same for every OPD_EMULATION_SEED.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "divergence_cluster.h"
#include "emulated.h"
#include "expect.h"
#include "half.h"
#include "occupancy.h"
#include "tuning.h"

namespace {

using opd::cuda::Device;

constexpr Device kSmallH200 = {4, 90, 227 * 1024};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Kind {
  int divergence;
  double param0, param1;
};

constexpr Kind kKinds[] = {
    {OPD_FORWARD_KL, 0, 0},         {OPD_REVERSE_KL, 0, 0},       {OPD_JSD, 0.3, 0},
    {OPD_SKEW_FORWARD_KL, 0.1, 0},  {OPD_SKEW_REVERSE_KL, 0.1, 0}, {OPD_SKEW_REVERSE_KL, 0.1, 1},
    {OPD_TOTAL_VARIATION, 0, 0},    {OPD_JEFFREYS, 0.3, 0},       {OPD_SQUARED_HELLINGER, 0, 0},
    {OPD_ALPHA, 0.3, 0},            {OPD_ALPHA, 1.5, 0},          {OPD_RENYI, 0.3, 0},
    {OPD_RENYI, 2, 0},              {OPD_PEARSON_CHI2, 0, 0},     {OPD_NEYMAN_CHI2, 0, 0},
    {OPD_TODI, 0, 0},               {OPD_ALPHA_BETA, 0.2, 0.7},   {OPD_ALPHA_BETA, 0, 0.7},
    {OPD_ALPHA_BETA, 0.4, 0},       {OPD_ALPHA_BETA, 0.5, -0.5},  {OPD_ALPHA_BETA, 0, 0},
    {OPD_CONCRETE_SCORE, 0, 0},     {OPD_CONCRETE_SCORE, 1, 2},   {OPD_CONCRETE_SCORE, 0, 2},
    {OPD_ADAPTIVE_KL, 0.5, 0},      {OPD_ADAPTIVE_KL, 0.95, 0},
};
constexpr Kind kReverseKl = {OPD_REVERSE_KL, 0, 0};

// 16-byte rows in 16-byte memory.
struct Matrix {
  explicit Matrix(size_t size, float value) : storage(size + 4, value) {
    data = storage.data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
  }
  std::vector<float> storage;
  float* data;
};

struct Problem {
  int64_t num_tokens, vocab_size, stride;
  std::vector<float> student, teacher;  // without padding
  double student_temperature = 1, teacher_temperature = 1, student_scale = 1, teacher_scale = 1;
  std::vector<float> student_temperatures, weights, coefficients;
  bool with_statistics = false;
  std::vector<int64_t> token_ids, topk_ids;
  int64_t grad_width;
};

// Student = teacher * 1 + noise of size `apart`, shifted by a constant.
Problem make_problem(int64_t num_tokens, int64_t vocab_size, unsigned seed, double apart = 1.5,
                     double offset = 0) {
  Problem problem{};
  problem.num_tokens = num_tokens, problem.vocab_size = vocab_size;
  problem.stride = (vocab_size + 7) / 4 * 4;
  problem.grad_width = vocab_size;
  problem.student_temperature = problem.teacher_temperature = 1;
  problem.student_scale = problem.teacher_scale = 1;
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0.0, 1.0);
  for (int64_t i = 0; i < num_tokens * vocab_size; ++i) {
    const double z = 3 * normal(generator);
    problem.teacher.push_back(static_cast<float>(z));
    problem.student.push_back(static_cast<float>(z + apart * normal(generator) + offset));
  }
  return problem;
}

struct Result {
  std::vector<double> loss, statistics, gradient;  // gradient [T, grad_width]
};

opd_divergence_args_t make_args(const Problem& problem,
                                const opd_divergence_component_t* component) {
  opd_divergence_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = problem.num_tokens;
  args.vocab_size = problem.vocab_size;
  args.grad_width = problem.grad_width;
  args.components = component;
  args.num_components = 1;
  args.student.scale = problem.student_scale, args.teacher.scale = problem.teacher_scale;
  args.student.temperature = problem.student_temperature;
  args.teacher.temperature = problem.teacher_temperature;
  args.with_statistics = problem.with_statistics;
  if (!problem.token_ids.empty()) args.token_ids = problem.token_ids.data();
  if (!problem.topk_ids.empty()) args.topk_ids = problem.topk_ids.data();
  args.num_topk = static_cast<int64_t>(problem.topk_ids.size()) / problem.num_tokens;
  return args;
}

template <class T>
Result on_cpu(const Problem& problem, const Kind& kind) {
  const auto widened = [](const std::vector<float>& from) {
    return std::vector<T>(from.begin(), from.end());
  };
  std::vector<T> student = widened(problem.student), teacher = widened(problem.teacher);
  const std::vector<T> temperatures = widened(problem.student_temperatures);
  const std::vector<T> weights = widened(problem.weights);
  const std::vector<T> coefficients = widened(problem.coefficients);
  const opd_divergence_component_t component = {kind.divergence, kind.param0, kind.param1,
                                                coefficients.empty() ? nullptr
                                                                     : coefficients.data()};
  opd_divergence_args_t args = make_args(problem, &component);
  const int32_t dtype = sizeof(T) == 8 ? OPD_FLOAT64 : OPD_FLOAT32;
  std::vector<T> loss(problem.num_tokens), statistics(OPD_NUM_STATISTICS * problem.num_tokens);
  std::vector<T> gradient(problem.num_tokens * problem.grad_width, T(7));
  args.student.matrix = {student.data(), problem.vocab_size, dtype};
  args.teacher.matrix = {teacher.data(), problem.vocab_size, dtype};
  if (!temperatures.empty()) args.student.temperatures = temperatures.data();
  if (!weights.empty()) args.token_weights = weights.data();
  args.loss = loss.data();
  if (problem.with_statistics) args.statistics = statistics.data();
  args.grad = {gradient.data(), problem.grad_width, dtype};
  expect::that(opd_divergence_fwd_grad_cpu(&args) == OPD_OK, opd_last_error());
  return {{loss.begin(), loss.end()},
          {statistics.begin(), statistics.end()},
          {gradient.begin(), gradient.end()}};
}

uint64_t checksum = 1469598103934665603u;

void add_to_checksum(const void* data, size_t bytes) {
  const unsigned char* const at = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) checksum = (checksum ^ at[i]) * 1099511628211u;
}

Matrix padded(const std::vector<float>& values, const Problem& problem) {
  // the padding is poison
  Matrix out(problem.num_tokens * problem.stride, std::nanf(""));
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    std::copy_n(&values[t * problem.vocab_size], problem.vocab_size, out.data + t * problem.stride);
  }
  return out;
}

double widened(const float* row, int64_t v, int32_t dtype) {
  if (dtype == OPD_FLOAT32) return row[v];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[v];
  if (dtype == OPD_BFLOAT16) return opd::to_real(opd::BFloat16{bits});
  return opd::to_real(opd::Float16{bits});
}

// In place of the student's logits, in `dtype`.
Result emulated(const Problem& problem, const Kind& kind, const Device& device,
                int32_t dtype = OPD_FLOAT32) {
  emulated_multiprocessors() = device.multiprocessors;
  Matrix student = padded(problem.student, problem), teacher = padded(problem.teacher, problem);
  const opd_divergence_component_t component = {
      kind.divergence, kind.param0, kind.param1,
      problem.coefficients.empty() ? nullptr : problem.coefficients.data()};
  opd_divergence_args_t args = make_args(problem, &component);
  const float poison = std::nanf("");
  std::vector<float> loss(problem.num_tokens, poison);
  std::vector<float> statistics(OPD_NUM_STATISTICS * problem.num_tokens, poison);
  args.student.matrix = {student.data, problem.stride, OPD_FLOAT32};
  args.teacher.matrix = {teacher.data, problem.stride, OPD_FLOAT32};
  if (!problem.student_temperatures.empty()) {
    args.student.temperatures = problem.student_temperatures.data();
  }
  if (!problem.weights.empty()) args.token_weights = problem.weights.data();
  args.loss = loss.data();
  if (problem.with_statistics) args.statistics = statistics.data();
  args.grad = {student.data, problem.stride * (dtype == OPD_FLOAT32 ? 1 : 2), dtype};
  opd::cuda::RowLaunch rows;
  Device here = device;
  here.ordinal = opd::cuda::current_device().ordinal;
  // the bins of a search, beside what device_for() counts
  const bool has_head = kind.divergence == OPD_ADAPTIVE_KL;
  if (has_head && here.shared_bytes_per_block < kSmallH200.shared_bytes_per_block) {
    here.shared_bytes_per_block += opd::cuda::kClusterHeadBytes;
  }
  const bool taken = opd::cuda::cluster_takes(args, here, &rows);
  expect::that(taken, "a call that the cluster kernel takes");
  if (taken) opd::cuda::forward_grad_cluster(args, rows, nullptr);
  Result out;
  out.loss.assign(loss.begin(), loss.end());
  out.statistics.assign(statistics.begin(), statistics.end());
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    const float* const row = student.data + t * problem.stride;
    for (int64_t v = 0; v < problem.grad_width; ++v) out.gradient.push_back(widened(row, v, dtype));
    const float* const read_only = teacher.data + t * problem.stride;
    expect::that(std::memcmp(read_only, &problem.teacher[t * problem.vocab_size],
                             problem.vocab_size * sizeof(float)) == 0,
                 "the teacher's logits stay");
  }
  add_to_checksum(out.loss.data(), out.loss.size() * sizeof(double));
  if (problem.with_statistics) {
    add_to_checksum(out.statistics.data(), out.statistics.size() * sizeof(double));
  }
  add_to_checksum(out.gradient.data(), out.gradient.size() * sizeof(double));
  return out;
}

// -- comparisons ---------------------------------------------------------------------------------

double worst_ratio = 0;

// Distance over `count` values, and the truth's size; equal infinities and NaN agree.
struct Distance {
  double error = 0, size = 0;
  bool agrees = true;
};
Distance distance(const double* got, const double* truth, int64_t count) {
  Distance out;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(truth[i]) || !std::isfinite(got[i])) {
      const bool same = got[i] == truth[i] || (std::isnan(got[i]) && std::isnan(truth[i]));
      out.agrees = out.agrees && same;
      continue;
    }
    out.error += (got[i] - truth[i]) * (got[i] - truth[i]);
    out.size += truth[i] * truth[i];
  }
  out.error = std::sqrt(out.error), out.size = std::sqrt(out.size);
  return out;
}

// What is not finite is as in the truth or as on the CPU; where a logit is NaN, NaN will do.
// At most twice the float32 CPU kernel's error, and `slack` of the truth's own size: the rule of
// tests/tolerance.py, with the CPU kernel in the place of eager torch.
void compare(const char* what, const Kind& kind, int64_t row, const double* got, const double* cpu,
             const double* truth, int64_t count, double slack, bool is_undefined = false) {
  const Distance ours = distance(got, truth, count), theirs = distance(cpu, truth, count);
  const double allowed = 2 * theirs.error + slack * ours.size + 1e-37;
  worst_ratio = std::max(worst_ratio, ours.error / allowed);
  const bool all_nan =
      std::all_of(got, got + count, [](double value) { return std::isnan(value); });
  const bool specials = ours.agrees || distance(got, cpu, count).agrees ||
                        (is_undefined && all_nan);
  if (!specials || !(ours.error <= allowed)) {
    std::printf("FAILED: %s of divergence %d (%g, %g), row %d: error %.3g of size %.3g, "
                "CPU %.3g%s\n",
                what, kind.divergence, kind.param0, kind.param1, static_cast<int>(row), ours.error,
                ours.size, theirs.error, specials ? "" : ", special values differ");
    ++expect::failures;
  }
}

bool has_nan(const Problem& problem, int64_t row) {
  const auto is_nan = [](float value) { return std::isnan(value); };
  const int64_t begin = row * problem.vocab_size, end = begin + problem.vocab_size;
  return std::any_of(&problem.student[begin], &problem.student[end], is_nan) ||
         std::any_of(&problem.teacher[begin], &problem.teacher[end], is_nan);
}

void check(const Problem& problem, const Kind& kind, const Device& device,
           int32_t dtype = OPD_FLOAT32) {
  const Result truth = on_cpu<double>(problem, kind), cpu = on_cpu<float>(problem, kind);
  const Result got = emulated(problem, kind, device, dtype);
  const double eps = std::numeric_limits<float>::epsilon();
  const double grad_slack = dtype == OPD_FLOAT32 ? 4 * eps : dtype == OPD_BFLOAT16 ? 4e-3 : 5e-4;
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    compare("loss", kind, t, &got.loss[t], &cpu.loss[t], &truth.loss[t], 1, 4 * eps);
    const int64_t at = t * problem.grad_width;
    compare("gradient", kind, t, &got.gradient[at], &cpu.gradient[at], &truth.gradient[at],
            problem.vocab_size, grad_slack, has_nan(problem, t));
    if (!problem.weights.empty() && problem.weights[t] == 0) {
      expect::that(got.loss[t] == 0, "loss of a masked row is 0");
      for (int64_t v = 0; v < problem.grad_width; ++v) {
        expect::that(got.gradient[at + v] == 0, "gradient of a masked row is 0");
      }
    }
    for (int64_t v = problem.vocab_size; v < problem.grad_width; ++v) {
      expect::that(got.gradient[at + v] == 0, "gradient beyond the vocabulary is 0");
    }
    for (int k = 0; problem.with_statistics && k < OPD_NUM_STATISTICS; ++k) {
      const int64_t i = k * problem.num_tokens + t;
      compare("statistics", kind, t, &got.statistics[i], &cpu.statistics[i], &truth.statistics[i],
              1, 4 * eps);
    }
  }
}

// Shared memory for `rows` of a block's share of a row of this size in a cluster of this many.
Device device_for(int64_t vocab_size, int cluster, double rows, int multiprocessors) {
  const int64_t slice = (vocab_size + cluster - 1) / cluster;
  return {multiprocessors, 90, static_cast<int>(slice * 8 * rows) + 6144};
}

// Through the entry point, with a gradient of its own.
Result by_entry_point(const Problem& problem, const Kind& kind) {
  Matrix student = padded(problem.student, problem), teacher = padded(problem.teacher, problem);
  const opd_divergence_component_t component = {kind.divergence, kind.param0, kind.param1, nullptr};
  opd_divergence_args_t args = make_args(problem, &component);
  std::vector<float> loss(problem.num_tokens);
  args.student.matrix = {student.data, problem.stride, OPD_FLOAT32};
  args.teacher.matrix = {teacher.data, problem.stride, OPD_FLOAT32};
  args.loss = loss.data();
  args.grad = {student.data, problem.stride, OPD_FLOAT32};
  expect::that(opd_divergence_fwd_grad_cuda(&args, nullptr) == OPD_OK, opd_last_error());
  Result out;
  out.loss.assign(loss.begin(), loss.end());
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    const float* const row = student.data + t * problem.stride;
    out.gradient.insert(out.gradient.end(), row, row + problem.grad_width);
  }
  return out;
}

void compare(const Problem& problem, const Kind& kind, const Result& got) {
  const Result truth = on_cpu<double>(problem, kind), cpu = on_cpu<float>(problem, kind);
  const double eps = std::numeric_limits<float>::epsilon();
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    const int64_t at = t * problem.grad_width;
    compare("loss", kind, t, &got.loss[t], &cpu.loss[t], &truth.loss[t], 1, 4 * eps);
    compare("gradient", kind, t, &got.gradient[at], &cpu.gradient[at], &truth.gradient[at],
            problem.vocab_size, 4 * eps);
  }
}

// -- cases ---------------------------------------------------------------------------------------

void check_every_divergence() {
  for (const Kind& kind : kKinds) {
    for (const int64_t vocab_size : {1, 3, 17, 1000, 4099}) {
      Problem problem = make_problem(3, vocab_size, 17 + static_cast<unsigned>(vocab_size));
      // one block, or four for more than one row each
      check(problem, kind, vocab_size < 4000 ? kSmallH200 : device_for(vocab_size, 4, 2.3, 8));
      problem.with_statistics = true;
      if (vocab_size == 1000) check(problem, kind, kSmallH200);
    }
    // near laws with another constant in the logits: where a rounded gap would have lost its digits
    check(make_problem(2, 1000, 5, 1e-3, 11.3), kind, kSmallH200);
  }
}

void check_clusters_and_rings() {
  for (const int cluster : {1, 2, 4, 8, 16}) {
    for (const double rows : {1.05, 1.6, 2.4, 3.2}) {
      const int64_t vocab_size = 4099;
      const Device device = device_for(vocab_size, cluster, rows, cluster * 2);
      check(make_problem(7, vocab_size, 3), kReverseKl, device);
    }
  }
  check(make_problem(5, 20000, 4), {OPD_JSD, 0.5, 0}, device_for(20000, 16, 1.3, 16));
  check(make_problem(5, 20000, 4), {OPD_SKEW_FORWARD_KL, 0.1, 0}, device_for(20000, 8, 2.1, 8));
  check(make_problem(2, 20000, 4), {OPD_FORWARD_KL, 0, 0}, kSmallH200);
}

void check_masks() {
  const auto masked = [](std::vector<float> weights) {
    Problem problem = make_problem(static_cast<int64_t>(weights.size()), 1001, 8);
    problem.grad_width = 1003;
    for (size_t t = 0; t < weights.size(); ++t) {
      if (weights[t] != 0) continue;
      // not read
      std::fill_n(&problem.student[t * 1001], 1001, std::nanf(""));
      std::fill_n(&problem.teacher[t * 1001], 1001, std::nanf(""));
    }
    problem.weights = weights;
    problem.with_statistics = true;
    return problem;
  };
  for (const int32_t dtype : {OPD_FLOAT32, OPD_BFLOAT16}) {
    for (const Device& device : {Device{1, 90, 227 * 1024}, device_for(1001, 4, 1.3, 4)}) {
      check(masked({0, 0, 0.7f, 1, 2}), kReverseKl, device, dtype);
      check(masked({1, 0, 0, -2, 0, 3}), kReverseKl, device, dtype);
      check(masked({1, 1, 0.25f, 0, 0}), kReverseKl, device, dtype);
      check(masked({0, 0, 0, 0}), kReverseKl, device, dtype);
    }
  }
  // more rows than a warp looks at once
  std::vector<float> many(75);
  for (size_t t = 0; t < many.size(); ++t) many[t] = t % 7 == 2 ? 1.0f : 0.0f;
  check(masked(many), kReverseKl, {1, 90, 227 * 1024});
}

void check_options() {
  Problem problem = make_problem(6, 1000, 12);
  problem.student_temperature = 1.7, problem.teacher_temperature = 0.6;
  problem.student_scale = 0.25, problem.teacher_scale = 0.5;
  problem.with_statistics = true;
  problem.token_ids = {0, 999, 5, 500, 123, 7};
  problem.topk_ids = {0, 1, -1, 5, 6, 999, 7, 8, 9, 10, 11, 12, 3, 4, 5, 6, 7, 8};
  for (const Kind& kind : kKinds) check(problem, kind, kSmallH200);
  problem.student_temperatures = {1, 0.5f, 2, 3, 1, 0.7f};
  problem.coefficients = {1, 0, 2, -1, 0.5f, 0};
  problem.weights = {1, 1, 0.5f, 0, 2, 1};
  for (const Kind& kind : {kReverseKl, Kind{OPD_JSD, 0.5, 0}, Kind{OPD_ALPHA, 0.4, 0}}) {
    check(problem, kind, device_for(1000, 2, 1.7, 2));
  }
}

void check_16_bit_gradients() {
  for (const int32_t dtype : {OPD_BFLOAT16, OPD_FLOAT16}) {
    for (const int64_t vocab_size : {3, 1000, 4099}) {
      Problem problem = make_problem(5, vocab_size, 21);
      problem.grad_width = vocab_size + 2;
      check(problem, kReverseKl, device_for(vocab_size, vocab_size > 1000 ? 8 : 1, 2.2, 8), dtype);
      check(problem, {OPD_FORWARD_KL, 0, 0}, kSmallH200, dtype);
    }
  }
}

void check_special_values() {
  const auto with = [](float value, bool student, int64_t column) {
    Problem problem = make_problem(3, 1000, 31);
    (student ? problem.student : problem.teacher)[1000 + column] = value;
    return problem;
  };
  const Device two_blocks = device_for(1000, 2, 2.3, 2);
  for (const Kind& kind : kKinds) {
    for (const int64_t column : {0, 600, 999}) {
      for (const float value : {-kInfinity, std::nanf("")}) {
        check(with(value, true, column), kind, two_blocks);
        check(with(value, false, column), kind, two_blocks);
      }
    }
    Problem problem = with(-kInfinity, true, 4);
    problem.teacher[1004] = -kInfinity;
    check(problem, kind, two_blocks);
  }
  for (const bool student : {true, false}) {
    Problem problem = make_problem(3, 1000, 32);
    problem.with_statistics = true;
    std::fill_n((student ? problem.student : problem.teacher).begin() + 1000, 1000, -kInfinity);
    check(problem, kReverseKl, two_blocks);
    check(with(kInfinity, student, 700), kReverseKl, two_blocks);
  }
  // what the first columns say nothing about: far above, far below, and masked at the beginning
  Problem problem = make_problem(4, 1000, 33);
  for (int64_t v = 0; v < 1000; ++v) {
    problem.student[v] = problem.teacher[v] = v < 4 ? 90.0f : -90.0f;
    problem.student[1000 + v] += v == 900 ? 300.0f : 0.0f;
    problem.teacher[2000 + v] = v < 600 ? -kInfinity : problem.teacher[2000 + v];
    problem.student[3000 + v] = -1000.0f - static_cast<float>(v);
  }
  for (const Kind& kind : {kReverseKl, Kind{OPD_FORWARD_KL, 0, 0}, Kind{OPD_JSD, 0.5, 0}}) {
    check(problem, kind, two_blocks);
  }
}

// Renyi's mass in double, where float32 has no number for it: some rows exchange it once more, and
// their blocks may be far apart in time.
void check_mass_out_of_range() {
  const char* const seed = std::getenv("OPD_EMULATION_SEED");
  const std::string before = seed ? seed : "";
  for (const int cluster : {2, 4}) {
    Problem problem = make_problem(6, 1000, 41);
    for (const int64_t row : {0, 1, 3, 5}) {
      for (int64_t v = 0; v < 1000; ++v) {
        problem.student[row * 1000 + v] = v < 500 ? 120.0f : 0.0f;
        problem.teacher[row * 1000 + v] = v < 500 ? 0.0f : 120.0f;
      }
    }
    check(problem, {OPD_RENYI, 0.5, 0}, device_for(1000, cluster, 2.3, cluster));
    for (int other = 1; other <= 6; ++other) {
      emulated::shuffle_threads(other);
      check(problem, {OPD_RENYI, 0.5, 0}, device_for(1000, cluster, 2.3, cluster));
    }
    setenv("OPD_EMULATION_SEED", before.c_str(), 1);
  }
}

// Loss of adaptive_kl where the head is the tokens of mask, by its formula.
double adaptive_kl(const std::vector<double>& p, const std::vector<double>& q,
                   const std::vector<bool>& in_head) {
  double head = 0, rest = 0, forward = 0, reverse = 0;
  for (size_t v = 0; v < p.size(); ++v) {
    (in_head[v] ? head : rest) += std::fabs(p[v] - q[v]);
    if (p[v] > 0) forward += p[v] * std::log(p[v] / q[v]);
    reverse += q[v] * std::log(q[v] / p[v]);
  }
  return (head * forward + rest * reverse) / (head + rest);
}

// The search for a head: rows that need no pass, one or many; several blocks, which a seed has run
// apart from each other; masses that fit exactly.
void check_heads() {
  Problem problem = make_problem(8, 1000, 61);
  for (int64_t v = 0; v < 1000; ++v) {
    float* const teacher = &problem.teacher[v];
    teacher[0] = 0.7f;
    teacher[1000] = v == 999 ? 1.0f : -kInfinity;
    teacher[2000] = static_cast<float>(v % 3);
    teacher[3000] = v == 700 ? 30.0f : 0.0f;
    teacher[4000] = v % 2 ? -kInfinity : teacher[4000];
    opd::BFloat16 bits;
    opd::from_real(teacher[5000], &bits);
    teacher[5000] = opd::to_real(bits);
    teacher[6000] = v < 9 ? 0.25f * static_cast<float>(v % 5) : -30.0f;
  }
  for (const double head_mass : {0.02, 0.5, 0.95, 1 - 1e-9}) {
    for (const int cluster : {1, 2, 4, 16}) {
      check(problem, {OPD_ADAPTIVE_KL, head_mass, 0},
            device_for(1000, cluster, 2.3, cluster));
    }
  }
  check(make_problem(3, 20000, 62), {OPD_ADAPTIVE_KL, 0.5, 0}, {16, 90, 60000});
  emulated_multiprocessors() = 16;
  const Problem large = make_problem(1, 151936, 64);
  const Kind kind = {OPD_ADAPTIVE_KL, 0.5, 0};
  compare(large, kind, by_entry_point(large, kind));
  expect::that(emulation::machine().cluster_size == 16, "a large row is on chip");
  // powers of two, in logits of ln 2: 1/2, 1/4 and two eighths
  Problem exact = make_problem(1, 4, 63);
  exact.teacher_scale = 0.69314718055994531;
  exact.teacher = {-3, -1, -3, -2};
  double sum = 0;
  std::vector<double> q, p = {0.125, 0.5, 0.125, 0.25};
  for (float z : exact.student) sum += std::exp(static_cast<double>(z));
  for (float z : exact.student) q.push_back(std::exp(static_cast<double>(z)) / sum);
  struct Case {
    double head_mass;
    std::vector<bool> in_head;
  };
  const std::vector<bool> one = {false, true, false, false}, two = {false, true, false, true};
  for (const Case& at : {Case{0.4, one}, Case{0.5, one}, Case{std::nextafter(0.75, 0.0), one},
                         Case{0.75, two}, Case{0.8, two}, Case{std::nextafter(1.0, 0.0), two}}) {
    const Result got = emulated(exact, {OPD_ADAPTIVE_KL, at.head_mass, 0}, kSmallH200);
    const double expected = adaptive_kl(p, q, at.in_head);
    expect::near(got.loss[0], expected, 1e-6 * expected, "the loss of a head that fits exactly");
  }
}

// A device without room for the cluster of choice takes smaller ones, or the kernel that streams.
void check_parts_of_a_gpu() {
  struct Case {
    int64_t vocab_size;
    int largest, expected;  // blocks of a cluster; 1 of the kernel that streams
  };
  emulated_multiprocessors() = 16;
  for (const Case& part : {Case{20000, 16, 2}, Case{20000, 1, 1}, Case{60000, 4, 4},
                           Case{60000, 2, 1}, Case{120000, 16, 16}, Case{120000, 8, 8},
                           Case{120000, 4, 1}}) {
    emulated_largest_cluster() = part.largest;
    const Problem problem = make_problem(2, part.vocab_size, 51);
    compare(problem, kReverseKl, by_entry_point(problem, kReverseKl));
    const int used = static_cast<int>(emulation::machine().cluster_size);
    if (used != part.expected) std::printf("%d blocks: ", used);
    expect::that(used == part.expected, "the blocks of a cluster on a part of a GPU");
  }
  emulated_largest_cluster() = 16;
}

// A device is asked once, whoever launches; other shapes and devices are other questions.
void check_questions() {
  const Problem problem = make_problem(2, 3000, 52), other = make_problem(2, 20000, 52);
  const Kind kind = {OPD_JEFFREYS, 0.2, 0};
  emulated_multiprocessors() = 24;
  by_entry_point(problem, kind);
  const int once = emulated_questions();
  const Result expected = by_entry_point(problem, kind);
  expect::that(emulated_questions() == once, "nothing is asked twice");
  by_entry_point(other, kind);
  expect::that(emulated_questions() > once, "another vocabulary is");
  emulated_multiprocessors() = 20;
  const int before = emulated_questions();
  by_entry_point(problem, kind);
  expect::that(emulated_questions() > before, "another device is");
  emulated_multiprocessors() = 28;
  std::vector<std::thread> threads;
  std::vector<Result> results(4);
  for (Result& result : results) {
    threads.emplace_back([&] { result = by_entry_point(problem, kind); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Result& result : results) {
    expect::that(result.gradient == expected.gradient, "threads that launch at once");
  }
  opd::cuda::KnownNumbers known;
  for (int i = 0; i < 1000; ++i) known.put(i, 2 * i);
  int found = 0;
  for (int i = 0; i < 1000; ++i) {
    int number = -1;
    if (!known.find(i, &number)) continue;
    ++found;
    expect::that(number == 2 * i, "a number is that of its key");
  }
  expect::that(found >= 40, "what there is room for is kept");
}

void check_refusals() {
  Problem problem = make_problem(2, 16, 1);
  const opd_divergence_component_t component = {OPD_JSD, 0.5, 0, nullptr};
  Matrix student = padded(problem.student, problem), teacher = padded(problem.teacher, problem);
  std::vector<float> loss(2);
  const auto takes = [&](auto&& change, Device device = kSmallH200) {
    opd_divergence_args_t args = make_args(problem, &component);
    args.student.matrix = {student.data, problem.stride, OPD_FLOAT32};
    args.teacher.matrix = {teacher.data, problem.stride, OPD_FLOAT32};
    args.loss = loss.data();
    args.grad = {student.data, problem.stride, OPD_FLOAT32};
    change(args);
    emulated_multiprocessors() = device.multiprocessors;
    device.ordinal = opd::cuda::current_device().ordinal;
    opd::cuda::RowLaunch rows;
    return opd::cuda::cluster_takes(args, device, &rows);
  };
  const auto nothing = [](opd_divergence_args_t&) {};
  expect::that(takes(nothing), "the plain call is taken");
  expect::that(!takes(nothing, {4, 80, 163 * 1024}), "no clusters before Hopper");
  expect::that(!takes(nothing, {4, 120, 99 * 1024}), "no code for this architecture");
  expect::that(!takes(nothing, {4, 90, 256}), "no memory");
  expect::that(!takes([](auto& args) { args.student.softcap = 30; }), "softcap");
  expect::that(!takes([](auto& args) { args.student.scale = -1; }), "negative scale");
  expect::that(!takes([&](auto& args) { args.teacher.bias = loss.data(); }), "bias");
  expect::that(!takes([](auto& args) { args.teacher.matrix.row_stride = 21; }), "stride");
  expect::that(!takes([&](auto& args) { args.student.matrix.data = student.data + 1; }), "address");
  expect::that(!takes([](auto& args) { args.target = OPD_TARGET_MIXTURE; }), "target");
  expect::that(!takes([](auto& args) { args.grad.dtype = OPD_BFLOAT16; }), "16-bit rows elsewhere");
  expect::that(!takes([](auto& args) { args.student.matrix.dtype = OPD_BFLOAT16; }), "16 bits");
  static const opd_divergence_component_t other = {OPD_CROSS_ENTROPY, 0, 0, nullptr};
  expect::that(!takes([](auto& args) { args.components = &other; }), "no divergence");
}

// OPD_CLUSTER_BLOCKS=0: every call goes to the kernel that streams, and is as right.
int check_without_clusters() {
  emulated_multiprocessors() = 16;
  const Problem problem = make_problem(2, 20000, 54);
  compare(problem, kReverseKl, by_entry_point(problem, kReverseKl));
  expect::that(emulation::machine().cluster_size == 1, "no clusters");
  expect::that(emulated_questions() == 0, "no question about clusters");
  return expect::report("test_cuda_divergence_cluster without clusters");
}

}  // namespace

int main() {
  if (std::getenv("OPD_CLUSTER_BLOCKS")) return check_without_clusters();
  check_every_divergence();
  check_clusters_and_rings();
  check_masks();
  check_options();
  check_16_bit_gradients();
  check_special_values();
  check_mass_out_of_range();
  check_heads();
  check_parts_of_a_gpu();
  check_questions();
  check_refusals();
  std::printf("checksum %016llx, largest error %.2f of what is allowed\n",
              static_cast<unsigned long long>(checksum), worst_ratio);
  return expect::report("test_cuda_divergence_cluster");
}
