// SPDX-License-Identifier: Apache-2.0
// Errors inside the core are exceptions; guarded() turns them into a status at the C boundary.
#pragma once

#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>

#include "opd/opd.h"

namespace opd {

class Error : public std::runtime_error {
 public:
  Error(opd_status_t status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  opd_status_t status() const { return status_; }

 private:
  opd_status_t status_;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

#define OPD_CHECK(condition, ...)                                            \
  do {                                                                       \
    if (!(condition)) {                                                      \
      throw ::opd::Error(OPD_INVALID_ARGUMENT, ::opd::concat(__VA_ARGS__)); \
    }                                                                        \
  } while (false)

// Never throws: out of memory, the text is cut.
void set_last_error(const char* message) noexcept;

template <class Fn>
opd_status_t guarded(Fn&& fn) noexcept {
  try {
    fn();
    return OPD_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status();
  } catch (const std::exception& error) {
    set_last_error(error.what());
  } catch (...) {
    set_last_error("opd: an exception of an unknown type");
  }
  return OPD_INTERNAL;
}

// The entry point of an op whose args have a spec: what `check` refuses, then run(), unless there are
// no tokens.
template <class Args, class Run>
opd_status_t guarded_rows(const Args* args, void (*check)(const Args*), Run&& run) noexcept {
  return guarded([&] {
    check(args);
    if (args->spec.num_tokens > 0) run();
  });
}

}  // namespace opd
