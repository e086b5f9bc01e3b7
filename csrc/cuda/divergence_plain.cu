// SPDX-License-Identifier: Apache-2.0
// The row kernels of one divergence each, without options.
#include "divergence_row.cuh"

namespace opd {
namespace cuda {

namespace {

constexpr bool is_plain_id(int id) { return id >= 0 && id < kCrossEntropy; }

constexpr int kThreads = 512;

// two blocks share a multiprocessor where a kernel fits into 64 registers without spilling
constexpr int blocks_of(int id) {
  return id == OPD_PEARSON_CHI2 || id == OPD_NEYMAN_CHI2 || id == OPD_ALPHA_BETA ||
                 id == OPD_SQUARED_HELLINGER || id == OPD_ALPHA
             ? 1
             : 2;
}

template <int kId>
void launch_rows(const Shape& shape, const Call& call, void* stream) {
  if constexpr (is_plain_id(kId)) {
    launch(shape, stream, &divergence_rows<kId, kThreads, blocks_of(kId)>, call);
  }
}

}  // namespace

bool has_plain_kernel(int divergence) { return is_plain_id(divergence); }

void launch_plain(const Call& call, int64_t blocks, void* stream) {
  const Shape shape{blocks, kThreads, shared_bytes_of(call, false, kThreads)};
  switch (call.components[0].divergence) {
#define OPD_LAUNCH(ID, NAME, ...) \
  case ID:                        \
    return launch_rows<ID>(shape, call, stream);
    OPD_DIVERGENCES(OPD_LAUNCH)
#undef OPD_LAUNCH
    default:
      return;
  }
}

}  // namespace cuda
}  // namespace opd
