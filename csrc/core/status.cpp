// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "check.h"

namespace opd {
namespace {
thread_local std::string last_error;
}

void set_last_error(const std::string& message) { last_error = message; }

}  // namespace opd

const char* opd_last_error(void) { return opd::last_error.c_str(); }

const char* opd_version(void) { return OPD_VERSION; }
