// SPDX-License-Identifier: Apache-2.0
// Two tokenizations of a text -> the finest chunks that both have. Where the bytes of both sides are
// the same, a boundary is an end of a token that both have at the same byte; special and empty tokens
// between two bytes are matched among themselves (align_path.h). Where they are not, and the mode is
// repair, align_path.h runs over the whole streams.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "align_path.h"
#include "align_tokens_check.h"
#include "parallel.h"

namespace opd {
namespace align_tokens {
namespace {

// Memory that grows and is not filled.
template <class T>
class Buffer {
 public:
  T* grow(int64_t count) {
    if (count > capacity_) {
      capacity_ = std::max(count, 2 * capacity_);
      values_.reset(new T[static_cast<size_t>(capacity_)]);
    }
    return values_.get();
  }
  T* get() const { return values_.get(); }
  T& operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<T[]> values_;
  int64_t capacity_ = 0;
};

// bytes that are copied at once; the bytes of a side have as many behind them
constexpr int64_t kCopy = 16;

// A token without bytes: a special token, or an empty one.
struct Mark {
  int64_t token;
  int64_t position;  // bytes before it
  Symbol symbol;
};

// One side of one sequence.
struct Side {
  int64_t num_tokens = 0, num_bytes = 0;
  Buffer<uint8_t> bytes;
  Buffer<int64_t> ends;    // of tokens, in bytes; ends[-1] is 0
  Buffer<int64_t> starts;  // of their bytes in the table
  std::vector<Mark> marks;
  // as align_path.h wants it, filled where it is needed
  Buffer<Symbol> symbols;
  Buffer<int64_t> symbol_ends;

  int64_t end_before(int64_t token) const { return token == 0 ? 0 : ends[token - 1]; }
};

[[noreturn]] __attribute__((noinline)) void refuse_token(const char* side, int64_t sequence,
                                                         int64_t position, int64_t id,
                                                         const opd_token_table_t& table) {
  OPD_CHECK(id >= 0 && id < table.vocab_size, kOp, ": ids must be in [0, ", table.vocab_size,
            "), the ", side, "'s vocabulary, got ", id, " at position ", position, " of sequence ",
            sequence);
  const uint8_t symbol = table.symbols == nullptr ? 0 : table.symbols[id];
  OPD_CHECK((symbol & ~kRoles) == 0, kOp, ": symbols must be roles, 0 .. ", int{kRoles}, ", got ",
            int{symbol}, " for id ", id, " of the ", side);
  OPD_CHECK(false, kOp, ": offsets of the token table must rise from 0 to ", table.data_size,
            ", got ", table.offsets[id], " and ", table.offsets[id + 1], " for id ", id, " of the ",
            side);
  throw Error(OPD_INTERNAL, kOp);
}

template <class Id>
void load(const char* name, int64_t sequence, const opd_token_ids_t& packed,
          const opd_token_table_t& table, Side* side) {
  const int64_t first = packed.offsets[sequence];
  const Id* ids = static_cast<const Id*>(packed.ids) + first;
  const int64_t count = packed.offsets[sequence + 1] - first;
  int64_t* ends = side->ends.grow(count);
  int64_t* starts = side->starts.grow(count);
  side->marks.clear();
  int64_t total = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t id = static_cast<int64_t>(ids[t]);
    if (id < 0 || id >= table.vocab_size) refuse_token(name, sequence, t, id, table);
    const int64_t begin = table.offsets[id], end = table.offsets[id + 1];
    const uint8_t roles = table.symbols == nullptr ? 0 : table.symbols[id];
    if (begin < 0 || end < begin || end > table.data_size || (roles & ~kRoles) != 0) {
      refuse_token(name, sequence, t, id, table);
    }
    if (roles != 0 || begin == end) {
      side->marks.push_back(
          {t, total, static_cast<Symbol>(kSpecial | (roles == 0 ? kEmpty : roles))});
    } else {
      total += end - begin;
    }
    starts[t] = begin;
    ends[t] = total;
  }
  OPD_CHECK(total + count < kMaxSymbols, kOp, ": a sequence must have less than ", kMaxSymbols,
            " bytes and tokens, got ", total, " and ", count, " of the ", name, " in sequence ",
            sequence);
  side->num_tokens = count;
  side->num_bytes = total;
  uint8_t* bytes = side->bytes.grow(total + kCopy);
  int64_t begin = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t length = ends[t] - begin;
    if (length <= kCopy && starts[t] + kCopy <= table.data_size) {
      std::memcpy(bytes + begin, table.data + starts[t], kCopy);
    } else if (length > 0) {
      std::memcpy(bytes + begin, table.data + starts[t], static_cast<size_t>(length));
    }
    begin = ends[t];
  }
}

// Where chunks of one sequence are written: ends of chunk c at [c + 1], in tokens of the pack.
struct Out {
  int64_t* student;
  int64_t* teacher;
  uint8_t* is_aligned;
  int64_t* num_bytes;
  int64_t student_base, teacher_base;
  int64_t count = 0;
  int64_t student_end = 0, teacher_end = 0, bytes_end = 0;  // of the last chunk, in the sequence

  void add(int64_t student_token, int64_t teacher_token, int64_t bytes, bool aligned) {
    student[count + 1] = student_base + student_token;
    teacher[count + 1] = teacher_base + teacher_token;
    num_bytes[count] = bytes - bytes_end;
    is_aligned[count] = aligned ? 1 : 0;
    student_end = student_token;
    teacher_end = teacher_token;
    bytes_end = bytes;
    ++count;
  }
};

// First token from `token` on, before `limit`, that ends after `position`; in time that grows with
// the logarithm of how far it is.
int64_t first_after(const int64_t* ends, int64_t token, int64_t limit, int64_t position) {
  int64_t step = 1;
  while (token + step < limit && ends[token + step] <= position) {
    token += step;
    step *= 2;
  }
  return std::upper_bound(ends + token, ends + std::min(token + step, limit), position) - ends;
}

class Aligner {
 public:
  // The bytes of both sides are the same: fills `out`.
  void align_equal(int32_t max_edits, Out* out) {
    const Side &x = student, &y = teacher;
    int64_t s = 0, t = 0;
    size_t next_s = 0, next_t = 0;
    // the chunk that is open has a special token inside that the other side has not
    bool is_open_aligned = true;
    for (;;) {
      const Mark* mark_s = next_s < x.marks.size() ? &x.marks[next_s] : nullptr;
      const Mark* mark_t = next_t < y.marks.size() ? &y.marks[next_t] : nullptr;
      int64_t position = x.num_bytes;
      if (mark_s != nullptr) position = mark_s->position;
      if (mark_t != nullptr) position = std::min(position, mark_t->position);
      const bool is_here_s = mark_s != nullptr && mark_s->position == position;
      const bool is_here_t = mark_t != nullptr && mark_t->position == position;
      const int64_t limit_s = mark_s != nullptr ? mark_s->token : x.num_tokens;
      const int64_t limit_t = mark_t != nullptr ? mark_t->token : y.num_tokens;
      const int64_t end_s =
          is_here_s ? limit_s : first_after(x.ends.get(), s, limit_s, position);
      const int64_t end_t =
          is_here_t ? limit_t : first_after(y.ends.get(), t, limit_t, position);
      const int64_t first = out->count;
      merge(s, end_s, t, end_t, out);
      if (out->count > first && !is_open_aligned) {
        out->is_aligned[first] = 0;
        is_open_aligned = true;
      }
      s = end_s;
      t = end_t;
      if (!is_here_s && !is_here_t) return;
      const int64_t count_s = count_marks(x, &next_s, position);
      const int64_t count_t = count_marks(y, &next_t, position);
      if (x.end_before(s) == position && y.end_before(t) == position) {
        match_marks(next_s - count_s, count_s, next_t - count_t, count_t, max_edits, out);
      } else {
        is_open_aligned = false;
      }
      s += count_s;
      t += count_t;
    }
  }

  void align_differing(int32_t max_edits, Out* out) {
    make_symbols(&student);
    make_symbols(&teacher);
    const auto count = [](const Side& side) {
      return static_cast<int32_t>(side.num_tokens == 0 ? 0 : side.symbol_ends[side.num_tokens - 1]);
    };
    int64_t s = 0, t = 0, begin_s = 0, begin_t = 0;
    path_.find({student.symbols.get(), count(student)}, {teacher.symbols.get(), count(teacher)},
               max_edits, [&](int64_t i, int64_t j) {
                 while (s < student.num_tokens && student.symbol_ends[s] <= i) ++s;
                 while (t < teacher.num_tokens && teacher.symbol_ends[t] <= j) ++t;
                 const bool is_end_s = i == (s == 0 ? 0 : student.symbol_ends[s - 1]);
                 const bool is_end_t = j == (t == 0 ? 0 : teacher.symbol_ends[t - 1]);
                 if (!is_end_s || !is_end_t || i + j == 0) return;
                 const bool aligned =
                     are_same(student.symbols.get() + begin_s, i - begin_s,
                              teacher.symbols.get() + begin_t, j - begin_t);
                 out->add(s, t, student.end_before(s), aligned);
                 begin_s = i;
                 begin_t = j;
               });
  }

  Side student, teacher;

 private:
  // Chunks of tokens that all have bytes.
  void merge(int64_t s, int64_t end_s, int64_t t, int64_t end_t, Out* out) const {
    const int64_t *ends_s = student.ends.get(), *ends_t = teacher.ends.get();
    int64_t *out_s = out->student + 1, *out_t = out->teacher + 1, *num_bytes = out->num_bytes;
    const int64_t base_s = out->student_base + 1, base_t = out->teacher_base + 1;
    int64_t count = out->count, bytes_end = out->bytes_end;
    const int64_t first = count;
    // without a branch: which side's token ends first cannot be foretold
    while (s < end_s && t < end_t) {
      const int64_t a = ends_s[s], b = ends_t[t];
      const bool is_step_s = a <= b, is_step_t = b <= a, is_end = a == b;
      out_s[count] = base_s + s;
      out_t[count] = base_t + t;
      num_bytes[count] = a - bytes_end;
      bytes_end = is_end ? a : bytes_end;
      count += is_end;
      s += is_step_s;
      t += is_step_t;
    }
    if (count == first) return;
    std::memset(out->is_aligned + first, 1, static_cast<size_t>(count - first));
    out->count = count;
    out->student_end = out_s[count - 1] - out->student_base;
    out->teacher_end = out_t[count - 1] - out->teacher_base;
    out->bytes_end = bytes_end;
  }

  static int64_t count_marks(const Side& side, size_t* next, int64_t position) {
    const size_t first = *next;
    while (*next < side.marks.size() && side.marks[*next].position == position) ++*next;
    return static_cast<int64_t>(*next - first);
  }

  // Marks between two bytes, where both sides have an end of a chunk.
  void match_marks(size_t first_s, int64_t count_s, size_t first_t, int64_t count_t,
                   int32_t max_edits, Out* out) {
    const int64_t bytes = out->bytes_end, s = out->student_end, t = out->teacher_end;
    const Symbol* x = marks_of(student, first_s, count_s);
    const Symbol* y = marks_of(teacher, first_t, count_t);
    bool is_diagonal = count_s == count_t;
    for (int64_t i = 0; is_diagonal && i < count_s; ++i) is_diagonal = match(x[i], y[i]);
    if (is_diagonal) {
      for (int64_t i = 0; i < count_s; ++i) {
        out->add(s + i + 1, t + i + 1, bytes, is_same(x[i], y[i]));
      }
    } else {
      int64_t begin_s = 0, begin_t = 0;
      path_.find({x, static_cast<int32_t>(count_s)}, {y, static_cast<int32_t>(count_t)}, max_edits,
                 [&](int64_t i, int64_t j) {
                   if (i + j == 0) return;
                   out->add(s + i, t + j, bytes,
                            are_same(x + begin_s, i - begin_s, y + begin_t, j - begin_t));
                   begin_s = i;
                   begin_t = j;
                 });
    }
  }

  static const Symbol* marks_of(Side& side, size_t first, int64_t count) {
    Symbol* symbols = side.symbols.grow(count);
    for (int64_t i = 0; i < count; ++i) {
      symbols[i] = side.marks[first + static_cast<size_t>(i)].symbol;
    }
    return symbols;
  }

  static bool are_same(const Symbol* x, int64_t count_x, const Symbol* y, int64_t count_y) {
    if (count_x != count_y) return false;
    for (int64_t i = 0; i < count_x; ++i) {
      if (!is_same(x[i], y[i])) return false;
    }
    return true;
  }

  static void make_symbols(Side* side) {
    const int64_t marks = static_cast<int64_t>(side->marks.size());
    Symbol* symbols = side->symbols.grow(side->num_bytes + marks);
    int64_t* ends = side->symbol_ends.grow(side->num_tokens);
    int64_t count = 0, byte = 0;
    size_t next = 0;
    for (int64_t t = 0; t < side->num_tokens; ++t) {
      if (next < side->marks.size() && side->marks[next].token == t) {
        symbols[count++] = side->marks[next++].symbol;
      }
      while (byte < side->ends[t]) symbols[count++] = side->bytes[byte++];
      ends[t] = count;
    }
  }

  SharedNodes path_;
};

int64_t first_difference(const Side& x, const Side& y) {
  const int64_t both = std::min(x.num_bytes, y.num_bytes);
  const uint8_t* begin = x.bytes.get();
  return std::mismatch(begin, begin + both, y.bytes.get()).first - begin;
}

// As Python writes bytes: b'...' of at most kAround bytes.
std::string quoted(const Side& side, int64_t begin, int64_t end) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string text = "b'";
  for (int64_t i = std::max<int64_t>(begin, 0); i < std::min(end, side.num_bytes); ++i) {
    const uint8_t byte = side.bytes[i];
    if (byte == '\\' || byte == '\'') {
      text += {'\\', static_cast<char>(byte)};
    } else if (byte >= 0x20 && byte < 0x7f) {
      text += static_cast<char>(byte);
    } else {
      text += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return text + "'";
}

std::string around(const Side& side, int64_t position) {
  constexpr int64_t kAround = 24;
  return concat(quoted(side, position - kAround, position), " + ",
                quoted(side, position, position + kAround),
                position >= side.num_bytes ? " (its end)" : "");
}

void load_both(const opd_align_tokens_args_t& args, int64_t sequence, Aligner* aligner) {
  (args.student.id_bytes == 4 ? load<int32_t> : load<int64_t>)(
      "student", sequence, args.student, args.student_table, &aligner->student);
  (args.teacher.id_bytes == 4 ? load<int32_t> : load<int64_t>)(
      "teacher", sequence, args.teacher, args.teacher_table, &aligner->teacher);
}

bool have_same_bytes(const Aligner& aligner) {
  return aligner.student.num_bytes == aligner.teacher.num_bytes &&
         std::memcmp(aligner.student.bytes.get(), aligner.teacher.bytes.get(),
                     static_cast<size_t>(aligner.student.num_bytes)) == 0;
}

// Sequences of one piece of work: about as many tokens in each, so that threads end together.
std::vector<int64_t> blocks_of(const opd_align_tokens_args_t& args) {
  constexpr int64_t kBlocks = 64, kTokens = 4096;
  const int64_t *x = args.student.offsets, *y = args.teacher.offsets;
  const int64_t total = x[args.num_sequences] + y[args.num_sequences];
  const int64_t size = std::max(total / kBlocks, kTokens);
  std::vector<int64_t> starts = {0};
  for (int64_t b = 1; b < args.num_sequences; ++b) {
    if (x[b] + y[b] - x[starts.back()] - y[starts.back()] >= size) starts.push_back(b);
  }
  starts.push_back(args.num_sequences);
  return starts;
}

// Every sequence has written where the tokens before it have room: closes the gaps.
void pack(const opd_align_tokens_args_t& args) {
  int64_t end = 0;
  args.student_offsets[0] = args.teacher_offsets[0] = 0;
  for (int64_t b = 0; b < args.num_sequences; ++b) {
    const int64_t begin = args.student.offsets[b] + args.teacher.offsets[b];
    const int64_t count = args.chunk_ends[b];
    if (begin != end && count > 0) {
      const size_t words = static_cast<size_t>(count) * sizeof(int64_t);
      std::memmove(args.student_offsets + end + 1, args.student_offsets + begin + 1, words);
      std::memmove(args.teacher_offsets + end + 1, args.teacher_offsets + begin + 1, words);
      std::memmove(args.num_bytes + end, args.num_bytes + begin, words);
      std::memmove(args.is_aligned + end, args.is_aligned + begin, static_cast<size_t>(count));
    }
    args.chunk_ends[b] = end += count;
  }
}

[[noreturn]] void refuse_bytes(const opd_align_tokens_args_t& args, int64_t sequence) {
  Aligner aligner;
  load_both(args, sequence, &aligner);
  const int64_t position = first_difference(aligner.student, aligner.teacher);
  throw Error(OPD_BYTES_DIFFER,
              concat(kOp, ": the bytes of both sides must be the same, but those of sequence ",
                     sequence, " differ at byte ", position, ": the student has ",
                     around(aligner.student, position), ", the teacher ",
                     around(aligner.teacher, position),
                     ". Tokenize one text with both; where a tokenizer normalizes its text, mode "
                     "'repair' aligns the rest."));
}

void align(const opd_align_tokens_args_t& args) {
  const std::vector<int64_t> starts = blocks_of(args);
  std::atomic<int64_t> differing{args.num_sequences};
  parallel_rows(args.parallel_for, static_cast<int64_t>(starts.size()) - 1, [&](int64_t block) {
    Aligner aligner;
    for (int64_t b = starts[static_cast<size_t>(block)]; b < starts[static_cast<size_t>(block) + 1];
         ++b) {
      load_both(args, b, &aligner);
      const int64_t room = args.student.offsets[b] + args.teacher.offsets[b];
      Out out{args.student_offsets + room, args.teacher_offsets + room, args.is_aligned + room,
              args.num_bytes + room,       args.student.offsets[b],     args.teacher.offsets[b]};
      if (have_same_bytes(aligner)) {
        aligner.align_equal(args.max_edits, &out);
      } else if (args.mode == OPD_ALIGN_REPAIR) {
        aligner.align_differing(args.max_edits, &out);
      } else {
        int64_t known = differing.load();
        while (b < known && !differing.compare_exchange_weak(known, b)) {
        }
      }
      args.chunk_ends[b] = out.count;
    }
  });
  if (differing < args.num_sequences) refuse_bytes(args, differing);
  pack(args);
}

}  // namespace
}  // namespace align_tokens
}  // namespace opd

opd_status_t opd_align_tokens(const opd_align_tokens_args_t* args) {
  return opd::guarded([&] {
    opd::align_tokens::check_args(args);
    opd::align_tokens::align(*args);
  });
}
