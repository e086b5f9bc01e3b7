// SPDX-License-Identifier: Apache-2.0
// What is refused of the arguments of sample_tokens, in words, and how its workspace is laid out.
// Nothing that a pointer in them points to is read here, so that it may be memory of a GPU.
#pragma once

#include "check.h"
#include "rows.h"

namespace opd {
namespace sample_tokens {

inline constexpr char kOp[] = "sample_tokens";

// Columns whose sum is kept in the workspace.
inline constexpr int kTileColumns = 512;
static_assert(kTileColumns == kBlock, "a tile of a CPU's is a block");

// What a GPU keeps of a tile. A CPU keeps one double.
struct TileSums {
  double largest;   // of its logits
  double law;       // sum of e^(z - largest)
  double proposal;  // the same of the proposal; then the sum over the row up to the tile's end
};

// Of a row that begins up to 7 columns after the first tile does.
inline constexpr int64_t num_tiles(int64_t vocab_size) {
  return (vocab_size + 7 + kTileColumns - 1) / kTileColumns;
}

inline void check_args(const opd_sample_tokens_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_sizes_of_ids(kOp, args->num_tokens, args->vocab_size);
  check_side(kOp, "logits", args->logits, args->num_tokens);
  // beyond, 1 / proposal_temperature is no float32
  OPD_CHECK(args->proposal_temperature >= 1e-30 && args->proposal_temperature <= 1e30, kOp,
            ": proposal_temperature must be in [1e-30, 1e30], got ", args->proposal_temperature);
  OPD_CHECK(args->num_draws >= 1 && args->num_draws <= OPD_MAX_TOPK, kOp,
            ": num_draws must be in [1, ", int64_t{OPD_MAX_TOPK}, "], got ", args->num_draws);
  if (args->num_tokens == 0) return;
  check_pointers(kOp, "every pointer",
                 {args->uniforms, args->ids, args->weights, args->logprobs, args->lse,
                  args->workspace});
}

}  // namespace sample_tokens
}  // namespace opd
