// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "expect.h"
#include "opd/opd.h"

namespace {

const std::vector<int64_t> kOffsets = {0, 3, 3, 40, 41};
constexpr int64_t kTokens = 41, kSegments = 4;

opd_segments_t segments(int32_t dtype = OPD_FLOAT64) {
  return {kOffsets.data(), kSegments, kTokens, dtype, nullptr};
}

bool is_refused(opd_status_t status, const char* text) {
  return status == OPD_INVALID_ARGUMENT && std::strstr(opd_last_error(), text) != nullptr;
}

opd_segment_scan_args_t scan_args(const std::vector<double>& values, std::vector<double>* out,
                                  std::vector<double>* scratch) {
  opd_segment_scan_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = segments();
  args.discount = 1.0;
  args.num_steps = INT64_MAX;
  args.stride = 1;
  args.values = values.data();
  args.out = out->data();
  args.scratch = scratch->data();
  return args;
}

// the sum of the definition, in long double
double scanned(const std::vector<double>& values, const opd_segment_scan_args_t& args, int64_t i) {
  int64_t s = 0;
  while (kOffsets[s + 1] <= i) ++s;
  long double sum = 0, factor = 1;
  for (int64_t k = 0; k < args.first_step; ++k) factor *= args.discount;
  for (int64_t k = args.first_step; k - args.first_step < args.num_steps; ++k) {
    const int64_t j = args.prefix ? i - k * args.stride : i + k * args.stride;
    if (j < kOffsets[s] || j >= kOffsets[s + 1]) break;
    sum += factor * values[j];
    factor *= args.discount;
  }
  return static_cast<double>(sum);
}

void test_scan(const std::vector<double>& values) {
  std::vector<double> out(kTokens), scratch(kTokens);
  opd_segment_scan_args_t args = scan_args(values, &out, &scratch);
  for (double discount : {1.0, 0.9, 0.0}) {
    for (int64_t first_step : {0, 1, 4}) {
      for (int64_t num_steps : {int64_t{1}, int64_t{5}, int64_t{30}, INT64_MAX}) {
        for (int64_t stride : {1, 3, 1000}) {
          for (int32_t prefix : {0, 1}) {
            args.discount = discount;
            args.first_step = first_step;
            args.num_steps = num_steps;
            args.stride = stride;
            args.prefix = prefix;
            std::fill(out.begin(), out.end(), std::nan(""));
            std::fill(scratch.begin(), scratch.end(), std::nan(""));
            expect::that(opd_segment_scan_cpu(&args) == OPD_OK, opd_last_error());
            for (int64_t i = 0; i < kTokens; ++i) {
              expect::near(out[i], scanned(values, args, i), 1e-13, "scan");
            }
          }
        }
      }
    }
  }
  args = scan_args(values, &out, &scratch);
  args.scratch = nullptr;
  expect::that(opd_segment_scan_cpu(&args) == OPD_OK, "a whole scan needs no scratch");
  args.num_steps = 2;
  expect::that(is_refused(opd_segment_scan_cpu(&args), "scratch must not be NULL"), "no scratch");
  args.num_steps = 0;
  expect::that(is_refused(opd_segment_scan_cpu(&args), "num_steps must be >= 1"), "no step");
  args = scan_args(values, &out, &scratch);
  args.discount = std::nan("");
  expect::that(is_refused(opd_segment_scan_cpu(&args), "discount must be in [0, 1]"), "discount");
  args = scan_args(values, &out, &scratch);
  args.segments.num_tokens = 40;
  expect::that(is_refused(opd_segment_scan_cpu(&args), "offsets must end at 40"), "end");
  const int64_t decreasing[] = {0, 3, 2, 40, 41};
  args.segments = segments();
  args.segments.offsets = decreasing;
  expect::that(is_refused(opd_segment_scan_cpu(&args), "not decrease, got 2 after 3"), "order");
  args.segments = segments(OPD_BFLOAT16);
  expect::that(is_refused(opd_segment_scan_cpu(&args), "dtype must be OPD_FLOAT32"), "dtype");
  args.struct_size = 8;
  expect::that(opd_segment_scan_cpu(&args) == OPD_INVALID_ARGUMENT, "another version");
}

void test_reduce_and_broadcast(const std::vector<double>& values) {
  std::vector<double> weights(kTokens, 0.5), out(kSegments), spread(kTokens);
  std::vector<int64_t> index(kSegments);
  weights[1] = 0.0;
  opd_segment_reduce_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = segments();
  args.values = values.data();
  args.weights = weights.data();
  args.out = out.data();
  args.index = index.data();
  for (int32_t reduction : {OPD_SUM, OPD_MEAN, OPD_MAX, OPD_MIN}) {
    args.reduction = reduction;
    expect::that(opd_segment_reduce_cpu(&args) == OPD_OK, opd_last_error());
    for (int64_t s = 0; s < kSegments; ++s) {
      long double sum = 0, total = 0;
      int64_t best = -1;
      const double sign = reduction == OPD_MAX ? 1.0 : -1.0;
      for (int64_t i = kOffsets[s]; i < kOffsets[s + 1]; ++i) {
        sum += weights[i] * values[i];
        total += weights[i];
        if (weights[i] != 0 && (best < 0 || sign * values[i] > sign * values[best])) best = i;
      }
      if (reduction == OPD_SUM || reduction == OPD_MEAN) {
        const long double expected = reduction == OPD_SUM ? sum : total == 0 ? 0 : sum / total;
        expect::near(out[s], static_cast<double>(expected), 1e-13, "sum or mean");
      } else {
        expect::that(index[s] == best, "the first token that attains it");
        expect::that(best < 0 ? out[s] == -sign * INFINITY : out[s] == values[best], "extreme");
      }
    }
  }
  args.reduction = 4;
  expect::that(is_refused(opd_segment_reduce_cpu(&args), "opd_reduction_t"), "reduction");

  opd_segment_broadcast_args_t back{};
  back.struct_size = sizeof(back);
  back.segments = segments();
  back.segment_values = out.data();
  back.weights = weights.data();
  back.out = spread.data();
  out = {1.0, std::nan(""), 3.0, 4.0};
  expect::that(opd_segment_broadcast_cpu(&back) == OPD_OK, opd_last_error());
  expect::that(spread[0] == 0.5 && spread[1] == 0.0 && spread[3] == 1.5 && spread[40] == 2.0,
               "weight times the value of the segment");
}

void test_group_statistics() {
  const float values[] = {1, 0, 0, 1, 5, 7, 7, 2}, nothing = std::nanf("");
  const int64_t offsets[] = {0, 4, 5, 5, 8};
  uint8_t mask[] = {1, 1, 1, 1, 1, 1, 1, 0};
  float mean[4], std[4], others[8];
  int64_t count[4];
  std::vector<float> masked(values, values + 8);
  masked[7] = nothing;
  opd_group_statistics_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = {offsets, 4, 8, OPD_FLOAT32, nullptr};
  args.correction = 1;
  args.values = masked.data();
  args.mask = mask;
  args.count = count;
  args.mean = mean;
  args.std = std;
  args.leave_one_out_mean = others;
  expect::that(opd_group_statistics_cpu(&args) == OPD_OK, opd_last_error());
  const float expected_mean[] = {0.5f, 5, 0, 7}, expected_std[] = {0.57735027f, 0, 0, 0};
  const float expected_others[] = {1 / 3.f, 2 / 3.f, 2 / 3.f, 1 / 3.f, 0, 7, 7, 7};
  const int64_t expected_count[] = {4, 1, 0, 2};
  for (int g = 0; g < 4; ++g) {
    expect::that(count[g] == expected_count[g], "count");
    expect::near(mean[g], expected_mean[g], 1e-7, "mean");
    expect::near(std[g], expected_std[g], 1e-7, "std");
  }
  for (int i = 0; i < 8; ++i) expect::near(others[i], expected_others[i], 1e-7, "leave one out");
  args.correction = 2;
  expect::that(is_refused(opd_group_statistics_cpu(&args), "correction must be 0 or 1"), "ddof");
}

}  // namespace

int main() {
  std::mt19937 generator(0);
  std::normal_distribution<double> normal(0.0, 1.0);
  std::vector<double> values(kTokens);
  for (double& value : values) value = normal(generator);
  test_scan(values);
  test_reduce_and_broadcast(values);
  test_group_statistics();
  return expect::report("test_segment_scan");
}
