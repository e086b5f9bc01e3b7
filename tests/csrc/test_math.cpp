// SPDX-License-Identifier: Apache-2.0
// Accuracy of the vectorised elementary functions against long double, and their special values.
#include "opd/math.h"

#include <initializer_list>

#include "expect.h"
#include "half.h"

namespace {

const float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

void test_exp() {
  double worst = 0.0;
  for (double x = -87.0; x < 87.0; x += 0.000937) {
    const float argument = static_cast<float>(x);
    const long double truth = std::exp(static_cast<long double>(argument));
    worst = std::fmax(worst, std::fabs(static_cast<double>((opd::exp(argument) - truth) / truth)));
  }
  expect::that(worst < 1.5e-7, "exp: relative error below 1.5e-7 on [-87, 87]");
  expect::that(opd::exp(-kInf) == 0.0f, "exp(-inf) is exactly 0");
  expect::that(opd::exp(-88.0f) == 0.0f && opd::exp(-1e30f) == 0.0f, "exp underflows to exactly 0");
  expect::that(opd::exp(0.0f) == 1.0f, "exp(0) is exactly 1");
  expect::that(opd::exp(kInf) == kInf && opd::exp(89.0f) == kInf, "exp overflows to inf");
  expect::that(std::isnan(opd::exp(kNan)), "exp(NaN) is NaN");
}

float expm1_of(float x) { return opd::exp_pair_nonpositive(x).expm1; }

void test_difference() {
  float lost;
  const float d = opd::difference(10000.1f, 0.3f, &lost);
  const double exact = static_cast<double>(10000.1f) - static_cast<double>(0.3f);
  expect::near(static_cast<double>(d) + static_cast<double>(lost), exact, 0.0,
               "a difference and what it lost are exact together");
  expect::that(opd::difference(kInf, 1.0f, &lost) == kInf && lost == 0.0f, "inf loses nothing");
}

void test_expm1() {
  double worst = 0.0;
  for (double x = 1e-8; x < 60.0; x *= 1.0007) {
    const float argument = static_cast<float>(-x);
    const long double truth = std::expm1(static_cast<long double>(argument));
    const double error = static_cast<double>((expm1_of(argument) - truth) / truth);
    worst = std::fmax(worst, std::fabs(error));
  }
  expect::that(worst < 2.5e-7, "expm1: relative error below 2.5e-7 for x in [-60, -1e-8]");
  expect::that(expm1_of(-kInf) == -1.0f, "expm1(-inf) is exactly -1");
  expect::that(expm1_of(0.0f) == 0.0f, "expm1(0) is exactly 0");
  expect::that(std::isnan(expm1_of(kNan)), "expm1(NaN) is NaN");
}

void test_log_mix() {
  double worst = 0.0;
  for (double keep : {1e-12, 1e-4, 0.1, 0.5, 0.9, 0.9999}) {
    for (double x = 1e-6; x < 90.0; x *= 1.003) {
      const opd::ExpPair<float> pair = opd::exp_pair_nonpositive(static_cast<float>(-x));
      const long double weight = 1.0L - keep;
      const long double em1 = std::expm1(-static_cast<long double>(static_cast<float>(x)));
      const long double truth = x < 1.0 ? std::log1p(weight * em1)
                                        : std::log(keep + weight * std::exp(-(long double)(float)x));
      const float got = opd::log_mix(pair, static_cast<float>(keep), static_cast<float>(weight));
      worst = std::fmax(worst, static_cast<double>(std::fabs((got - truth) / truth)));
    }
  }
  expect::that(worst < 4e-7, "log_mix: relative error below 4e-7, also for tiny weights");
  expect::near(opd::log_mix(opd::exp_pair_nonpositive(-kInf), 1e-9f, 1.0f), std::log(1e-9), 2e-6,
               "log_mix at q = 0 with a weight that rounds to 1");
  expect::that(opd::log_mix(opd::exp_pair_nonpositive(0.0f), 0.3f, 0.7f) == 0.0f,
               "log_mix(0) is exactly 0");
  expect::that(std::isnan(opd::log_mix(opd::exp_pair_nonpositive(kNan), 0.3f, 0.7f)),
               "log_mix(NaN) is NaN");
}

void test_bregman() {
  double worst_near = 0.0;
  for (double x = 1e-6; x < 80.0; x *= 1.003) {
    for (double sign : {-1.0, 1.0}) {
      const float argument = static_cast<float>(sign * x);
      const long double truth = std::expm1(static_cast<long double>(argument)) - argument;
      const float b = static_cast<float>(std::exp(static_cast<long double>(argument)));
      const double error = static_cast<double>((opd::bregman(1.0f, b, argument) - truth) / truth);
      if (truth < 1e30L) worst_near = std::fmax(worst_near, std::fabs(error));
    }
  }
  expect::that(worst_near < 1e-6, "bregman: relative error below 1e-6 from |x| = 1e-6 on");
  expect::that(opd::bregman(0.0f, 0.25f, kInf) == 0.25f, "bregman(0, b, inf) is b");
  expect::that(opd::bregman(0.25f, 0.0f, -kInf) == kInf, "bregman(a, 0, -inf) is inf");
  for (double x : {-0.6, -0.49, -1e-3, 1e-9, 0.3, 0.51}) {
    const long double truth = std::expm1(static_cast<long double>(x)) - x;
    const double got = opd::bregman(1.0, std::exp(x), x);
    expect::near(got / static_cast<double>(truth), 1.0, x > -1e-2 && x < 1e-2 ? 1e-6 : 1e-14,
                 "bregman in float64");
  }
}

void test_half() {
  // every float16 pattern goes to float32 and back unchanged, NaN to NaN
  bool round_trip = true;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    opd::Float16 half{static_cast<uint16_t>(bits)}, back{0};
    const float value = opd::to_real(half);
    opd::from_real(value, &back);
    round_trip &= std::isnan(value) ? (back.bits & 0x7fff) > 0x7c00 : back.bits == half.bits;
  }
  expect::that(round_trip, "float16 round trip over all patterns");
  expect::that(opd::to_real(opd::Float16{0x3c00}) == 1.0f, "float16 1.0");
  expect::that(opd::to_real(opd::Float16{0x0001}) == std::ldexp(1.0f, -24), "smallest float16");
  opd::Float16 half{0};
  opd::from_real(65520.0f, &half);
  expect::that(half.bits == 0x7c00, "65520 rounds to float16 inf");
  opd::from_real(65519.0f, &half);
  expect::that(half.bits == 0x7bff, "65519 rounds to the largest float16");
  opd::from_real(1.0f + std::ldexp(1.0f, -11), &half);
  expect::that(half.bits == 0x3c00, "float16 ties go to even");
  opd::BFloat16 brain{0};
  opd::from_real(1.0f + std::ldexp(3.0f, -8), &brain);
  expect::that(brain.bits == 0x3f82, "bfloat16 ties go to even");
  opd::from_real(kNan, &brain);
  expect::that(std::isnan(opd::to_real(brain)), "bfloat16 NaN stays NaN");
}

}  // namespace

int main() {
  test_exp();
  test_expm1();
  test_difference();
  test_log_mix();
  test_bregman();
  test_half();
  return expect::report("test_math");
}
