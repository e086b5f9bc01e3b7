// SPDX-License-Identifier: Apache-2.0
// The row kernels of CUDA as torch ops of the namespace opd_cuda, whose schemas are those of opd
// (opd_kernels/_registration.py). Compiled with OPD_CUDA_EMULATED, the kernels are those of
// tests/csrc/emulation and take CPU tensors.
#include "row_ops.h"

#if defined(OPD_CUDA_EMULATED)
#define OPD_CUDA_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define OPD_CUDA_KEY CUDA
#endif

namespace opd::torch_ops {
namespace {

#if defined(OPD_CUDA_EMULATED)

struct Place {
  explicit Place(const Tensor&) {}
  void* stream = nullptr;
};

#else

void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream(device_index, &stream) == AOTI_TORCH_SUCCESS,
          "opd: torch has no current stream on the tensors' device");
  return stream;
}

// The device of a tensor, current as long as this lives, and torch's current stream there.
struct Place {
  explicit Place(const Tensor& tensor)
      : guard(tensor.get_device_index()), stream(current_stream(tensor.get_device_index())) {}
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
};

#endif

struct Cuda : Place {
  static constexpr bool kTakesNarrowGradients = true;
  using Place::Place;
#define OPD_CALL(NAME)                              \
  template <class... Arguments>                     \
  void NAME(Arguments... arguments) const {         \
    check(opd_##NAME##_cuda(arguments..., stream)); \
  }
  OPD_ENTRY_POINTS(OPD_CALL)
#undef OPD_CALL
};

}  // namespace
}  // namespace opd::torch_ops

STABLE_TORCH_LIBRARY_IMPL(opd_cuda, OPD_CUDA_KEY, m) {
  opd::torch_ops::implement_row_ops<opd::torch_ops::Cuda>(m);
}

// The GPUs that the kernels were compiled for, in the words of CMake's CUDA_ARCHITECTURES.
extern "C" OPD_API const char* opd_cuda_architectures(void) { return OPD_CUDA_ARCHITECTURES; }
