// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of the segment_scan family, emulated, against the CPU's in float64.
#include <memory>
#include <random>

#include "emulated.h"

namespace {

using emulated::kInf;
using emulated::kNaN;
using emulated::Numbers;

// more than one tile of a scan, empty segments, one token
const std::vector<std::vector<int64_t>> kPacks = {
    {}, {0}, {0, 0, 0}, {1}, {3, 0, 0, 1, 20, 1, 11, 0}, {127, 128, 129, 511, 512, 513, 1},
    {2000, 0, 2, 1100},
};

struct Pack {
  std::vector<int64_t> offsets = {0};
  std::vector<double> values;

  explicit Pack(const std::vector<int64_t>& lengths) {
    for (int64_t length : lengths) offsets.push_back(offsets.back() + length);
    std::mt19937 generator(11);
    std::normal_distribution<float> normal(0.5f, 1.0f);
    for (int64_t i = 0; i < offsets.back(); ++i) values.push_back(normal(generator));
  }
  int64_t num_segments() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t num_tokens() const { return offsets.back(); }
  opd_segments_t segments(int32_t dtype) const {
    return {offsets.data(), num_segments(), static_cast<int64_t>(values.size()), dtype, nullptr};
  }
};

Numbers* numbers_of(const std::vector<double>& values, int32_t dtype) {
  Numbers* const numbers = new Numbers(dtype, static_cast<int64_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) numbers->set(static_cast<int64_t>(i), values[i]);
  return numbers;
}

std::vector<double> list_of(Numbers& numbers, int64_t count) {
  std::vector<double> list;
  for (int64_t i = 0; i < count; ++i) list.push_back(numbers.get(i));
  return list;
}

enum Device { kCpu, kCuda };
using Output = std::vector<std::vector<double>>;

// fn(dtype, device) -> Output: float32 by the rule, float64 to 1e-12, the same bits in any order.
template <class Fn>
void check(const char* what, Fn&& fn) {
  const Output truth = fn(OPD_FLOAT64, kCpu), baseline = fn(OPD_FLOAT32, kCpu);
  Output runs[2][2];
  for (int seed : {0, 7}) {
    emulated::shuffle_threads(seed);
    runs[seed == 7][0] = fn(OPD_FLOAT32, kCuda);
    runs[seed == 7][1] = fn(OPD_FLOAT64, kCuda);
  }
  for (size_t i = 0; i < truth.size(); ++i) {
    emulated::within(runs[0][0][i], baseline[i], truth[i], emulated::eps_of(OPD_FLOAT32), what);
    emulated::within(runs[0][1][i], truth[i], truth[i], 2e-13, what);
    for (int k : {0, 1}) {
      expect::that(emulated::same(runs[0][k][i], runs[1][k][i]),
                   "the order of threads changes no bit");
    }
  }
}

struct Scan {
  const char* name;
  double discount = 1.0;
  int64_t first_step = 0, num_steps = INT64_MAX, stride = 1;
  int32_t prefix = 0;
};

const Scan kScans[] = {
    {"reward to go"},
    {"discounted", 0.95},
    {"barely discounted", 0.9999},
    {"strongly discounted", 0.125},
    {"no future", 0.0},
    {"one step", 1.0, 0, 1},
    {"k-step", 0.9, 0, 5},
    {"a wide window", 0.99, 0, 65},
    {"a wider window", 0.999, 0, 700},
    {"an undiscounted window", 1.0, 0, 100},
    {"all but one", 0.9, 0, 512},
    {"after itself", 0.9, 1},
    {"bootstrap", 0.9, 5, 1},
    {"strided", 0.9, 0, INT64_MAX, 3},
    {"a long stride", 1.0, 0, INT64_MAX, 127},
    {"a longer stride", 1.0, 0, INT64_MAX, 128},
    {"a strided window", 0.5, 2, 3, 2},
    {"a wide strided window", 0.99, 2, 70, 3},
    {"prefix", 1.0, 0, INT64_MAX, 1, 1},
    {"exclusive prefix", 1.0, 1, INT64_MAX, 1, 1},
    {"a prefix window", 0.9, 0, 90, 2, 1},
    {"beyond", 1.0, int64_t(1) << 40, int64_t(1) << 40, int64_t(1) << 40},
};

std::vector<double> scan(const Pack& pack, const Scan& s, int32_t dtype, Device device) {
  const std::unique_ptr<Numbers> values(numbers_of(pack.values, dtype));
  const int64_t count = static_cast<int64_t>(pack.values.size());
  Numbers out(dtype, count);
  std::vector<double> scratch(count, kNaN);
  opd_segment_scan_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = pack.segments(dtype);
  args.discount = s.discount;
  args.first_step = s.first_step;
  args.num_steps = s.num_steps;
  args.stride = s.stride;
  args.prefix = s.prefix;
  args.values = values->data();
  args.out = out.data();
  args.scratch = s.num_steps == INT64_MAX ? nullptr : scratch.data();
  const opd_status_t status =
      device == kCpu ? opd_segment_scan_cpu(&args) : opd_segment_scan_cuda(&args, nullptr);
  expect::that(status == OPD_OK, opd_last_error());
  return list_of(out, count);
}

void check_scans() {
  for (const auto& lengths : kPacks) {
    const Pack pack(lengths);
    for (const Scan& s : kScans) {
      check(s.name, [&](int32_t dtype, Device device) {
        return Output{scan(pack, s, dtype, device)};
      });
    }
  }
}

// Each segment as in a pack of its own, bit by bit.
void check_alone() {
  const Pack pack(kPacks.back());
  for (const Scan& s : kScans) {
    const std::vector<double> all = scan(pack, s, OPD_FLOAT32, kCuda);
    for (int64_t i = 0; i < pack.num_segments(); ++i) {
      const auto begin = pack.offsets[i], end = pack.offsets[i + 1];
      Pack alone({end - begin});
      alone.values.assign(pack.values.begin() + begin, pack.values.begin() + end);
      const std::vector<double> part(all.begin() + begin, all.begin() + end);
      expect::that(emulated::same(scan(alone, s, OPD_FLOAT32, kCuda), part), "a segment by itself");
    }
  }
}

void check_bad_values() {
  Pack pack({700, 1200, 3});
  for (const double bad : {double(kNaN), double(kInf), -double(kInf)}) {
    pack.values[1500] = bad;
    for (const Scan& s : kScans) {
      const auto got = scan(pack, s, OPD_FLOAT32, kCuda), truth = scan(pack, s, OPD_FLOAT64, kCpu);
      for (size_t i = 0; i < got.size(); ++i) {
        expect::that(std::isnan(got[i]) == std::isnan(truth[i]) &&
                         std::isinf(got[i]) == std::isinf(truth[i]),
                     "a bad value reaches those that sum it");
      }
    }
  }
  // an infinity whose factor underflows is still one
  Pack end({1500});
  std::fill(end.values.begin(), end.values.end(), 0.0);
  end.values.back() = kInf;
  for (const Scan& s : {Scan{"", 0.5}, Scan{"", 0.5, 0, 1499}, Scan{"", 1e-300}}) {
    const auto got = scan(end, s, OPD_FLOAT32, kCuda);
    expect::that(got[1] == kInf && got[1498] == kInf, "an infinity stays one");
  }
}

std::vector<double> some_weights(size_t count) {
  std::vector<double> weights;
  for (size_t i = 0; i < count; ++i) weights.push_back(i % 3 == 1 ? 0.0 : 0.25f * float(i % 5 + 1));
  return weights;
}

Output reduce(const Pack& pack, bool is_weighted, int32_t reduction, int32_t dtype, Device device) {
  const std::unique_ptr<Numbers> values(numbers_of(pack.values, dtype));
  const std::unique_ptr<Numbers> weights(numbers_of(some_weights(pack.values.size()), dtype));
  Numbers out(dtype, pack.num_segments());
  std::vector<int64_t> index(pack.num_segments(), -7);
  opd_segment_reduce_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = pack.segments(dtype);
  args.reduction = reduction;
  args.values = values->data();
  args.weights = is_weighted ? weights->data() : nullptr;
  args.out = out.data();
  args.index = index.data();
  const opd_status_t status =
      device == kCpu ? opd_segment_reduce_cpu(&args) : opd_segment_reduce_cuda(&args, nullptr);
  expect::that(status == OPD_OK, opd_last_error());
  return {list_of(out, pack.num_segments()), {index.begin(), index.end()}};
}

void check_reductions() {
  for (const auto& lengths : kPacks) {
    for (const bool is_weighted : {false, true}) {
      for (int32_t reduction : {OPD_SUM, OPD_MEAN, OPD_MAX, OPD_MIN}) {
        Pack pack(lengths);
        check("reduce", [&](int32_t dtype, Device device) {
          return reduce(pack, is_weighted, reduction, dtype, device);
        });
        // ties, infinities, and a NaN of weight 0 and one that counts
        for (size_t i = 0; i < pack.values.size(); ++i) pack.values[i] = double(i * 7 % 4);
        for (size_t at : {4, 25, 130}) {
          if (at < pack.values.size()) pack.values[at] = at == 25 ? -kInf : kNaN;
        }
        if (pack.values.size() > 400) pack.values[399] = kNaN, pack.values[300] = kInf;
        check("reduce at the edges", [&](int32_t dtype, Device device) {
          return reduce(pack, is_weighted, reduction, dtype, device);
        });
      }
    }
  }
  Pack lowest({5, 300});
  std::fill(lowest.values.begin(), lowest.values.end(), -kInf);
  check("nothing but the lowest", [&](int32_t dtype, Device device) {
    return reduce(lowest, true, OPD_MAX, dtype, device);
  });
}

void check_broadcast() {
  for (const auto& lengths : kPacks) {
    for (const bool is_weighted : {false, true}) {
      const Pack pack(lengths);
      check("broadcast", [&](int32_t dtype, Device device) {
        std::vector<double> given;
        for (int64_t s = 0; s < pack.num_segments(); ++s) given.push_back(s == 1 ? kNaN : 1.5 * s);
        const std::unique_ptr<Numbers> values(numbers_of(given, dtype));
        const std::unique_ptr<Numbers> weights(numbers_of(some_weights(pack.values.size()), dtype));
        Numbers out(dtype, pack.num_tokens());
        opd_segment_broadcast_args_t args{};
        args.struct_size = sizeof(args);
        args.segments = pack.segments(dtype);
        args.segment_values = pack.num_tokens() ? values->data() : nullptr;
        args.weights = is_weighted ? weights->data() : nullptr;
        args.out = out.data();
        const opd_status_t status = device == kCpu ? opd_segment_broadcast_cpu(&args)
                                                   : opd_segment_broadcast_cuda(&args, nullptr);
        expect::that(status == OPD_OK, opd_last_error());
        return Output{list_of(out, pack.num_tokens())};
      });
    }
  }
}

Output statistics(const Pack& pack, bool is_masked, int32_t correction, int32_t dtype,
                  Device device) {
  const std::unique_ptr<Numbers> values(numbers_of(pack.values, dtype));
  std::vector<uint8_t> mask(pack.values.size());
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 ? 2 : 0;
  const int64_t G = pack.num_segments(), N = static_cast<int64_t>(pack.values.size());
  std::vector<int64_t> count(G);
  Numbers mean(dtype, G), std(dtype, G), others(dtype, N);
  opd_group_statistics_args_t args{};
  args.struct_size = sizeof(args);
  args.segments = pack.segments(dtype);
  args.correction = correction;
  args.values = values->data();
  args.mask = is_masked ? mask.data() : nullptr;
  args.count = count.data();
  args.mean = mean.data();
  args.std = std.data();
  args.leave_one_out_mean = others.data();
  const opd_status_t status = device == kCpu ? opd_group_statistics_cpu(&args)
                                             : opd_group_statistics_cuda(&args, nullptr);
  expect::that(status == OPD_OK, opd_last_error());
  return {{count.begin(), count.end()}, list_of(mean, G), list_of(std, G), list_of(others, N)};
}

void check_groups() {
  for (const auto& lengths : kPacks) {
    for (const bool is_masked : {false, true}) {
      for (int32_t correction : {0, 1}) {
        Pack pack(lengths);
        const auto call = [&](int32_t dtype, Device device) {
          return statistics(pack, is_masked, correction, dtype, device);
        };
        check("group statistics", call);
        for (size_t at : {5, 150}) {
          if (at < pack.values.size()) pack.values[at] = at == 5 ? kNaN : -kInf;
        }
        check("group statistics with members that are not finite", call);
      }
    }
  }
  Pack equal({1, 40, 700});
  std::fill(equal.values.begin(), equal.values.end(), 0.1f);
  for (int32_t dtype : {OPD_FLOAT32, OPD_FLOAT64}) {
    const Output got = statistics(equal, false, 1, dtype, kCuda);
    expect::that(got[2] == std::vector<double>(3, 0.0), "equal members have no spread at all");
    expect::that(got[1] == std::vector<double>(3, 0.1f), "equal members have their value as mean");
  }
}

// Wrong offsets are the caller's error on a GPU, but nothing outside is read or written.
void check_wrong_offsets() {
  constexpr int64_t kRoom = 64, kCount = 20;
  for (const std::vector<int64_t>& offsets : std::vector<std::vector<int64_t>>{
           {-5, 99, 3}, {4, 2, 0}, {0, 3, 2}, {9, 9, 9}, {19, 0, 20}}) {
    std::vector<float> buffer(kCount + 2 * kRoom, 77.0f), values(kCount + 2 * kRoom, 77.0f);
    std::vector<double> scratch(kCount + 2 * kRoom, 77.0);
    opd_segment_scan_args_t args{};
    args.struct_size = sizeof(args);
    args.segments = {offsets.data(), 2, kCount, OPD_FLOAT32, nullptr};
    args.discount = 0.5;
    args.num_steps = 3;
    args.stride = 2;
    args.values = values.data() + kRoom;
    args.out = buffer.data() + kRoom;
    args.scratch = scratch.data() + kRoom;
    const auto check_guards = [&] {
      for (int64_t i = 0; i < kRoom; ++i) {
        const float after = buffer[buffer.size() - 1 - i];
        expect::that(buffer[i] == 77.0f && after == 77.0f, "a write outside");
      }
    };
    expect::that(opd_segment_scan_cuda(&args, nullptr) == OPD_OK, opd_last_error());
    check_guards();
    opd_segment_broadcast_args_t spread{};
    spread.struct_size = sizeof(spread);
    spread.segments = args.segments;
    const float given[2] = {1.0f, 2.0f};
    spread.segment_values = given;
    spread.out = args.out;
    expect::that(opd_segment_broadcast_cuda(&spread, nullptr) == OPD_OK, opd_last_error());
    check_guards();
  }
}

void check_refused() {
  opd_segment_scan_args_t args{};
  args.struct_size = sizeof(args);
  const int64_t offsets[2] = {0, 0};
  args.segments = {offsets, 1, 0, OPD_FLOAT32, nullptr};
  args.discount = 1.5;
  expect::that(opd_segment_scan_cuda(&args, nullptr) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), "discount must be in [0, 1], got 1.5"),
               "what the CPU refuses is refused");
}

}  // namespace

int main() {
  check_scans();
  check_alone();
  check_bad_values();
  check_reductions();
  check_broadcast();
  check_groups();
  check_wrong_offsets();
  check_refused();
  return expect::report("test_cuda_segment_scan");
}
