// SPDX-License-Identifier: Apache-2.0
// Calls of a divergence with everything that they may be given, in float32 and in float64, on the
// CPU and on the emulated GPU; and the rule that compares their results.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "half.h"
#include "opd/opd.h"

namespace cases {

constexpr double kEps = 1.1920929e-7;
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// Values in float32 and, the same values, in float64.
struct Values {
  std::vector<float> single;
  std::vector<double> wide;
  void set(size_t i, double value) { wide[i] = single[i] = static_cast<float>(value); }
  void resize(size_t n, double value) {
    single.resize(n), wide.resize(n);
    for (size_t i = 0; i < n; ++i) set(i, value);
  }
  const void* of(bool is_double) const {
    return is_double ? static_cast<const void*>(wide.data()) : single.data();
  }
};

// A matrix of logits in a storage type, with poison between the rows.
struct Logits {
  int64_t num_rows, vocab_size, stride;
  int32_t dtype;
  Values values;
  std::vector<uint16_t> bits;

  Logits(int64_t rows, int64_t vocab, int64_t row_stride, int32_t type, unsigned seed,
         double spread)
      : num_rows(rows), vocab_size(vocab), stride(row_stride), dtype(type) {
    values.resize(rows * stride, kNan);
    bits.assign(rows * stride, 0x7fff);
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal(0.0, spread);
    for (int64_t t = 0; t < rows; ++t) {
      for (int64_t v = 0; v < vocab; ++v) put(t, v, normal(generator));
    }
  }
  void put(int64_t t, int64_t v, double value) {
    const int64_t at = t * stride + v;
    values.set(at, value);
    if (dtype == OPD_FLOAT32) return;
    opd::BFloat16 bfloat;
    opd::Float16 half;
    opd::from_real(values.single[at], &bfloat);
    opd::from_real(values.single[at], &half);
    bits[at] = dtype == OPD_BFLOAT16 ? bfloat.bits : half.bits;
    values.set(at, dtype == OPD_BFLOAT16 ? opd::to_real(bfloat) : opd::to_real(half));
  }
  opd_const_matrix_t matrix(bool is_double, int64_t first_column = 0) const {
    if (is_double) return {values.wide.data() + first_column, stride, OPD_FLOAT64};
    if (dtype == OPD_FLOAT32) return {values.single.data() + first_column, stride, dtype};
    return {bits.data() + first_column, stride, dtype};
  }
};

struct Kind {
  int divergence;
  double param0, param1;
};

constexpr Kind kKinds[] = {
    {OPD_FORWARD_KL, 0, 0},        {OPD_REVERSE_KL, 0, 0},
    {OPD_JSD, 0.3, 0},             {OPD_SKEW_FORWARD_KL, 0.1, 0},
    {OPD_SKEW_REVERSE_KL, 0.1, 0}, {OPD_SKEW_REVERSE_KL, 0.2, 1},
    {OPD_TOTAL_VARIATION, 0, 0},   {OPD_JEFFREYS, 0.3, 0},
    {OPD_SQUARED_HELLINGER, 0, 0}, {OPD_ALPHA, 0.3, 0},
    {OPD_RENYI, 0.3, 0},           {OPD_RENYI, 2, 0},
    {OPD_PEARSON_CHI2, 0, 0},      {OPD_NEYMAN_CHI2, 0, 0},
    {OPD_TODI, 0, 0},              {OPD_ADAPTIVE_KL, 0.5, 0},
    {OPD_ALPHA_BETA, 0.2, 0.7},    {OPD_ALPHA_BETA, 0, 0},
    {OPD_CONCRETE_SCORE, 0, 1},    {OPD_CONCRETE_SCORE, 2, 0},
};

struct Target {
  int32_t kind;
  int32_t live;
  double reference;
};

constexpr Target kTargets[] = {
    {OPD_TARGET_TEACHER, 0, 0},     {OPD_TARGET_GEOMETRIC, 1, 0}, {OPD_TARGET_GEOMETRIC, 0, 0.2},
    {OPD_TARGET_GEOMETRIC, 1, 0.2}, {OPD_TARGET_MIXTURE, 0, 0},   {OPD_TARGET_MIXTURE, 1, 0},
};

// Everything a call may be given.
struct Problem {
  int64_t num_tokens, vocab_size;
  Logits student, teacher, reference;
  Values student_bias, teacher_bias, temperatures, mixture_weights, token_weights, grad_loss;
  Values label_weights, coefficients;
  std::vector<int64_t> labels, token_ids, topk_ids;
  std::vector<opd_divergence_component_t> components;  // coefficients by position, see `gated`
  std::vector<bool> gated;
  Target target = kTargets[0];
  bool options = false, with_statistics = false, with_labels = false, with_weights = false;

  Problem(int64_t tokens, int64_t vocab, unsigned seed, int32_t student_dtype = OPD_FLOAT32,
          int32_t teacher_dtype = OPD_FLOAT32, int64_t pad = 0)
      : num_tokens(tokens),
        vocab_size(vocab),
        student(tokens, vocab, vocab + pad, student_dtype, seed, 2.0),
        teacher(tokens, vocab, vocab + 2 * pad, teacher_dtype, seed + 1, 2.0),
        reference(tokens, vocab, vocab + pad, OPD_FLOAT32, seed + 2, 1.0) {
    std::mt19937 generator(seed + 3);
    std::uniform_real_distribution<double> uniform(0.1, 0.9);
    const auto fill = [&](Values& values, int64_t n, double scale, double offset) {
      values.resize(n, 0);
      for (int64_t i = 0; i < n; ++i) values.set(i, offset + scale * uniform(generator));
    };
    fill(student_bias, vocab, 1, -0.5);
    fill(teacher_bias, vocab, 1, -0.5);
    fill(temperatures, tokens, 1, 0.5);
    fill(mixture_weights, tokens, 1, 0);
    fill(token_weights, tokens, 1, 0.2);
    fill(grad_loss, tokens, 2, -0.5);
    fill(label_weights, 2 * tokens, 1, 0);
    fill(coefficients, tokens, 1, 0);
    for (int64_t t = 0; t < tokens; ++t) {
      token_ids.push_back(t * 7 % vocab);
      labels.insert(labels.end(), {t * 3 % vocab, t % 2 ? -1 : vocab - 1});
      topk_ids.insert(topk_ids.end(), {vocab - 1, -1, t % vocab});
    }
  }

  void add(const Kind& kind, bool is_gated = false) {
    components.push_back({kind.divergence, kind.param0, kind.param1, nullptr});
    gated.push_back(is_gated);
  }
};

// The outputs of a call, as double.
struct Outcome {
  std::vector<double> loss, statistics, grad, state;
};

inline int64_t state_size(const Problem& problem) {
  return OPD_DIVERGENCE_STATE + static_cast<int64_t>(problem.components.size()) *
                                    OPD_DIVERGENCE_STATE_PER_COMPONENT;
}

// Arguments of a problem, in one precision; `components` is storage.
inline opd_divergence_args_t args_of(const Problem& p, bool is_double,
                              std::vector<opd_divergence_component_t>& components) {
  opd_divergence_args_t args{};
  args.struct_size = sizeof(args);
  args.num_tokens = p.num_tokens;
  args.vocab_size = p.vocab_size;
  args.student = {p.student.matrix(is_double), nullptr, 1.0, 0.0, 1.0, nullptr};
  args.teacher = {p.teacher.matrix(is_double), nullptr, 1.0, 0.0, 1.0, nullptr};
  args.reference = {p.reference.matrix(is_double), nullptr, 1.0, 0.0, 0.9, nullptr};
  if (p.options) {
    args.student.bias = p.student_bias.of(is_double);
    args.teacher.bias = p.teacher_bias.of(is_double);
    // powers of two, so that float32 has the same numbers
    args.student.scale = 0.5, args.teacher.scale = -1.5;
    args.student.softcap = 4.0, args.teacher.softcap = 8.0;
    args.student.temperatures = p.temperatures.of(is_double);
    args.teacher.temperature = 0.75;
  }
  components = p.components;
  for (size_t j = 0; j < components.size(); ++j) {
    if (p.gated[j]) components[j].coefficients = p.coefficients.of(is_double);
  }
  args.components = components.data();
  args.num_components = static_cast<int32_t>(components.size());
  args.target = p.target.kind;
  args.live_target = p.target.live;
  args.target_student = 0.25, args.target_teacher = 1.5, args.target_reference = p.target.reference;
  args.mixture_weights = p.mixture_weights.of(is_double);
  if (p.with_weights) args.token_weights = p.token_weights.of(is_double);
  if (p.with_labels) {
    args.labels = p.labels.data();
    args.label_weights = p.label_weights.of(is_double);
    args.num_labels = 2;
  }
  if (p.with_statistics) {
    args.with_statistics = 1;
    args.token_ids = p.token_ids.data();
    args.topk_ids = p.topk_ids.data();
    args.num_topk = 3;
  }
  return args;
}

// fwd, then bwd, of the CPU (cuda = false) or of the emulated GPU.
template <class T>
Outcome forward_backward(const Problem& p, bool cuda) {
  std::vector<opd_divergence_component_t> components;
  opd_divergence_args_t args = args_of(p, sizeof(T) == 8, components);
  std::vector<T> loss(p.num_tokens, T(kNan)), grad(p.num_tokens * (p.vocab_size + 5), T(kNan));
  std::vector<T> statistics(OPD_NUM_STATISTICS * p.num_tokens, T(kNan));
  Outcome out;
  out.state.assign(p.num_tokens * state_size(p), kNan);
  args.loss = loss.data();
  args.state = out.state.data();
  if (p.with_statistics) args.statistics = statistics.data();
  const auto done = [](opd_status_t status) { expect::that(status == OPD_OK, opd_last_error()); };
  done(cuda ? opd_divergence_fwd_cuda(&args, nullptr) : opd_divergence_fwd_cpu(&args));
  args.grad_loss = p.grad_loss.of(sizeof(T) == 8);
  args.grad = {grad.data(), p.vocab_size + 5, sizeof(T) == 8 ? OPD_FLOAT64 : OPD_FLOAT32};
  args.grad_width = p.vocab_size + 3;
  done(cuda ? opd_divergence_bwd_cuda(&args, nullptr) : opd_divergence_bwd_cpu(&args));
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    const T* row = grad.data() + t * (p.vocab_size + 5);
    expect::that(row[p.vocab_size] == 0 && row[p.vocab_size + 2] == 0, "zeros up to grad_width");
    expect::that(std::isnan(row[p.vocab_size + 3]), "nothing is written past grad_width");
    out.grad.insert(out.grad.end(), row, row + p.vocab_size);
  }
  out.loss.assign(loss.begin(), loss.end());
  if (p.with_statistics) out.statistics.assign(statistics.begin(), statistics.end());
  return out;
}

struct Worst {
  double ratio = 0;
  std::string where;
};
inline Worst worst;

// |got - truth| <= 2 max|single - truth| + 4 eps max|truth|, with the maxima over [begin, end);
// where the truth is no finite number both are the same.
inline void compare(const std::vector<double>& truth, const std::vector<double>& single,
             const std::vector<double>& got, size_t begin, size_t end, double floor,
             const std::string& what) {
  double size = 0, own = 0, error = 0;
  for (size_t i = begin; i < end; ++i) {
    if (!std::isfinite(truth[i])) {
      const auto same = [&](double x) { return std::isnan(x) ? std::isnan(got[i]) : x == got[i]; };
      expect::that(same(truth[i]) || same(single[i]), (what + ": special value").c_str());
      continue;
    }
    if (!std::isfinite(single[i])) continue;  // out of float32's range
    size = std::max(size, std::fabs(truth[i]));
    own = std::max(own, std::fabs(single[i] - truth[i]));
    error = std::isnan(got[i]) ? kInf : std::max(error, std::fabs(got[i] - truth[i]));
  }
  const double bound = 2 * own + 4 * kEps * std::max(size, floor);
  expect::near(error, 0, bound, what.c_str());
  if (bound > 0 && error / bound > worst.ratio) worst = {error / bound, what};
}

inline void compare_rows(const Problem& p, const Outcome& truth, const Outcome& single,
                         const Outcome& got, const std::string& what) {
  const int64_t n = p.num_tokens, v = p.vocab_size;
  compare(truth.loss, single.loss, got.loss, 0, n, 0, what + ": loss");
  // the gradient over one token or two is what cancellation leaves of numbers near 1
  const double floor = v <= 2 ? 0.25 : 0;
  compare(truth.grad, single.grad, got.grad, 0, n * v, floor, what + ": gradient");
  for (size_t k = 0; k * n < truth.statistics.size(); ++k) {
    compare(truth.statistics, single.statistics, got.statistics, k * n, (k + 1) * n, 0.1,
            what + ": statistic " + std::to_string(k));
  }
}

inline void check(const Problem& p, const std::string& what) {
  compare_rows(p, forward_backward<double>(p, false), forward_backward<float>(p, false),
               forward_backward<float>(p, true), what);
}

inline std::string name_of(const Kind& kind, const Target& target, int64_t vocab_size) {
  return "divergence " + std::to_string(kind.divergence) + "(" + std::to_string(kind.param0) +
         ", " + std::to_string(kind.param1) + ") target " + std::to_string(target.kind) +
         (target.live ? " live" : "") + " V " + std::to_string(vocab_size);
}

}  // namespace cases
