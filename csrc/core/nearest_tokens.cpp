// SPDX-License-Identifier: Apache-2.0
// Nearest tokens by byte edit distance, exactly. Candidates come in the order of how much their
// length differs, which no distance is below, and most are left after one comparison of the sets of
// their bytes; the rest take a few operations per byte, 64 cells of the textbook's table at a time
// (Myers 1999, doi:10.1145/316542.316550).
#include "opd/nearest_tokens.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "rows.h"

namespace opd {
namespace {

constexpr char kOp[] = "nearest_tokens";
constexpr int64_t kWord = 64;

struct Bytes {
  const uint8_t* data;
  int64_t size;
};

// nothing of an id with a role
Bytes bytes_of(const opd_token_table_t& table, int64_t id) {
  if (table.symbols != nullptr && table.symbols[id] != 0) return {table.data, 0};
  return {table.data + table.offsets[id], table.offsets[id + 1] - table.offsets[id]};
}

void check_table(const char* name, const opd_token_table_t& table) {
  OPD_CHECK(table.vocab_size >= 0, kOp, ": ", name, " must have vocab_size >= 0, got ",
            table.vocab_size);
  check_pointer(kOp, "offsets", table.offsets);
  OPD_CHECK(table.offsets[0] == 0, kOp, ": offsets of ", name, " must begin with 0, got ",
            table.offsets[0]);
  for (int64_t id = 0; id < table.vocab_size; ++id) {
    OPD_CHECK(table.offsets[id] <= table.offsets[id + 1], kOp, ": offsets of ", name,
              " must never decrease, got ", table.offsets[id + 1], " after ", table.offsets[id]);
  }
  const int64_t end = table.offsets[table.vocab_size];
  OPD_CHECK(end <= table.data_size, kOp, ": ", name, " must have the ", end,
            " bytes of its offsets, got ", table.data_size);
  if (end > 0) check_pointer(kOp, "data", table.data);
}

// which bytes occur, modulo 64
uint64_t signature(Bytes text) {
  uint64_t set = 0;
  for (int64_t i = 0; i < text.size; ++i) set |= uint64_t{1} << (text.data[i] % kWord);
  return set;
}

// an edit takes away at most one byte that the other lacks, and adds at most one that this one lacks
int64_t fewest_edits(uint64_t a, uint64_t b) {
  return std::max(__builtin_popcountll(a & ~b), __builtin_popcountll(b & ~a));
}

// A string of at most 64 bytes, of which distances to others are asked for.
class Pattern {
 public:
  explicit Pattern(Bytes text) : size_(text.size) {
    for (int64_t i = 0; i < text.size; ++i) places_[text.data[i]] |= uint64_t{1} << i;
  }

  // or any number above `most` if it is more
  int64_t distance(Bytes text, int64_t most) const {
    const uint64_t last = uint64_t{1} << (size_ - 1);
    // vertical differences of the table's column: +1 in `up`, -1 in `down`
    uint64_t up = ~uint64_t{0}, down = 0;
    int64_t score = size_;
    for (int64_t i = 0; i < text.size; ++i) {
      const uint64_t equal = places_[text.data[i]];
      const uint64_t diagonal = equal | down;
      const uint64_t carried = (((equal & up) + up) ^ up) | equal;
      uint64_t right = down | ~(carried | up), left = up & carried;
      score += (right & last) != 0;
      score -= (left & last) != 0;
      if (score - (text.size - 1 - i) > most) return most + 1;
      // the first row counts the bytes of the text: each column is one more
      right = (right << 1) | 1;
      left <<= 1;
      up = left | ~(diagonal | right);
      down = right & diagonal;
    }
    return score;
  }

 private:
  int64_t size_;
  std::array<uint64_t, 256> places_{};
};

// The textbook's table, a row at a time, for two strings of more than 64 bytes.
int64_t long_distance(Bytes a, Bytes b, std::vector<int64_t>& row) {
  row.resize(static_cast<size_t>(b.size + 1));
  for (int64_t j = 0; j <= b.size; ++j) row[j] = j;
  for (int64_t i = 1; i <= a.size; ++i) {
    int64_t diagonal = row[0];
    row[0] = i;
    for (int64_t j = 1; j <= b.size; ++j) {
      const int64_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a.data[i - 1] != b.data[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size];
}

// Ids that count by length, then by id, each with its signature.
struct Index {
  std::vector<int64_t> ids;
  std::vector<uint64_t> signatures;
  std::vector<int64_t> begins;  // of each length; one more at the end

  explicit Index(const opd_token_table_t& vocabulary) {
    int64_t longest = 0;
    for (int64_t id = 0; id < vocabulary.vocab_size; ++id) {
      longest = std::max(longest, bytes_of(vocabulary, id).size);
    }
    begins.assign(static_cast<size_t>(longest + 2), 0);
    for (int64_t id = 0; id < vocabulary.vocab_size; ++id) {
      const int64_t size = bytes_of(vocabulary, id).size;
      if (size > 0) ++begins[size + 1];
    }
    for (size_t size = 1; size < begins.size(); ++size) begins[size] += begins[size - 1];
    ids.resize(static_cast<size_t>(begins.back()));
    signatures.resize(ids.size());
    std::vector<int64_t> next(begins.begin(), begins.end() - 1);
    for (int64_t id = 0; id < vocabulary.vocab_size; ++id) {
      const Bytes token = bytes_of(vocabulary, id);
      if (token.size == 0) continue;
      const int64_t place = next[token.size]++;
      ids[place] = id;
      signatures[place] = signature(token);
    }
  }

  int64_t longest() const { return static_cast<int64_t>(begins.size()) - 2; }
};

struct Nearest {
  int64_t id = -1;
  int64_t distance = std::numeric_limits<int64_t>::max() - 1;

  // whether an id that is at least so far could still be taken
  bool admits(int64_t candidate, int64_t at_least) const {
    return at_least < distance || (at_least == distance && candidate < id);
  }
};

Nearest nearest(const opd_token_table_t& vocabulary, const Index& index, Bytes query) {
  Nearest best;
  if (query.size == 0 || index.ids.empty()) return best;
  const uint64_t set = signature(query);
  const bool is_short = query.size <= kWord;
  const Pattern pattern(is_short ? query : Bytes{query.data, 0});
  std::vector<int64_t> row;
  const auto scan = [&](int64_t size) {
    for (int64_t place = index.begins[size]; place < index.begins[size + 1]; ++place) {
      const int64_t id = index.ids[place];
      if (!best.admits(id, fewest_edits(set, index.signatures[place]))) continue;
      const Bytes candidate = bytes_of(vocabulary, id);
      int64_t distance;
      if (is_short) {
        distance = pattern.distance(candidate, best.distance);
      } else if (size <= kWord) {
        distance = Pattern(candidate).distance(query, best.distance);
      } else {
        distance = long_distance(query, candidate, row);
      }
      if (best.admits(id, distance)) best = {id, distance};
    }
  };
  const int64_t furthest = std::max(query.size - 1, index.longest() - query.size);
  for (int64_t difference = 0; difference <= furthest && difference <= best.distance; ++difference) {
    const int64_t shorter = query.size - difference, longer = query.size + difference;
    if (shorter >= 1 && shorter <= index.longest()) scan(shorter);
    if (difference > 0 && longer <= index.longest()) scan(longer);
  }
  return best;
}

void run(const opd_nearest_tokens_args_t* args) {
  check_pointer(kOp, "args", args);
  check_struct_size(kOp, args->struct_size, sizeof(*args));
  check_table("queries", args->queries);
  check_table("vocabulary", args->vocabulary);
  const int64_t num_queries = args->queries.vocab_size;
  if (num_queries == 0) return;
  check_pointer(kOp, "nearest", args->nearest);
  const Index index(args->vocabulary);
  parallel_rows(args->parallel_for, num_queries, [&](int64_t i) {
    const Nearest found = nearest(args->vocabulary, index, bytes_of(args->queries, i));
    args->nearest[i] = found.id;
    if (args->distances != nullptr) args->distances[i] = found.id < 0 ? -1 : found.distance;
  });
}

}  // namespace
}  // namespace opd

extern "C" opd_status_t opd_nearest_tokens(const opd_nearest_tokens_args_t* args) {
  return opd::guarded([&] { opd::run(args); });
}
