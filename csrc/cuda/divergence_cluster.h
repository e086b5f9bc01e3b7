// SPDX-License-Identifier: Apache-2.0
// Stands in for the one-read kernel of sm_90: it takes no call.
#pragma once

#include "launch.h"

namespace opd {
namespace cuda {

inline bool cluster_takes(const opd_divergence_args_t&, const Device&) { return false; }
inline void forward_grad_cluster(const opd_divergence_args_t&, const Device&, void*) {}

}  // namespace cuda
}  // namespace opd
