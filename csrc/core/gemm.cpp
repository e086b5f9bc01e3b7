// SPDX-License-Identifier: Apache-2.0
// out (+)= A B in float32, for the shapes of an LM head: one operand is small enough to be packed
// whole, the other is huge and read once. 16-bit operands are widened while they are packed, so no
// float32 copy of a head exists. docs/decisions/0004-cpu-gemm.md says why this is not the library's.
//
// An output tile of kTileRows x kTileColumns stays in registers while k runs over a panel of each
// operand: [k][kTileRows] of A and [k][kTileColumns] of B. Every tile is summed by one thread in the
// order of k, so results do not depend on the number of threads.
#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#include "check.h"
#include "half.h"
#include "parallel.h"
#include "rows.h"

namespace opd {
namespace {

constexpr char kGemm[] = "gemm";

#if defined(__AVX512F__)
constexpr int kVector = 16, kTileRows = 14;
#elif defined(__AVX2__)
constexpr int kVector = 8, kTileRows = 6;
#else
constexpr int kVector = 4, kTileRows = 6;
#endif
constexpr int kVectors = 2;
constexpr int kTileColumns = kVector * kVectors;
// k of a panel: both panels of a tile fit in L2 with room to spare, and the tile is written seldom
constexpr int64_t kDepth = 512;
// additions to one float32 sum before it goes to out: an error grows with their number, and a
// library's sums are as short
constexpr int64_t kChain = 128;
// rows of A, or columns of B, that are packed for all threads at a time
constexpr int64_t kShared = 1024;

constexpr int64_t kCacheLine = 64;
constexpr int64_t kFewestTasks = 32;

int64_t panels(int64_t lines, int64_t width) { return (lines + width - 1) / width; }

using Vector = float __attribute__((vector_size(4 * kVector), aligned(4), may_alias));

// -- packing -----------------------------------------------------------------------------------------

#if defined(__x86_64__)
OPD_HD __m128 load_4(const float* from) { return _mm_loadu_ps(from); }
OPD_HD __m128 load_4(const BFloat16* from) {
  const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), bits));
}
OPD_HD __m128 load_4(const Float16* from) {
#if defined(__F16C__)
  return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return _mm_setr_ps(to_real(from[0]), to_real(from[1]), to_real(from[2]), to_real(from[3]));
#endif
}

template <class Storage>
OPD_HD void copy_4(const Storage* from, float* to) {
  _mm_storeu_ps(to, load_4(from));
}
// to[k * to_stride + i] = from[i * from_stride + k], i and k below 4.
template <class Storage>
OPD_HD void transpose_4(const Storage* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m128 a = load_4(from), b = load_4(from + from_stride);
  __m128 c = load_4(from + 2 * from_stride), d = load_4(from + 3 * from_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + to_stride, b);
  _mm_storeu_ps(to + 2 * to_stride, c);
  _mm_storeu_ps(to + 3 * to_stride, d);
}
#else
template <class Storage>
OPD_HD void copy_4(const Storage* from, float* to) {
  for (int i = 0; i < 4; ++i) to[i] = to_real(from[i]);
}
template <class Storage>
OPD_HD void transpose_4(const Storage* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int i = 0; i < 4; ++i) {
    for (int k = 0; k < 4; ++k) to[k * to_stride + i] = to_real(from[i * from_stride + k]);
  }
}
#endif

#if defined(__AVX512F__)
// The same with i and k below 16, in half the time.
template <class Storage>
OPD_HD void transpose_16(const Storage* from, int64_t from_stride, float* to, int64_t to_stride) {
  // the forms without a mask make GCC 12 warn of what they leave undefined
  constexpr __mmask16 kAll = 0xffff;
  constexpr __mmask8 kEvery = 0xff;
  for (int k = 0; k < 16; k += 4) {
    // lines i, i + 4, i + 8 and i + 12 side by side, so that each quarter is transposed by itself
    const auto load = [&](int i) {
      const Storage* const line = from + i * from_stride + k;
      __m512 lines = _mm512_castps128_ps512(load_4(line));
      lines = _mm512_maskz_insertf32x4(kAll, lines, load_4(line + 4 * from_stride), 1);
      lines = _mm512_maskz_insertf32x4(kAll, lines, load_4(line + 8 * from_stride), 2);
      return _mm512_maskz_insertf32x4(kAll, lines, load_4(line + 12 * from_stride), 3);
    };
    const __m512 a = load(0), b = load(1), c = load(2), d = load(3);
    const __m512d ab_low = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(kAll, a, b));
    const __m512d ab_high = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(kAll, a, b));
    const __m512d cd_low = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(kAll, c, d));
    const __m512d cd_high = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(kAll, c, d));
    float* const out = to + k * to_stride;
    _mm512_storeu_pd(out, _mm512_maskz_unpacklo_pd(kEvery, ab_low, cd_low));
    _mm512_storeu_pd(out + to_stride, _mm512_maskz_unpackhi_pd(kEvery, ab_low, cd_low));
    _mm512_storeu_pd(out + 2 * to_stride, _mm512_maskz_unpacklo_pd(kEvery, ab_high, cd_high));
    _mm512_storeu_pd(out + 3 * to_stride, _mm512_maskz_unpackhi_pd(kEvery, ab_high, cd_high));
  }
}
#endif

// A matrix whose lines (rows of A, columns of B) are what a panel has so many of.
template <class Storage>
struct Operand {
  const Storage* data;
  int64_t line_stride, depth_stride;  // one of them is 1
  int64_t lines;
};

// panel[k][width] = lines [first, first + width) at depth [begin, begin + depth), 0 beyond the last.
template <class Storage>
void pack_panel(const Operand<Storage>& from, int64_t first, int width, int64_t begin,
                int64_t depth, float* __restrict__ panel) {
  const int count = static_cast<int>(std::min<int64_t>(width, from.lines - first));
  if (count < width) std::fill(panel, panel + depth * width, 0.0f);
  const Storage* const origin =
      from.data + first * from.line_stride + begin * from.depth_stride;
  if (from.line_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const Storage* const line = origin + k * from.depth_stride;
      float* const out = panel + k * width;
      int i = 0;
      for (; i + 4 <= count; i += 4) copy_4(line + i, out + i);
      for (; i < count; ++i) out[i] = to_real(line[i]);
    }
    return;
  }
  int i = 0;
  const auto pack_squares = [&](int size, auto transpose) {
    for (; i + size <= count; i += size) {
      const Storage* const line = origin + i * from.line_stride;
      int64_t k = 0;
      for (; k + size <= depth; k += size) {
        transpose(line + k, panel + k * width + i);
      }
      for (; k < depth; ++k) {
        for (int j = 0; j < size; ++j) {
          panel[k * width + i + j] = to_real(line[j * from.line_stride + k]);
        }
      }
    }
  };
#if defined(__AVX512F__)
  pack_squares(16, [&](const Storage* line, float* to) {
    transpose_16(line, from.line_stride, to, width);
  });
#endif
  pack_squares(4, [&](const Storage* line, float* to) {
    transpose_4(line, from.line_stride, to, width);
  });
  for (; i < count; ++i) {
    const Storage* const line = origin + i * from.line_stride;
    for (int64_t k = 0; k < depth; ++k) panel[k * width + i] = to_real(line[k]);
  }
}

// `group` panels at once, of an operand whose lines lie side by side.
template <int kWidth, class Storage>
void pack_across(const Operand<Storage>& from, int64_t first, int64_t group, int64_t begin,
                 int64_t depth, float* __restrict__ panels_out) {
  const int64_t count = std::min<int64_t>(group * kWidth, from.lines - first);
  if (count < group * kWidth) std::fill(panels_out, panels_out + group * depth * kWidth, 0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    const Storage* const line = from.data + first + (begin + k) * from.depth_stride;
    for (int64_t i = 0; i < count; i += kWidth) {
      float* const out = panels_out + i * depth + k * kWidth;
      const int here = static_cast<int>(std::min<int64_t>(kWidth, count - i));
      int j = 0;
      for (; j + 4 <= here; j += 4) copy_4(line + i + j, out + j);
      for (; j < here; ++j) out[j] = to_real(line[i + j]);
    }
  }
}

// Walks the cache lines of the panel after this one, a few per tile, so that packing it does not wait
// for memory: 6% of the time of the logits' GEMM, and never slower.
struct Ahead {
  const char* run = nullptr;
  int64_t stride = 0, run_bytes = 0, at = 0, left = 0, per_tile = 0;

  void prefetch() {
    __builtin_prefetch(run + at, 0, 2);
    at += kCacheLine;
    const bool over = at >= run_bytes;
    at = over ? 0 : at;
    run += over ? stride : 0;
  }
};

template <class Storage>
Ahead ahead_of(const Operand<Storage>& from, int64_t first, int64_t width, int64_t begin,
               int64_t depth, int64_t tiles) {
  const int64_t count = std::min(width, from.lines - first);
  if (count <= 0) return {};
  const bool across = from.line_stride == 1;
  const Storage* const origin = from.data + first * from.line_stride + begin * from.depth_stride;
  Ahead ahead;
  ahead.run = reinterpret_cast<const char*>(origin);
  ahead.stride = (across ? from.depth_stride : from.line_stride) * int64_t(sizeof(Storage));
  ahead.run_bytes = (across ? count : depth) * int64_t(sizeof(Storage));
  ahead.left = (across ? depth : count) * panels(ahead.run_bytes, kCacheLine);
  ahead.per_tile = panels(ahead.left, tiles);
  return ahead;
}

// -- the tile ------------------------------------------------------------------------------------------

struct Out {
  float* data;
  int64_t row_stride, rows, columns;
};

// How two entries of a panel are multiplied: as float32, or as pairs of bfloat16 whose products, exact
// in float32, are added to the sum together.
struct Singles {
  static OPD_HD Vector multiply_add(Vector sum, float left, Vector right) {
    return sum + left * right;
  }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static OPD_HD Vector multiply_add(Vector sum, float left, Vector right) {
    const __m512i pairs = _mm512_set1_epi32(detail::float_to_bits(left));
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)right);
  }
};
constexpr bool kHasPairs = true;
#else
using Pairs = Singles;
constexpr bool kHasPairs = false;
#endif

template <class Products, int kRows>
OPD_ELEMENTWISE void tile(const float* __restrict__ a, const float* __restrict__ b, int64_t depth,
                          bool accumulate, float* __restrict__ out, int64_t row_stride,
                          Ahead& ahead) {
  const int64_t wanted = std::min(ahead.left, ahead.per_tile);
  ahead.left -= wanted;
  // by twos: a panel of 32 lines has as many cache lines as twice its depth, and may have one tile
  const int64_t twos = panels(wanted, 2);
  const int64_t every = twos > 0 ? std::max<int64_t>(1, depth / twos) : depth + 1;
  int64_t countdown = every;
  for (int64_t begin = 0; begin < depth; begin += kChain) {
    const int64_t end = std::min(begin + kChain, depth);
    Vector sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Vector{};
    }
    for (int64_t k = begin; k < end; ++k) {
      if (--countdown == 0) {
        countdown = every;
        ahead.prefetch();
        ahead.prefetch();
      }
      Vector right[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        right[j] = *reinterpret_cast<const Vector*>(b + k * kTileColumns + j * kVector);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const float left = a[k * kRows + i];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] = Products::multiply_add(sums[i][j], left, right[j]);
        }
      }
    }
    const bool add = accumulate || begin > 0;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        Vector* const at = reinterpret_cast<Vector*>(out + i * row_stride + j * kVector);
        *at = add ? *at + sums[i][j] : sums[i][j];
      }
    }
  }
}

// The tile of 1, 2, .. kTileRows rows.
template <class Products, int... kFewer>
constexpr auto tiles_of(std::integer_sequence<int, kFewer...>) {
  return std::array{&tile<Products, kFewer + 1>...};
}
template <class Products>
constexpr auto kTiles = tiles_of<Products>(std::make_integer_sequence<int, kTileRows>());

// The tile at (row, column) of out, which may lie over its edge; the panel of A has `width` rows.
template <class Products>
void place_tile(const float* a, int64_t width, const float* b, int64_t depth, bool accumulate,
                const Out& out, int64_t row, int64_t column, Ahead& ahead) {
  const auto tile_of_width = kTiles<Products>[width - 1];
  float* const at = out.data + row * out.row_stride + column;
  const int64_t rows = std::min<int64_t>(width, out.rows - row);
  const int64_t columns = std::min<int64_t>(kTileColumns, out.columns - column);
  if (rows == width && columns == kTileColumns) {
    return tile_of_width(a, b, depth, accumulate, at, out.row_stride, ahead);
  }
  // what is summed in which order must not depend on where a tile lies
  alignas(64) float whole[kTileRows * kTileColumns] = {};
  for (int64_t i = 0; i < rows && accumulate; ++i) {
    std::copy_n(at + i * out.row_stride, columns, whole + i * kTileColumns);
  }
  tile_of_width(a, b, depth, accumulate, whole, kTileColumns, ahead);
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(whole + i * kTileColumns, columns, at + i * out.row_stride);
  }
}

// -- the loops -----------------------------------------------------------------------------------------

// kSharedRows: A is the small operand, packed for all threads, and each thread walks panels of B;
// otherwise the other way round.
template <class Products, bool kSharedRows, class A, class B>
void multiply(opd_parallel_for_fn parallel_for, const Operand<A>& a, const Operand<B>& b,
              int64_t depth, bool accumulate, const Out& out, float* shared) {
  constexpr int kSharedWidth = kSharedRows ? kTileRows : kTileColumns;
  constexpr int kOwnWidth = kSharedRows ? kTileColumns : kTileRows;
  const int64_t shared_lines = kSharedRows ? out.rows : out.columns;
  const int64_t own_lines = kSharedRows ? out.columns : out.rows;
  // neighbouring panels lie in the same cache lines and pages of an operand that runs across them
  constexpr int64_t kOwnGroup = kSharedRows ? 2 : 4;
  constexpr int64_t kPackedSize = kDepth * kOwnWidth * kOwnGroup;
  const bool own_across = (kSharedRows ? b.line_stride : a.line_stride) == 1;
  // whole panels
  constexpr int64_t kGroup = kShared / kSharedWidth * kSharedWidth;
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    const int64_t here = std::min(kDepth, depth - begin);
    const bool add = accumulate || begin > 0;
    for (int64_t first = 0; first < shared_lines; first += kGroup) {
      const int64_t lines = std::min(kGroup, shared_lines - first);
      const int64_t count = panels(lines, kSharedWidth);
      // 72 rows are six tiles of 12, not five of 14 and one that is mostly empty
      const int64_t most = kSharedRows ? panels(lines, count) : kSharedWidth;
      const auto width_of = [&](int64_t panel) {
        return static_cast<int>(kSharedRows ? std::min(most, lines - panel * most) : most);
      };
      parallel_rows(parallel_for, count, [&](int64_t panel) {
        float* const packed = shared + panel * most * here;
        const int64_t line = first + panel * most;
        if constexpr (kSharedRows) {
          pack_panel(a, line, width_of(panel), begin, here, packed);
        } else {
          pack_panel(b, line, width_of(panel), begin, here, packed);
        }
      });
      // where that leaves enough of them for many threads
      const bool grouped = own_across && own_lines >= kFewestTasks * kOwnGroup * kOwnWidth;
      const int64_t group = grouped ? kOwnGroup : 1, width = group * kOwnWidth;
      parallel_rows(parallel_for, panels(own_lines, width), [&](int64_t own) {
        alignas(64) float packed[kPackedSize];
        Ahead ahead;
        const auto pack = [&](const auto& operand) {
          if (own_across) {
            pack_across<kOwnWidth>(operand, own * width, group, begin, here, packed);
          } else {
            pack_panel(operand, own * width, kOwnWidth, begin, here, packed);
          }
          ahead = ahead_of(operand, (own + 1) * width, width, begin, here, count * group);
        };
        if constexpr (kSharedRows) {
          pack(b);
        } else {
          pack(a);
        }
        for (int64_t panel = 0; panel < count; ++panel) {
          const float* const other = shared + panel * most * here;
          const int64_t line = first + panel * most;
          for (int64_t i = 0; i < group && own * width + i * kOwnWidth < own_lines; ++i) {
            const float* const mine = packed + i * kOwnWidth * here;
            const int64_t own_line = own * width + i * kOwnWidth;
            if constexpr (kSharedRows) {
              place_tile<Products>(other, width_of(panel), mine, here, add, out, line, own_line,
                                   ahead);
            } else {
              place_tile<Products>(mine, kOwnWidth, other, here, add, out, own_line, line, ahead);
            }
          }
        }
      });
    }
  }
}

// Calls fn with a pointer of the storage type.
template <class Fn>
void with_storage(const opd_gemm_operand_t& operand, Fn&& fn) {
  if (operand.dtype == OPD_FLOAT32) fn(static_cast<const float*>(operand.data));
  if (operand.dtype == OPD_BFLOAT16) fn(static_cast<const BFloat16*>(operand.data));
  if (operand.dtype == OPD_FLOAT16) fn(static_cast<const Float16*>(operand.data));
}

template <class Products, class A, class B>
void run_gemm(const opd_gemm_args_t& args, const Operand<A>& a, const Operand<B>& b, int64_t depth) {
  const Out out{static_cast<float*>(args.out), args.out_row_stride, args.m, args.n};
  float* const shared = static_cast<float*>(args.workspace);
  if (args.m <= args.n) {
    multiply<Products, true>(args.parallel_for, a, b, depth, args.accumulate, out, shared);
  } else {
    multiply<Products, false>(args.parallel_for, a, b, depth, args.accumulate, out, shared);
  }
}

template <class Storage>
Operand<Storage> rows_of(const opd_gemm_operand_t& a, int64_t lines) {
  return {static_cast<const Storage*>(a.data), a.row_stride, a.column_stride, lines};
}

template <class Storage>
Operand<Storage> columns_of(const opd_gemm_operand_t& b, int64_t lines) {
  return {static_cast<const Storage*>(b.data), b.column_stride, b.row_stride, lines};
}

// Two neighbours along k of a bfloat16 operand as one float32, bit by bit.
Operand<float> in_pairs(const Operand<BFloat16>& from) {
  return {reinterpret_cast<const float*>(from.data), from.line_stride / 2, 1, from.lines};
}

// bfloat16 on both sides, each running along k, as hidden states and a head do: twice as fast, and as
// exact as widening them.
bool run_in_pairs(const opd_gemm_args_t& args) {
  if (!kHasPairs || args.a.dtype != OPD_BFLOAT16 || args.b.dtype != OPD_BFLOAT16) return false;
  const Operand<BFloat16> a = rows_of<BFloat16>(args.a, args.m);
  const Operand<BFloat16> b = columns_of<BFloat16>(args.b, args.n);
  const bool along = a.depth_stride == 1 && b.depth_stride == 1;
  if (!along || (args.k | a.line_stride | b.line_stride) % 2 != 0) return false;
  // a line that lies beside the next one would be taken for an operand that runs across
  if (a.line_stride == 2 || b.line_stride == 2) return false;
  run_gemm<Pairs>(args, in_pairs(a), in_pairs(b), args.k / 2);
  return true;
}

void run_gemm(const opd_gemm_args_t& args) {
  if (run_in_pairs(args)) return;
  with_storage(args.a, [&](auto* a_data) {
    with_storage(args.b, [&](auto* b_data) {
      using A = std::remove_const_t<std::remove_pointer_t<decltype(a_data)>>;
      using B = std::remove_const_t<std::remove_pointer_t<decltype(b_data)>>;
      run_gemm<Singles>(args, rows_of<A>(args.a, args.m), columns_of<B>(args.b, args.n), args.k);
    });
  });
}

void check_operand(const char* name, const opd_gemm_operand_t& operand, bool empty) {
  OPD_CHECK(operand.dtype == OPD_FLOAT32 || operand.dtype == OPD_BFLOAT16 ||
                operand.dtype == OPD_FLOAT16,
            kGemm, ": ", name, " must be float32, bfloat16 or float16, got dtype ", operand.dtype);
  OPD_CHECK(empty || operand.data, kGemm, ": ", name, " must not be NULL");
  OPD_CHECK(operand.row_stride == 1 || operand.column_stride == 1, kGemm, ": ", name,
            " must be contiguous along its rows or its columns, got strides ", operand.row_stride,
            " and ", operand.column_stride);
}

}  // namespace
}  // namespace opd

int64_t opd_gemm_workspace_bytes(int64_t m, int64_t n, int64_t k) {
  const int64_t depth = std::min(std::max<int64_t>(k, 0), opd::kDepth);
  // whole panels of the smaller operand, as many as are packed at a time
  const auto packed = [](int64_t count, int64_t width) {
    return std::min(opd::panels(count, width), opd::kShared / width) * width;
  };
  const int64_t lines = m <= n ? packed(m, opd::kTileRows) : packed(n, opd::kTileColumns);
  return static_cast<int64_t>(sizeof(float)) * depth * std::max<int64_t>(lines, 0);
}

int32_t opd_gemm_preferred(void) {
#if defined(__AVX2__)
  // MKL, which torch's GEMMs are on a CPU, keeps its fastest kernels for Intel's
  unsigned highest, b, c, d;
  if (!__get_cpuid(0, &highest, &b, &c, &d)) return 0;
  const bool is_intel = b == signature_INTEL_ebx && d == signature_INTEL_edx &&
                        c == signature_INTEL_ecx;
  return is_intel ? 0 : 1;
#else
  return 0;
#endif
}

opd_status_t opd_gemm_cpu(const opd_gemm_args_t* args) {
  return opd::guarded([&] {
    opd::check_pointer(opd::kGemm, "args", args);
    opd::check_struct_size(opd::kGemm, args->struct_size, sizeof(*args));
    OPD_CHECK(args->m >= 0 && args->n >= 0 && args->k >= 0, opd::kGemm,
              ": sizes must not be negative, got ", args->m, ", ", args->n, " and ", args->k);
    if (args->m == 0 || args->n == 0) return;
    const bool empty = args->k == 0;
    opd::check_operand("a", args->a, empty);
    opd::check_operand("b", args->b, empty);
    opd::check_pointer(opd::kGemm, "out", args->out);
    OPD_CHECK(args->out_row_stride >= args->n, opd::kGemm, ": rows of out must not overlap");
    if (empty) {
      for (int64_t i = 0; i < args->m && !args->accumulate; ++i) {
        float* const row = static_cast<float*>(args->out) + i * args->out_row_stride;
        std::fill(row, row + args->n, 0.0f);
      }
      return;
    }
    opd::check_pointer(opd::kGemm, "workspace", args->workspace);
    opd::run_gemm(*args);
  });
}
