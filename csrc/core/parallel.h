// SPDX-License-Identifier: Apache-2.0
// Rows are independent and each has one owner, so results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <exception>
#include <mutex>

#include "opd/opd.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace opd {

inline void default_parallel_for(int64_t num_rows, opd_rows_fn body, void* context) {
#if defined(_OPENMP)
#pragma omp parallel if (num_rows > 1)
  {
    const int64_t threads = omp_get_num_threads();
    const int64_t thread = omp_get_thread_num();
    body(context, num_rows * thread / threads, num_rows * (thread + 1) / threads);
  }
#else
  body(context, 0, num_rows);
#endif
}

// fn(row) for each row; the first exception of any thread is rethrown in the caller's.
template <class Fn>
void parallel_rows(opd_parallel_for_fn parallel_for, int64_t num_rows, Fn&& fn) {
  if (num_rows == 0) return;
  struct Context {
    Fn& fn;
    std::exception_ptr error;
    std::mutex mutex;
  } context{fn, nullptr, {}};
  const opd_rows_fn body = [](void* opaque, int64_t begin, int64_t end) {
    Context& self = *static_cast<Context*>(opaque);
    try {
      for (int64_t row = begin; row < end; ++row) self.fn(row);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(self.mutex);
      if (!self.error) self.error = std::current_exception();
    }
  };
  (parallel_for ? parallel_for : &default_parallel_for)(num_rows, body, &context);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace opd
