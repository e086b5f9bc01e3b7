// SPDX-License-Identifier: Apache-2.0
// The functors of opd/divergences.h on a GPU: one that is known when a kernel is compiled, or those
// of a call's components, which a block makes once and keeps in shared memory.
#pragma once

#include <algorithm>
#include <new>
#include <type_traits>

#include "divergence_call.h"
#include "divergence_state.h"

namespace opd {
namespace cuda {

template <int kId>
__device__ __forceinline__ auto functor_of(double param0, double param1) {
  (void)param0, (void)param1;
#define OPD_FUNCTOR(ID, NAME, ...) \
  if constexpr (kId == ID) {       \
    return __VA_ARGS__;            \
  } else
  OPD_DIVERGENCES(OPD_FUNCTOR) { return 0; }
#undef OPD_FUNCTOR
}

// Calls fn with the functor of a component, as its parameters alone make it.
template <int kId, class Fn>
__device__ __forceinline__ void visit(const opd_divergence_component_t& component, Fn&& fn) {
  if constexpr (kId >= 0) {
    fn(functor_of<kId>(component.param0, component.param1));
  } else {
    visit_divergence(component.divergence, component.param0, component.param1, fn);
  }
}

// ... as the sums in its state make it.
template <class F>
__device__ __forceinline__ F with_sums(F functor, const double* state) {
  if constexpr (F::kNeedsThreshold) functor = functor.with_threshold(state[kThreshold]);
  if constexpr (F::kRowSums > 0) functor = functor.with_row_sums(state + kRowSum);
  (void)state;
  return functor;
}

template <class F>
__device__ __forceinline__ bool uses_textbook(const F& functor) {
  if constexpr (F::kHasTextbook) return functor.barely_overlaps();
  (void)functor;
  return false;
}

template <class F>
__device__ __forceinline__ float dterm_of(const F& functor, const Entry<float>& e, bool textbook) {
  if constexpr (F::kHasTextbook) {
    if (textbook) return functor.dterm_textbook(e);
  }
  (void)textbook;
  return functor.dterm(e);
}

// room for any functor, in doubles
#define OPD_SIZE(ID, NAME, ...) sizeof(decltype(__VA_ARGS__)),
constexpr int functor_size() {
  constexpr double param0 = 0.5, param1 = 0.5;
  (void)param0, (void)param1;
  size_t most = 0;
  for (size_t size : {OPD_DIVERGENCES(OPD_SIZE) size_t{0}}) most = size > most ? size : most;
  return static_cast<int>((most + sizeof(double) - 1) / sizeof(double));
}
#undef OPD_SIZE
constexpr int kFunctorSize = functor_size();

// Shared memory of a block that works on a row.
struct SharedRow {
  double* state;     // kStateSize + kComponentState for each component
  double* scratch;   // 32, of the reductions
  double* functors;  // kFunctorSize for each component
  float* lanes;      // of each thread and component; the head's bins before
};

constexpr int kMaxState = kStateSize + OPD_MAX_COMPONENTS * kComponentState;
constexpr int kScratch = 32;
// of the search for a head, which takes two reads of most rows then
constexpr int kHeadBinBits = 13, kHeadBins = 1 << kHeadBinBits;

inline int64_t shared_bytes_of(const Call& call, bool is_general, int threads) {
  const int64_t doubles = kMaxState + kScratch;
  int64_t words = is_general ? int64_t{call.num_components} * threads : 0;
  for (int j = 0; j < call.num_components; ++j) {
    if (needs_threshold(call.components[j])) words = std::max<int64_t>(words, 2 * kHeadBins);
  }
  if (words == 0) return doubles * 8;
  return (doubles + OPD_MAX_COMPONENTS * kFunctorSize) * 8 + words * 4;
}

__device__ __forceinline__ SharedRow shared_row() {
  double* const state = reinterpret_cast<double*>(shared_memory());
  double* const scratch = state + kMaxState;
  double* const functors = scratch + kScratch;
  return {state, scratch, functors,
          reinterpret_cast<float*>(functors + OPD_MAX_COMPONENTS * kFunctorSize)};
}

template <class F>
__device__ __forceinline__ const F& kept_functor(const SharedRow& shared, int j) {
  return *reinterpret_cast<const F*>(shared.functors + j * kFunctorSize);
}

// One thread per component; the caller's barrier comes before anybody uses them.
__device__ __forceinline__ void keep_functors(const Call& call, const SharedRow& shared) {
  const int j = static_cast<int>(threadIdx.x);
  if (j >= call.num_components) return;
  const double* const state = shared.state + kStateSize + j * kComponentState;
  visit<-1>(call.components[j], [&](auto functor) {
    new (shared.functors + j * kFunctorSize) decltype(functor)(with_sums(functor, state));
  });
}

}  // namespace cuda
}  // namespace opd
