// SPDX-License-Identifier: Apache-2.0
// What the tests of the emulated CUDA kernels share: storage of any dtype at an address of choice,
// and the rule of tests/tolerance.py with the CPU's float32 kernel in the place of eager torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "expect.h"
#include "half.h"
#include "opd/opd.h"

namespace emulated {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline double eps_of(int32_t dtype) {
  return dtype == OPD_BFLOAT16 ? std::ldexp(1.0, -7)
                               : dtype == OPD_FLOAT16 ? std::ldexp(1.0, -10) : std::ldexp(1.0, -23);
}

inline int64_t size_of(int32_t dtype) {
  return dtype == OPD_FLOAT64 ? 8 : dtype == OPD_FLOAT32 ? 4 : 2;
}

// `count` numbers of a dtype, `shift` elements past a 16-byte address.
class Numbers {
 public:
  Numbers(int32_t dtype, int64_t count, int64_t shift = 0)
      : dtype_(dtype), bytes_((count + shift) * size_of(dtype) + 16, 0x5a), shift_(shift) {}
  Numbers(const Numbers& other) = delete;

  void* data() {
    char* const start = bytes_.data();
    return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16 + shift_ * size_of(dtype_);
  }
  double get(int64_t i) {
    switch (dtype_) {
      case OPD_FLOAT64:
        return static_cast<double*>(data())[i];
      case OPD_FLOAT32:
        return static_cast<float*>(data())[i];
      case OPD_BFLOAT16:
        return opd::to_real(static_cast<opd::BFloat16*>(data())[i]);
      default:
        return opd::to_real(static_cast<opd::Float16*>(data())[i]);
    }
  }
  void set(int64_t i, double value) {
    switch (dtype_) {
      case OPD_FLOAT64:
        static_cast<double*>(data())[i] = value;
        break;
      case OPD_FLOAT32:
        static_cast<float*>(data())[i] = static_cast<float>(value);
        break;
      case OPD_BFLOAT16:
        opd::from_real(static_cast<float>(value), static_cast<opd::BFloat16*>(data()) + i);
        break;
      default:
        opd::from_real(static_cast<float>(value), static_cast<opd::Float16*>(data()) + i);
    }
  }

 private:
  int32_t dtype_;
  std::vector<char> bytes_;
  int64_t shift_;
};

// Of the launches from here on: 0 runs threads in order, another seed shuffles them.
inline void shuffle_threads(int seed) {
  setenv("OPD_EMULATION_SEED", std::to_string(seed).c_str(), 1);
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size()) return false;
  return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// err(got) <= 2 err(baseline) + 4 eps max|truth|, and NaN and infinities where the truth has them.
inline void within(const std::vector<double>& got, const std::vector<double>& baseline,
                   const std::vector<double>& truth, double eps, const char* what) {
  double error = 0, allowed = 0, scale = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    if (!std::isfinite(truth[i])) {
      expect::that(got[i] == truth[i] || (std::isnan(got[i]) && std::isnan(truth[i])), what);
      continue;
    }
    expect::that(std::isfinite(got[i]), what);
    error = std::max(error, std::fabs(got[i] - truth[i]));
    allowed = std::max(allowed, std::fabs(baseline[i] - truth[i]));
    scale = std::max(scale, std::fabs(truth[i]));
  }
  expect::near(error, 0, 2 * allowed + 4 * eps * scale, what);
}

}  // namespace emulated
