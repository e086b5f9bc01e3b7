// SPDX-License-Identifier: Apache-2.0
// A call of opd_align_tokens with its buffers, and what must hold of any result; for the test and for
// the fuzzer.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "opd/opd.h"

namespace align_cases {

struct Table {
  std::vector<uint8_t> data;
  std::vector<int64_t> offsets = {0};
  std::vector<uint8_t> symbols;

  int64_t add(const std::string& bytes, uint8_t roles = 0) {
    data.insert(data.end(), bytes.begin(), bytes.end());
    offsets.push_back(static_cast<int64_t>(data.size()));
    symbols.push_back(roles);
    return static_cast<int64_t>(symbols.size()) - 1;
  }
  opd_token_table_t get() const {
    return {data.data(), static_cast<int64_t>(data.size()), offsets.data(), symbols.data(),
            static_cast<int64_t>(symbols.size())};
  }
};

template <class Id>
struct Side {
  Table table;
  std::vector<Id> ids;
  std::vector<int64_t> offsets = {0};

  // one token of its own for each piece
  void add(const std::string& bytes, uint8_t roles = 0) {
    ids.push_back(static_cast<Id>(table.add(bytes, roles)));
  }
  void end_sequence() { offsets.push_back(static_cast<int64_t>(ids.size())); }
  opd_token_ids_t get() const {
    return {ids.data(), nullptr, static_cast<int32_t>(sizeof(Id)), offsets.data()};
  }
};

struct Chunks {
  std::vector<int64_t> student, teacher, num_bytes, ends;
  std::vector<uint8_t> is_aligned;
  bool operator==(const Chunks& other) const {
    return student == other.student && teacher == other.teacher && num_bytes == other.num_bytes &&
           ends == other.ends && is_aligned == other.is_aligned;
  }
};

template <class Id>
opd_status_t run(const Side<Id>& student, const Side<Id>& teacher, int32_t mode, int32_t max_edits,
                 opd_parallel_for_fn parallel_for, Chunks* chunks) {
  const size_t room = student.ids.size() + teacher.ids.size();
  const size_t sequences = student.offsets.size() - 1;
  // one element at least, so that no pointer is NULL
  chunks->student.assign(room + 1, -1);
  chunks->teacher.assign(room + 1, -1);
  chunks->num_bytes.assign(room + 1, -1);
  chunks->is_aligned.assign(room + 1, 7);
  chunks->ends.assign(sequences + 1, -1);
  opd_align_tokens_args_t args{};
  args.struct_size = sizeof(args);
  args.num_sequences = static_cast<int64_t>(sequences);
  args.student = student.get();
  args.teacher = teacher.get();
  args.student_table = student.table.get();
  args.teacher_table = teacher.table.get();
  args.mode = mode;
  args.max_edits = max_edits;
  args.parallel_for = parallel_for;
  args.student_offsets = chunks->student.data();
  args.teacher_offsets = chunks->teacher.data();
  args.is_aligned = chunks->is_aligned.data();
  args.num_bytes = chunks->num_bytes.data();
  args.chunk_ends = chunks->ends.data();
  const opd_status_t status = opd_align_tokens(&args);
  if (status != OPD_OK) return status;
  const size_t count = sequences == 0 ? 0 : static_cast<size_t>(chunks->ends[sequences - 1]);
  chunks->student.resize(count + 1);
  chunks->teacher.resize(count + 1);
  chunks->num_bytes.resize(count);
  chunks->is_aligned.resize(count);
  chunks->ends.resize(sequences);
  return status;
}

// The symbols of tokens begin .. end, as text: bytes, and specials and empty tokens as they are.
template <class Id>
std::vector<int> symbols_of(const Side<Id>& side, int64_t begin, int64_t end) {
  std::vector<int> symbols;
  for (int64_t t = begin; t < end; ++t) {
    const size_t id = static_cast<size_t>(side.ids[static_cast<size_t>(t)]);
    const int64_t first = side.table.offsets[id], last = side.table.offsets[id + 1];
    const int roles = side.table.symbols[id];
    if (roles != 0 || first == last) symbols.push_back(256 | (roles == 0 ? 32 : roles));
    if (roles != 0) continue;
    for (int64_t i = first; i < last; ++i) {
      symbols.push_back(side.table.data[static_cast<size_t>(i)]);
    }
  }
  return symbols;
}

inline bool are_same(const std::vector<int>& x, const std::vector<int>& y) {
  if (x.size() != y.size()) return false;
  for (size_t i = 0; i < x.size(); ++i) {
    const bool is_special = x[i] >= 256;
    if (is_special ? (x[i] & y[i] & ~OPD_ROLE_UNK) <= 256 : x[i] != y[i]) return false;
  }
  return true;
}

// "" or what does not hold: chunks tile every sequence of both sides, are not empty, are aligned
// where their symbols are the same, and have the student's bytes.
template <class Id>
std::string violation(const Side<Id>& student, const Side<Id>& teacher, const Chunks& chunks) {
  if (chunks.student[0] != 0 || chunks.teacher[0] != 0) return "offsets start at 0";
  const size_t count = chunks.is_aligned.size();
  for (size_t b = 0; b < chunks.ends.size(); ++b) {
    if (chunks.ends[b] < (b == 0 ? 0 : chunks.ends[b - 1])) return "ends do not decrease";
    const size_t end = static_cast<size_t>(chunks.ends[b]);
    if (chunks.student[end] != student.offsets[b + 1]) return "the student's sequence is tiled";
    if (chunks.teacher[end] != teacher.offsets[b + 1]) return "the teacher's sequence is tiled";
  }
  for (size_t c = 0; c < count; ++c) {
    const int64_t s = chunks.student[c], next_s = chunks.student[c + 1];
    const int64_t t = chunks.teacher[c], next_t = chunks.teacher[c + 1];
    if (next_s < s || next_t < t || (next_s == s && next_t == t)) return "chunks have tokens";
    const std::vector<int> x = symbols_of(student, s, next_s), y = symbols_of(teacher, t, next_t);
    if (chunks.is_aligned[c] != (are_same(x, y) ? 1 : 0)) return "aligned means the same";
    int64_t bytes = 0;
    for (int symbol : x) bytes += symbol < 256;
    if (chunks.num_bytes[c] != bytes) return "bytes of the student";
  }
  return "";
}

}  // namespace align_cases
