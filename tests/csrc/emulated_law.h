// SPDX-License-Identifier: Apache-2.0
// What the tests of the emulated kernels of one law share: its bias and temperatures, where a gradient
// goes, and what the entry points refuse.
#pragma once

#include "emulated.h"

namespace emulated {

// Bias and temperatures, of numbers that float32 has.
struct Bend {
  template <class Draw>
  Bend(int32_t real, int64_t num_tokens, int64_t vocab_size, Draw&& draw)
      : bias(real, vocab_size, 1), temperatures(real, num_tokens) {
    Numbers narrow(OPD_FLOAT32, 1);
    for (int64_t v = 0; v < vocab_size; ++v) {
      narrow.set(0, draw());
      bias.set(v, narrow.get(0));
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      narrow.set(0, 0.5 + 0.3 * (t % 7));
      temperatures.set(t, narrow.get(0));
    }
  }
  // The side that a case makes of logits in `dtype`.
  template <class Case>
  opd_logits_t side(const Case& c, Numbers& logits, int32_t dtype) {
    return {{logits.data(), c.row_stride, dtype},
            c.bias ? bias.data() : nullptr,
            c.scale,
            c.softcap,
            c.temperature,
            c.temperatures ? temperatures.data() : nullptr};
  }

  Numbers bias, temperatures;
};

// A gradient as wide as the rows of a case, in memory of its own or in the place of the logits: there
// a narrower one has the first half of each row.
class Gradient {
 public:
  template <class Case>
  Gradient(const Case& c, int32_t dtype, int32_t grad_dtype, bool in_place, Numbers& logits)
      : num_tokens_(c.num_tokens), vocab_size_(c.vocab_size), width_(c.row_stride),
        dtype_(grad_dtype), apart_(grad_dtype, c.num_tokens * c.row_stride, c.shift + 1),
        at_(in_place ? logits.data() : apart_.data()),
        stride_(in_place && grad_dtype != dtype ? 2 * width_ : width_) {}

  opd_matrix_t matrix() const { return {at_, stride_, dtype_}; }
  int64_t width() const { return width_; }

  // The columns that count, row after row; the others are zero, and so are rows without a gradient.
  template <class IsZero>
  std::vector<double> read(IsZero&& is_zero) {
    std::vector<double> values;
    for (int64_t t = 0; t < num_tokens_; ++t) {
      if (at_ != apart_.data()) {
        std::memcpy(static_cast<char*>(apart_.data()) + t * width_ * size_of(dtype_),
                    static_cast<char*>(at_) + t * stride_ * size_of(dtype_),
                    width_ * size_of(dtype_));
      }
      for (int64_t v = 0; v < width_; ++v) {
        const double value = apart_.get(t * width_ + v);
        if (v >= vocab_size_ || is_zero(t)) {
          expect::that(value == 0.0, "zero where nothing has a gradient");
        }
        if (v < vocab_size_) values.push_back(value);
      }
    }
    return values;
  }

 private:
  int64_t num_tokens_, vocab_size_, width_;
  int32_t dtype_;
  Numbers apart_;
  void* at_;
  int64_t stride_;
};

// What is refused of a call that is right, of two rows of 3 float32 logits with a stride of 4; `bwd` has
// all but its spec and its gradient's place.
template <class Fwd, class Bwd>
void check_refusals(Fwd fwd, Bwd bwd, opd_status_t (*forward)(const Fwd*),
                    opd_status_t (*backward)(const Bwd*)) {
  bwd.struct_size = sizeof(bwd);
  bwd.spec = fwd.spec;
  bwd.grad_logits = {const_cast<void*>(fwd.spec.logits.matrix.data), 4, OPD_BFLOAT16};
  bwd.grad_width = 3;
  fwd.spec.logits.matrix.dtype = OPD_FLOAT64;
  expect::that(forward(&fwd) == OPD_UNSUPPORTED &&
                   std::strstr(opd_last_error(), "logits must be float32, bfloat16 or float16"),
               "float64 is refused in words");
  fwd.spec.logits.temperature = 0.0;
  expect::that(forward(&fwd) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), "temperature of logits must be positive"),
               "what the CPU refuses is refused");
  expect::that(backward(&bwd) == OPD_INVALID_ARGUMENT &&
                   std::strstr(opd_last_error(), "with twice the row_stride 4, got 4"),
               "rows of a gradient that would overwrite the logits of others are refused");
  bwd.spec.num_tokens = 0;
  bwd.spec.token_ids = nullptr;
  expect::that(backward(&bwd) == OPD_OK, "no tokens, nothing to do");
}

}  // namespace emulated
