// SPDX-License-Identifier: Apache-2.0
// opd_align_tokens on inputs made of any bytes; traps where a property does not hold. The entry point
// is libFuzzer's, so that clang's runs it too:
//   clang++ -fsanitize=fuzzer,address,undefined ... fuzz_align_tokens.cpp csrc/core/align_tokens.cpp ...
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../align_cases.h"

namespace {

using align_cases::Chunks;
using Side = align_cases::Side<int32_t>;

// Reads numbers from the input; 0 behind its end.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t byte() { return next_ < size_ ? data_[next_++] : 0; }
  std::string bytes(size_t count) {
    std::string result;
    for (; result.size() < count && next_ < size_; ++next_) {
      result += static_cast<char>(data_[next_]);
    }
    return result;
  }
  size_t left() const { return size_ - next_; }

 private:
  const uint8_t* data_;
  size_t size_, next_ = 0;
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "property: %s\n", what);
  __builtin_trap();
}

// Cuts the text, with special and empty tokens between, as the input says.
Side cut(const std::string& text, Reader* reader) {
  Side side;
  size_t begin = 0;
  for (;;) {
    const uint8_t what = reader->byte();
    if (what >= 0xc0) {
      // an empty token, or roles; one that no role has is for the refusals
      side.add("", what & 31);
      if (reader->left() > 0) continue;
    }
    if (begin >= text.size()) break;
    const size_t length = std::min<size_t>(1 + what % 7, text.size() - begin);
    side.add(text.substr(begin, length));
    begin += length;
  }
  return side;
}

// Inserts, deletes and replaces bytes as the input says.
std::string edited(std::string text, Reader* reader) {
  for (int edits = reader->byte() % 8; edits > 0; --edits) {
    const size_t place = text.empty() ? 0 : reader->byte() % (text.size() + 1);
    const uint8_t how = reader->byte();
    const size_t count = std::min<size_t>(how % 3, text.size() - place);
    text.replace(place, count, std::string(how / 3 % 3, static_cast<char>(reader->byte())));
  }
  return text;
}

// Two sequences in two, so that packing is seen: the first `split` tokens and the rest.
void split(Side* side, size_t at) {
  side->offsets = {0, static_cast<int64_t>(std::min(at, side->ids.size())),
                   static_cast<int64_t>(side->ids.size())};
}

std::string bytes_of(const Side& side, size_t sequence) {
  std::string bytes;
  for (int64_t t = side.offsets[sequence]; t < side.offsets[sequence + 1]; ++t) {
    for (int symbol : align_cases::symbols_of(side, t, t + 1)) {
      if (symbol < 256) bytes += static_cast<char>(symbol);
    }
  }
  return bytes;
}

// Number of paths of minimum cost through each node of the edit graph, modulo a prime.
class Paths {
 public:
  Paths(const std::vector<int>& x, const std::vector<int>& y)
      : x_(x), y_(y), cost_((x.size() + 1) * (y.size() + 1)), ways_(cost_.size()) {
    fill();
  }
  int distance() const { return cost_[0]; }
  bool is_on_all(size_t i, size_t j) const {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(reached_[at(i, j)]) *
                                 ways_[at(i, j)] % kPrime) == ways_[0] &&
           reached_[at(i, j)] != 0;
  }

 private:
  static constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;
  size_t at(size_t i, size_t j) const { return i * (y_.size() + 1) + j; }

  template <class Visit>
  void for_each_edge(size_t i, size_t j, Visit&& visit) const {
    if (i < x_.size()) visit(at(i + 1, j), 1);
    if (j < y_.size()) visit(at(i, j + 1), 1);
    if (i == x_.size() || j == y_.size()) return;
    const bool is_special = x_[i] >= 256 && y_[j] >= 256;
    if (x_[i] == y_[j] || (is_special && (x_[i] & y_[j]) > 256)) {
      visit(at(i + 1, j + 1), 0);
    } else if (x_[i] < 256 && y_[j] < 256) {
      visit(at(i + 1, j + 1), 1);
    }
  }

  void fill() {
    const size_t n = x_.size(), m = y_.size();
    ways_[at(n, m)] = 1;
    for (size_t i = n + 1; i-- > 0;) {
      for (size_t j = m + 1; j-- > 0;) {
        if (i == n && j == m) continue;
        int& cost = cost_[at(i, j)] = 1 << 30;
        uint64_t& ways = ways_[at(i, j)];
        for_each_edge(i, j, [&](size_t to, int price) {
          if (price + cost_[to] < cost) {
            cost = price + cost_[to];
            ways = 0;
          }
          if (price + cost_[to] == cost) ways = (ways + ways_[to]) % kPrime;
        });
      }
    }
    reached_.assign(cost_.size(), 0);
    reached_[0] = 1;
    for (size_t i = 0; i <= n; ++i) {
      for (size_t j = 0; j <= m; ++j) {
        for_each_edge(i, j, [&](size_t to, int price) {
          if (price + cost_[to] == cost_[at(i, j)]) {
            reached_[to] = (reached_[to] + reached_[at(i, j)]) % kPrime;
          }
        });
      }
    }
  }

  const std::vector<int>&x_, &y_;
  std::vector<int> cost_;
  std::vector<uint64_t> ways_, reached_;
};

// Of a repaired sequence: every end that both sides have on all cheapest paths, and no other.
void expect_shared(const Side& student, const Side& teacher, int32_t max_edits,
                   const Chunks& chunks) {
  const int64_t tokens_s = student.offsets[1], tokens_t = teacher.offsets[1];
  const std::vector<int> x = align_cases::symbols_of(student, 0, tokens_s);
  const std::vector<int> y = align_cases::symbols_of(teacher, 0, tokens_t);
  if (x.empty() || y.empty() || x.size() * y.size() > 2000) return;
  const Paths paths(x, y);
  if (paths.distance() > max_edits) return;
  size_t next = 0, i = 0;
  for (int64_t s = 0; s <= tokens_s; ++s) {
    size_t j = 0;
    for (int64_t t = 0; t <= tokens_t; ++t) {
      if (paths.is_on_all(i, j)) {
        require(next < chunks.student.size() && chunks.student[next] == s &&
                    chunks.teacher[next] == t,
                "the boundaries that all cheapest paths share");
        ++next;
      }
      if (t < tokens_t) j += align_cases::symbols_of(teacher, t, t + 1).size();
    }
    if (s < tokens_s) i += align_cases::symbols_of(student, s, s + 1).size();
  }
  require(next == chunks.student.size(), "and no others");
}

void expect_properties(const Side& student, const Side& teacher, int32_t mode, int32_t max_edits) {
  Chunks chunks, swapped;
  const opd_status_t status =
      align_cases::run(student, teacher, mode, max_edits, nullptr, &chunks);
  bool is_same = true;
  for (size_t b = 0; b + 1 < student.offsets.size(); ++b) {
    is_same = is_same && bytes_of(student, b) == bytes_of(teacher, b);
  }
  require(status == (is_same || mode == OPD_ALIGN_REPAIR ? OPD_OK : OPD_BYTES_DIFFER),
          "other bytes are refused by strict alone");
  if (status != OPD_OK) return;
  const std::string wrong = align_cases::violation(student, teacher, chunks);
  require(wrong.empty(), wrong.c_str());
  require(align_cases::run(teacher, student, mode, max_edits, nullptr, &swapped) == OPD_OK,
          "the order of arguments does not matter");
  require(swapped.student == chunks.teacher && swapped.teacher == chunks.student &&
              swapped.is_aligned == chunks.is_aligned && swapped.ends == chunks.ends,
          "swapped arguments, swapped result");
  if (!is_same && student.offsets.size() == 2) {
    expect_shared(student, teacher, max_edits, chunks);
  }
  if (is_same && mode == OPD_ALIGN_STRICT) {
    require(align_cases::run(student, teacher, OPD_ALIGN_REPAIR, max_edits, nullptr, &swapped) ==
                    OPD_OK &&
                swapped == chunks,
            "nothing to repair");
  }
  Chunks self;
  require(align_cases::run(student, student, mode, max_edits, nullptr, &self) == OPD_OK &&
              self.is_aligned.size() == student.ids.size(),
          "identical tokenizers have one token per chunk");
}

// A table and ids of any bytes: a refusal, or a result that holds.
void expect_no_harm(Reader* reader) {
  Side sides[2];
  for (Side& side : sides) {
    const int size = reader->byte() % 16;
    side.table.data.resize(reader->byte() % 64);
    for (uint8_t& byte : side.table.data) byte = reader->byte() % 4;
    side.table.offsets.clear();
    for (int i = 0; i <= size; ++i) side.table.offsets.push_back(int64_t{reader->byte()} - 8);
    for (int i = 0; i < size; ++i) side.table.symbols.push_back(reader->byte() % 40);
    for (int i = reader->byte() % 16; i > 0; --i) side.ids.push_back(int{reader->byte()} - 2);
    side.offsets.push_back(static_cast<int64_t>(side.ids.size()));
  }
  Chunks chunks;
  if (align_cases::run(sides[0], sides[1], reader->byte() % 3, reader->byte(), nullptr, &chunks) ==
      OPD_OK) {
    const std::string wrong = align_cases::violation(sides[0], sides[1], chunks);
    require(wrong.empty(), wrong.c_str());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Reader reader(data, size);
  const uint8_t kind = reader.byte();
  if (kind % 4 == 3) {
    expect_no_harm(&reader);
    return 0;
  }
  const int32_t max_edits = kind & 4 ? 1 + reader.byte() % 8 : 1024;
  const size_t at = reader.byte();
  std::string text = reader.bytes(reader.byte() % 80);
  // of few letters, what differs is ambiguous
  if (kind & 8) {
    for (char& letter : text) letter = static_cast<char>('a' + (letter & 1));
  }
  // long stretches of the same bytes
  if (kind & 16) text = text + text + text + text;
  const bool is_edited = kind % 4 == 1;
  const std::string other = is_edited ? edited(text, &reader) : text;
  Side student = cut(text, &reader), teacher = cut(other, &reader);
  if (kind % 4 == 2) {
    split(&student, at);
    split(&teacher, reader.byte());
  } else {
    student.end_sequence();
    teacher.end_sequence();
  }
  for (int32_t mode : {OPD_ALIGN_STRICT, OPD_ALIGN_REPAIR}) {
    expect_properties(student, teacher, mode, max_edits);
  }
  return 0;
}
