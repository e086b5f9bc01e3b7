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
  // room for `count`; of what was there, the first `kept` stay
  T* grow(int64_t count, int64_t kept = 0) {
    if (count > capacity_) {
      capacity_ = std::max(count, 2 * capacity_);
      std::unique_ptr<T[]> values(new T[static_cast<size_t>(capacity_)]);
      if (kept > 0) std::memcpy(values.get(), values_.get(), static_cast<size_t>(kept) * sizeof(T));
      values_ = std::move(values);
    }
    return values_.get();
  }
  T* get() const { return values_.get(); }
  int64_t capacity() const { return capacity_; }
  T& operator[](int64_t i) const { return values_[static_cast<size_t>(i)]; }

 private:
  std::unique_ptr<T[]> values_;
  int64_t capacity_ = 0;
};

// bytes that are copied at once: most tokens have no more
constexpr int64_t kCopy = 16;

// A token without bytes: a special token, or an empty one.
struct Mark {
  int32_t token;
  int32_t position;  // bytes before it
  Symbol symbol;
};

// One side of one sequence.
struct Side {
  int32_t num_tokens = 0, num_bytes = 0;
  Buffer<uint8_t> bytes;
  Buffer<int32_t> ends;  // of tokens, in bytes
  std::vector<Mark> marks;
  // as align_path.h wants it, filled where it is needed
  Buffer<Symbol> symbols;
  Buffer<int32_t> symbol_ends;

  int32_t end_before(int32_t token) const { return token == 0 ? 0 : ends[token - 1]; }
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

[[noreturn]] __attribute__((noinline)) void refuse_length(const char* side, int64_t sequence) {
  throw Error(OPD_INVALID_ARGUMENT,
              concat(kOp, ": a sequence must have less than ", kMaxSymbols,
                     " bytes and tokens together, sequence ", sequence, " of the ", side,
                     " has more"));
}

template <class Id>
void load(const char* name, int64_t sequence, const opd_token_ids_t& batch,
          const opd_token_table_t& table, Side* side) {
  const int64_t first = batch.offsets[sequence];
  const Id* ids = batch.sequences != nullptr ? static_cast<const Id*>(batch.sequences[sequence])
                                             : static_cast<const Id*>(batch.ids) + first;
  const int64_t count = batch.offsets[sequence + 1] - first;
  if (count >= kMaxSymbols) refuse_length(name, sequence);
  int32_t* ends = side->ends.grow(count);
  // a guess that most texts stay within
  constexpr int64_t kBytesPerToken = 6;
  uint8_t* bytes = side->bytes.grow(kBytesPerToken * count + kCopy);
  int64_t room = side->bytes.capacity() - kCopy;
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
    const int64_t length = end - begin;
    if (roles != 0 || length == 0) {
      side->marks.push_back({static_cast<int32_t>(t), static_cast<int32_t>(total),
                             static_cast<Symbol>(kSpecial | (roles == 0 ? kEmpty : roles))});
    } else {
      if (total + length > room) {
        if (total + length + count >= kMaxSymbols) refuse_length(name, sequence);
        bytes = side->bytes.grow(total + length + kCopy, total);
        room = side->bytes.capacity() - kCopy;
      }
      if (length <= kCopy && begin + kCopy <= table.data_size) {
        std::memcpy(bytes + total, table.data + begin, kCopy);
      } else {
        std::memcpy(bytes + total, table.data + begin, static_cast<size_t>(length));
      }
      total += length;
    }
    ends[t] = static_cast<int32_t>(total);
  }
  if (total + count >= kMaxSymbols) refuse_length(name, sequence);
  side->num_tokens = static_cast<int32_t>(count);
  side->num_bytes = static_cast<int32_t>(total);
}

// The end of a chunk, from the beginning of its sequence.
struct Chunk {
  int32_t student, teacher;  // tokens
  int32_t bytes;             // of the student
  int32_t is_aligned;
};

// Where the chunks of one sequence go; it has room for as many as there are tokens.
struct Out {
  Chunk* chunks;
  int64_t count = 0;

  Chunk last() const { return count == 0 ? Chunk{} : chunks[count - 1]; }
  void add(int64_t student, int64_t teacher, int64_t bytes, bool is_aligned) {
    chunks[count++] = {static_cast<int32_t>(student), static_cast<int32_t>(teacher),
                       static_cast<int32_t>(bytes), is_aligned ? 1 : 0};
  }
};

// First token from `token` on, before `limit`, that ends after `position`; in time that grows with
// the logarithm of how far it is.
int32_t first_after(const int32_t* ends, int32_t token, int32_t limit, int32_t position) {
  int32_t step = 1;
  while (token + step < limit && ends[token + step] <= position) {
    token += step;
    step *= 2;
  }
  const int32_t* found =
      std::upper_bound(ends + token, ends + std::min(token + step, limit), position);
  return static_cast<int32_t>(found - ends);
}

class Aligner {
 public:
  // The bytes of both sides are the same: fills `out`.
  void align_equal(int32_t max_edits, Out* out) {
    const Side &x = student, &y = teacher;
    int32_t s = 0, t = 0;
    size_t next_s = 0, next_t = 0;
    // the chunk that is open has a special token inside that the other side has not
    bool is_open_aligned = true;
    for (;;) {
      const Mark* mark_s = next_s < x.marks.size() ? &x.marks[next_s] : nullptr;
      const Mark* mark_t = next_t < y.marks.size() ? &y.marks[next_t] : nullptr;
      int32_t position = x.num_bytes;
      if (mark_s != nullptr) position = mark_s->position;
      if (mark_t != nullptr) position = std::min(position, mark_t->position);
      const bool is_here_s = mark_s != nullptr && mark_s->position == position;
      const bool is_here_t = mark_t != nullptr && mark_t->position == position;
      const int32_t limit_s = mark_s != nullptr ? mark_s->token : x.num_tokens;
      const int32_t limit_t = mark_t != nullptr ? mark_t->token : y.num_tokens;
      const int32_t end_s =
          is_here_s ? limit_s : first_after(x.ends.get(), s, limit_s, position);
      const int32_t end_t =
          is_here_t ? limit_t : first_after(y.ends.get(), t, limit_t, position);
      const int64_t first = out->count;
      merge(s, end_s, t, end_t, out);
      if (out->count > first && !is_open_aligned) {
        out->chunks[first].is_aligned = 0;
        is_open_aligned = true;
      }
      s = end_s;
      t = end_t;
      if (!is_here_s && !is_here_t) return;
      const int32_t count_s = count_marks(x, &next_s, position);
      const int32_t count_t = count_marks(y, &next_t, position);
      if (x.end_before(s) == position && y.end_before(t) == position) {
        match_marks(next_s - static_cast<size_t>(count_s), count_s,
                    next_t - static_cast<size_t>(count_t), count_t, max_edits, out);
      } else {
        is_open_aligned = false;
      }
      s += count_s;
      t += count_t;
    }
  }

  void align_differing(int32_t max_edits, Out* out) {
    const int32_t count_s = make_symbols(&student), count_t = make_symbols(&teacher);
    int32_t s = 0, t = 0, begin_s = 0, begin_t = 0;
    path_.find({student.symbols.get(), count_s}, {teacher.symbols.get(), count_t}, max_edits,
               [&](int32_t i, int32_t j) {
                 while (s < student.num_tokens && student.symbol_ends[s] <= i) ++s;
                 while (t < teacher.num_tokens && teacher.symbol_ends[t] <= j) ++t;
                 const bool is_end_s = i == (s == 0 ? 0 : student.symbol_ends[s - 1]);
                 const bool is_end_t = j == (t == 0 ? 0 : teacher.symbol_ends[t - 1]);
                 if (!is_end_s || !is_end_t || i + j == 0) return;
                 out->add(s, t, student.end_before(s),
                          are_same(student.symbols.get() + begin_s, i - begin_s,
                                   teacher.symbols.get() + begin_t, j - begin_t));
                 begin_s = i;
                 begin_t = j;
               });
  }

  Side student, teacher;

 private:
  // Chunks of tokens that all have bytes.
  void merge(int32_t s, int32_t end_s, int32_t t, int32_t end_t, Out* out) const {
    const int32_t *ends_s = student.ends.get(), *ends_t = teacher.ends.get();
    Chunk* chunk = out->chunks + out->count;
    // without a branch: which side's token ends first cannot be foretold
    while (s < end_s && t < end_t) {
      const int32_t a = ends_s[s], b = ends_t[t];
      *chunk = {s + 1, t + 1, a, 1};
      chunk += a == b;
      s += a <= b;
      t += b <= a;
    }
    out->count = chunk - out->chunks;
  }

  static int32_t count_marks(const Side& side, size_t* next, int32_t position) {
    const size_t first = *next;
    while (*next < side.marks.size() && side.marks[*next].position == position) ++*next;
    return static_cast<int32_t>(*next - first);
  }

  // Marks between two bytes, where both sides have an end of a chunk.
  void match_marks(size_t first_s, int32_t count_s, size_t first_t, int32_t count_t,
                   int32_t max_edits, Out* out) {
    const Chunk end = out->last();
    const Symbol* x = marks_of(student, first_s, count_s);
    const Symbol* y = marks_of(teacher, first_t, count_t);
    bool is_diagonal = count_s == count_t;
    for (int32_t i = 0; is_diagonal && i < count_s; ++i) is_diagonal = match(x[i], y[i]);
    const auto add = [&](int32_t i, int32_t j, bool is_aligned) {
      out->add(end.student + i, end.teacher + j, end.bytes, is_aligned);
    };
    if (is_diagonal) {
      for (int32_t i = 0; i < count_s; ++i) add(i + 1, i + 1, is_same(x[i], y[i]));
      return;
    }
    int32_t begin_s = 0, begin_t = 0;
    path_.find({x, count_s}, {y, count_t}, max_edits, [&](int32_t i, int32_t j) {
      if (i + j == 0) return;
      add(i, j, are_same(x + begin_s, i - begin_s, y + begin_t, j - begin_t));
      begin_s = i;
      begin_t = j;
    });
  }

  static const Symbol* marks_of(Side& side, size_t first, int32_t count) {
    Symbol* symbols = side.symbols.grow(count);
    for (int32_t i = 0; i < count; ++i) {
      symbols[i] = side.marks[first + static_cast<size_t>(i)].symbol;
    }
    return symbols;
  }

  static bool are_same(const Symbol* x, int32_t count_x, const Symbol* y, int32_t count_y) {
    if (count_x != count_y) return false;
    for (int32_t i = 0; i < count_x; ++i) {
      if (!is_same(x[i], y[i])) return false;
    }
    return true;
  }

  // the number of symbols
  static int32_t make_symbols(Side* side) {
    Symbol* symbols = side->symbols.grow(side->num_bytes + side->num_tokens);
    int32_t* ends = side->symbol_ends.grow(side->num_tokens);
    int32_t count = 0, byte = 0;
    size_t next = 0;
    for (int32_t t = 0; t < side->num_tokens; ++t) {
      if (next < side->marks.size() && side->marks[next].token == t) {
        symbols[count++] = side->marks[next++].symbol;
      }
      while (byte < side->ends[t]) symbols[count++] = side->bytes[byte++];
      ends[t] = count;
    }
    return count;
  }

  SharedNodes path_;
};

int64_t first_difference(const Side& x, const Side& y) {
  const int32_t both = std::min(x.num_bytes, y.num_bytes);
  const uint8_t* begin = x.bytes.get();
  return std::mismatch(begin, begin + both, y.bytes.get()).first - begin;
}

// As Python writes bytes: b'...' of at most kAround bytes.
std::string quoted(const Side& side, int64_t begin, int64_t end) {
  static constexpr char kHex[] = "0123456789abcdef";
  std::string text = "b'";
  for (int64_t i = std::max<int64_t>(begin, 0); i < std::min<int64_t>(end, side.num_bytes); ++i) {
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

// A piece of work: sequences with about as many tokens as those of the others.
struct Block {
  int64_t begin, end;
  std::unique_ptr<Chunk[]> chunks;
  int64_t count = 0;
};

std::vector<Block> blocks_of(const opd_align_tokens_args_t& args) {
  constexpr int64_t kBlocks = 64, kTokens = 4096;
  const auto tokens = [&](int64_t b) { return args.student.offsets[b] + args.teacher.offsets[b]; };
  const int64_t size = std::max(tokens(args.num_sequences) / kBlocks, kTokens);
  std::vector<Block> blocks;
  int64_t begin = 0;
  for (int64_t b = 1; b <= args.num_sequences; ++b) {
    if (b == args.num_sequences || tokens(b) - tokens(begin) >= size) {
      blocks.push_back({begin, b, nullptr});
      begin = b;
    }
  }
  return blocks;
}

// The chunks of a block, in packed tokens, from chunk `first` on. Leaves in chunk_ends the ends.
void write(const opd_align_tokens_args_t& args, const Block& block, int64_t first) {
  const Chunk* chunk = block.chunks.get();
  int64_t c = first;
  for (int64_t b = block.begin; b < block.end; ++b) {
    const int64_t student = args.student.offsets[b], teacher = args.teacher.offsets[b];
    const int64_t end = c + args.chunk_ends[b];
    for (int32_t bytes = 0; c < end; ++c, ++chunk) {
      args.student_offsets[c + 1] = student + chunk->student;
      args.teacher_offsets[c + 1] = teacher + chunk->teacher;
      args.num_bytes[c] = chunk->bytes - bytes;
      args.is_aligned[c] = static_cast<uint8_t>(chunk->is_aligned);
      bytes = chunk->bytes;
    }
    args.chunk_ends[b] = end;
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
  std::vector<Block> blocks = blocks_of(args);
  const int64_t num_blocks = static_cast<int64_t>(blocks.size());
  std::atomic<int64_t> differing{args.num_sequences};
  parallel_rows(args.parallel_for, num_blocks, [&](int64_t index) {
    Block& block = blocks[static_cast<size_t>(index)];
    const auto tokens = [&](int64_t b) {
      return args.student.offsets[b] + args.teacher.offsets[b];
    };
    // one more, which a branch that was not taken may have written
    block.chunks.reset(new Chunk[static_cast<size_t>(tokens(block.end) - tokens(block.begin) + 1)]);
    Aligner aligner;
    for (int64_t b = block.begin; b < block.end; ++b) {
      load_both(args, b, &aligner);
      Out out{block.chunks.get() + block.count};
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
      block.count += out.count;
    }
  });
  if (differing < args.num_sequences) refuse_bytes(args, differing);
  std::vector<int64_t> firsts(blocks.size(), 0);
  for (size_t i = 1; i < blocks.size(); ++i) firsts[i] = firsts[i - 1] + blocks[i - 1].count;
  args.student_offsets[0] = args.teacher_offsets[0] = 0;
  parallel_rows(args.parallel_for, num_blocks, [&](int64_t index) {
    write(args, blocks[static_cast<size_t>(index)], firsts[static_cast<size_t>(index)]);
  });
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
