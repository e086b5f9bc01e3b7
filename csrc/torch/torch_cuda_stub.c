/* SPDX-License-Identifier: Apache-2.0 */
/* In the place of libtorch_cuda.so where _C_cuda.so is linked against a torch without CUDA: what it
 * takes from there. Never loaded: a torch with CUDA has loaded its own under the same name. */
int aoti_torch_get_current_cuda_stream(int device_index, void** stream) {
  (void)device_index;
  (void)stream;
  return 1;
}
