// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdio>

namespace expect {

inline int failures = 0;

inline void that(bool condition, const char* what) {
  if (!condition) {
    std::printf("FAILED: %s\n", what);
    ++failures;
  }
}

inline void near(double got, double expected, double tolerance, const char* what) {
  if (!(std::fabs(got - expected) <= tolerance)) {
    std::printf("FAILED: %s: expected %.12g within %.3g, got %.12g\n", what, expected, tolerance,
                got);
    ++failures;
  }
}

inline int report(const char* program) {
  std::printf("%s: %s (%d failure(s))\n", program, failures ? "FAILED" : "ok", failures);
  return failures ? 1 : 0;
}

}  // namespace expect
