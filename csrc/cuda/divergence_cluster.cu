// SPDX-License-Identifier: Apache-2.0
#include "divergence_cluster.h"

#include <algorithm>
#include <cstdlib>

#include "divergence_cluster.cuh"
#include "occupancy.h"
#include "vectorized.cuh"

namespace opd {
namespace cuda {
namespace {

constexpr int kFloatsPer16Bytes = 4;

// Calls fn with the functor of the divergence; cross_entropy has none.
template <class Fn>
void visit_component(const opd_divergence_component_t& component, Fn&& fn) {
  visit_divergence(component.divergence, component.param0, component.param1, fn);
}

template <class F>
RowNeeds needs_of(bool with_statistics) {
  RowNeeds needs;
  needs.lse_values = with_statistics ? 6 : 4;
  needs.term_values = with_statistics ? 6 : 2;
  needs.row_sum_values = F::kRowSums;
  needs.again_values = kAgainValues<F>;
  needs.functor_bytes = F::kRowSums > 0 ? static_cast<int>(sizeof(F)) : 0;
  needs.head_bytes = F::kNeedsThreshold ? kClusterHeadBytes : 0;
  return needs;
}

bool is_plain(const opd_logits_t& side) {
  return side.matrix.dtype == OPD_FLOAT32 && side.bias == nullptr && side.softcap == 0.0 &&
         side.scale > 0.0 &&
         is_aligned_16(side.matrix.data) && side.matrix.row_stride % kFloatsPer16Bytes == 0;
}

bool takes_gradient(const opd_divergence_args_t& args) {
  const bool is_float = args.grad.dtype == OPD_FLOAT32;
  if (!is_float && args.grad.dtype != OPD_BFLOAT16 && args.grad.dtype != OPD_FLOAT16) return false;
  if (!is_aligned_16(args.grad.data) || args.grad.row_stride % kFloatsPer16Bytes != 0) return false;
  if (args.grad.data == args.teacher.matrix.data) return false;
  const int64_t in_place = args.student.matrix.row_stride * (is_float ? 1 : 2);
  return args.grad.data != args.student.matrix.data || args.num_tokens <= 1 ||
         args.grad.row_stride == in_place;
}

SideArgs side_args(const opd_logits_t& side) {
  return {static_cast<const float*>(side.matrix.data), side.matrix.row_stride, side.scale,
          static_cast<const float*>(side.temperatures), factor_of(side.scale, side.temperature)};
}

ClusterArgs cluster_args(const opd_divergence_args_t& args) {
  ClusterArgs out{};
  out.student = side_args(args.student), out.teacher = side_args(args.teacher);
  out.num_tokens = args.num_tokens, out.vocab_size = args.vocab_size;
  out.grad_width = args.grad_width;
  out.token_weights = static_cast<const float*>(args.token_weights);
  out.coefficients = static_cast<const float*>(args.components[0].coefficients);
  out.loss = static_cast<float*>(args.loss);
  out.statistics = static_cast<float*>(args.statistics);
  out.token_ids = args.token_ids;
  out.topk_ids = args.topk_ids, out.num_topk = args.num_topk;
  out.grad = args.grad;
  const opd_divergence_component_t& component = args.components[0];
  out.centred = component.divergence == OPD_CONCRETE_SCORE && component.param0 != 0 &&
                component.param1 != 0;
  return out;
}

// Read once: what launches have asked devices about must stay true.
int allowed_blocks() {
  static const int blocks = [] {
    const char* const text = std::getenv("OPD_CLUSTER_BLOCKS");
    const int found = cluster_blocks_of(text);
    OPD_CHECK(found >= 0, "OPD_CLUSTER_BLOCKS must be 0, 1, 2, 4, 8 or 16, got '", text,
              "'; unset it, or set 0 to do without the kernel of clusters");
    return found;
  }();
  return blocks;
}

// Of one kernel, what devices have said.
template <class F, bool kStatistics>
KnownNumbers& known_clusters() {
  static KnownNumbers known;
  return known;
}

template <class F, bool kStatistics>
int64_t resident_clusters_of(const RowPlan& plan, const Device& device) {
  const Shape shape{plan.cluster, plan.threads(), plan.shared_bytes(), plan.cluster};
  return resident_clusters(&forward_grad_cluster_kernel<F, kStatistics>, shape, device,
                           &known_clusters<F, kStatistics>());
}

// The rows' layout and the clusters that the device holds of it; false if it has no room for one.
// A part whose groups of multiprocessors are cut small holds few large clusters, or none: then
// smaller ones take the row, if it fits into them.
template <class F, bool kStatistics>
bool choose_launch(int64_t vocab_size, const Device& device, RowLaunch* best) {
  const RowNeeds needs = needs_of<F>(kStatistics);
  const int64_t shared_bytes = device.shared_bytes_per_block;
  RowPlan plan;
  if (!choose_rows(vocab_size, shared_bytes, allowed_blocks(), needs, &plan)) return false;
  *best = {plan, resident_clusters_of<F, kStatistics>(plan, device)};
  for (int cluster = plan.cluster / 2; cluster >= 1; cluster /= 2) {
    // a larger cluster has more of the next row on chip, which is worth a quarter of the device
    if (4 * best->blocks() >= 3 * device.multiprocessors) break;
    if (!plan_rows(vocab_size, shared_bytes, cluster, needs, &plan)) break;
    const RowLaunch other{plan, resident_clusters_of<F, kStatistics>(plan, device)};
    if (4 * best->blocks() < 3 * other.blocks()) *best = other;
  }
  return best->clusters > 0;
}

}  // namespace

bool cluster_takes(const opd_divergence_args_t& args, const Device& device, RowLaunch* launch) {
  if (allowed_blocks() == 0) return false;
  // the architectures with clusters that this library is built for
  if (device.capability != 90 && device.capability != 100) return false;
  if (args.num_components != 1 || args.target != OPD_TARGET_TEACHER) return false;
  if (!is_plain(args.student) || !is_plain(args.teacher) || !takes_gradient(args)) return false;
  if ((args.statistics != nullptr) != (args.with_statistics != 0)) return false;
  bool fits = false;
  visit_component(args.components[0], [&](auto functor) {
    using F = decltype(functor);
    fits = args.statistics ? choose_launch<F, true>(args.vocab_size, device, launch)
                           : choose_launch<F, false>(args.vocab_size, device, launch);
  });
  return fits;
}

void forward_grad_cluster(const opd_divergence_args_t& args, const RowLaunch& rows, void* stream) {
  const RowPlan& plan = rows.plan;
  const int64_t clusters = std::min(rows.clusters, args.num_tokens);
  const Shape shape{clusters * plan.cluster, plan.threads(), plan.shared_bytes(), plan.cluster};
  ClusterArgs out = cluster_args(args);
  out.plan = plan;
  visit_component(args.components[0], [&](auto functor) {
    using F = decltype(functor);
    out.statistics ? launch(shape, stream, &forward_grad_cluster_kernel<F, true>, out, functor)
                   : launch(shape, stream, &forward_grad_cluster_kernel<F, false>, out, functor);
  });
}

}  // namespace cuda
}  // namespace opd
