// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "check.h"

namespace opd {
namespace {
thread_local char last_error[1024] = "";
}

void set_last_error(const char* message) noexcept {
  std::snprintf(last_error, sizeof(last_error), "%s", message);
}

}  // namespace opd

const char* opd_last_error(void) { return opd::last_error; }

const char* opd_version(void) { return OPD_VERSION; }
