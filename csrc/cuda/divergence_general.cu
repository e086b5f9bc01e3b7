// SPDX-License-Identifier: Apache-2.0
// The row kernel that takes every option of a divergence.
#include "divergence_row.cuh"

namespace opd {
namespace cuda {

// as many as leave every thread the registers that it needs
constexpr int kThreads = 256;

void launch_general(const Call& call, int64_t blocks, void* stream) {
  // the steps that read no logits are one thread's work
  constexpr unsigned kReads = kLse | kHead | kRowSums | kTerms | kGradient;
  const int threads = call.steps & kReads ? kThreads : kWarp;
  const Shape shape{blocks, threads, shared_bytes_of(call, true, threads)};
  launch(shape, stream, &divergence_rows<-1, kThreads, 1>, call);
}

}  // namespace cuda
}  // namespace opd
