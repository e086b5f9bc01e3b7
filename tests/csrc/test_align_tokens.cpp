// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "align_cases.h"
#include "expect.h"

namespace {

using align_cases::Chunks;
using Side = align_cases::Side<int64_t>;
constexpr int32_t kEdits = 1024;

Side side_of(const std::vector<std::string>& pieces) {
  Side side;
  for (const std::string& piece : pieces) side.add(piece);
  side.end_sequence();
  return side;
}

void expect_chunks(const Side& student, const Side& teacher, int32_t mode,
                   const std::vector<int64_t>& offsets_s, const std::vector<int64_t>& offsets_t,
                   const std::vector<uint8_t>& is_aligned, const char* what) {
  Chunks chunks, swapped;
  expect::that(align_cases::run(student, teacher, mode, kEdits, nullptr, &chunks) == OPD_OK, what);
  expect::that(chunks.student == offsets_s && chunks.teacher == offsets_t, what);
  expect::that(chunks.is_aligned == is_aligned, what);
  const std::string wrong = align_cases::violation(student, teacher, chunks);
  expect::that(wrong.empty(), wrong.c_str());
  expect::that(align_cases::run(teacher, student, mode, kEdits, nullptr, &swapped) == OPD_OK, what);
  expect::that(swapped.student == offsets_t && swapped.teacher == offsets_s &&
                   swapped.is_aligned == is_aligned,
               "swapped");
}

void test_chunks() {
  expect_chunks(side_of({"the", " cat", " sat"}), side_of({"th", "e cat", " s", "at"}),
                OPD_ALIGN_STRICT, {0, 2, 3}, {0, 2, 4}, {1, 1}, "finest common boundaries");
  expect_chunks(side_of({}), side_of({}), OPD_ALIGN_STRICT, {0}, {0}, {}, "nothing");
  expect_chunks(side_of({"a", "", "b"}), side_of({"ab"}), OPD_ALIGN_STRICT, {0, 3}, {0, 1}, {0},
                "an empty token inside the other side's token");
  Side student = side_of({}), teacher = side_of({});
  student.offsets = teacher.offsets = {0};
  student.add("", OPD_ROLE_BOS);
  student.add("ab");
  student.add("", OPD_ROLE_EOS | OPD_ROLE_PAD);
  student.end_sequence();
  teacher.add("a");
  teacher.add("b");
  teacher.add("", OPD_ROLE_EOT);
  teacher.add("", OPD_ROLE_EOS);
  teacher.end_sequence();
  expect_chunks(student, teacher, OPD_ALIGN_STRICT, {0, 1, 2, 2, 3}, {0, 0, 2, 3, 4}, {0, 1, 0, 1},
                "specials match by role, one without counterpart stands alone");
  Side unknown = side_of({});
  unknown.offsets = {0};
  unknown.add("x");
  unknown.add("", OPD_ROLE_UNK);
  unknown.end_sequence();
  expect_chunks(unknown, unknown, OPD_ALIGN_STRICT, {0, 1, 2}, {0, 1, 2}, {1, 0},
                "unk is not aligned, and has its place");
}

void test_repair() {
  // an accent as one character and as two; the boundary inside the one is in no cheapest path
  const Side student = side_of({"caf", "\xc3\xa9", " au", " lait"});
  const Side teacher = side_of({"ca", "f", "e", "\xcc\x81", " au lait"});
  expect_chunks(student, teacher, OPD_ALIGN_REPAIR, {0, 1, 2, 4}, {0, 2, 4, 5}, {1, 0, 1},
                "what differs is between boundaries that agree");
  Chunks chunks;
  expect::that(align_cases::run(student, teacher, OPD_ALIGN_STRICT, kEdits, nullptr, &chunks) ==
                   OPD_BYTES_DIFFER,
               "strict refuses");
  expect::that(std::strstr(opd_last_error(), "sequence 0 differ at byte 3: the student has "
                                             "b'caf' + b'\\xc3\\xa9 au lait'") != nullptr,
               opd_last_error());
  // where the inserted byte is cannot be told: nothing between is kept
  expect_chunks(side_of({"b", "a", "a", "c"}), side_of({"b", "a", "a", "a", "c"}), OPD_ALIGN_REPAIR,
                {0, 1, 3, 4}, {0, 1, 4, 5}, {1, 0, 1}, "no guess among equals");
  expect::that(align_cases::run(side_of({"x", "abcd", "y"}), side_of({"x", "efgh", "y"}),
                                OPD_ALIGN_REPAIR, 2, nullptr, &chunks) == OPD_OK,
               "more edits than allowed");
  expect::that(chunks.is_aligned == std::vector<uint8_t>({1, 0, 1}), "begin and end are kept");
}

// body is called for one row at a time, last first
void one_by_one(int64_t num_rows, opd_rows_fn body, void* context) {
  for (int64_t row = num_rows - 1; row >= 0; --row) body(context, row, row + 1);
}

void test_large() {
  std::mt19937 generator(0);
  Side student, teacher;
  std::vector<int64_t> letters_s, letters_t;
  for (Side* side : {&student, &teacher}) {
    for (int length = 1; length <= 20; ++length) {
      // the same bytes for every piece of a length: any cut of the text has its tokens
      side->table.add(std::string(static_cast<size_t>(length), 'a'));
    }
  }
  for (int64_t bytes : {0, 1, 17, 1 << 20, 5, 300, 40000}) {
    for (Side* side : {&student, &teacher}) {
      for (int64_t left = bytes; left > 0;) {
        const int64_t length = std::min<int64_t>(left, 1 + static_cast<int64_t>(generator() % 20));
        side->ids.push_back(length - 1);
        left -= length;
      }
      side->end_sequence();
    }
  }
  Chunks chunks, others;
  expect::that(align_cases::run(student, teacher, OPD_ALIGN_STRICT, kEdits, nullptr, &chunks) ==
                   OPD_OK,
               opd_last_error());
  const std::string wrong = align_cases::violation(student, teacher, chunks);
  expect::that(wrong.empty(), wrong.c_str());
  for (uint8_t aligned : chunks.is_aligned) expect::that(aligned == 1, "all are aligned");
  expect::that(align_cases::run(student, teacher, OPD_ALIGN_REPAIR, kEdits, one_by_one, &others) ==
                       OPD_OK &&
                   chunks == others,
               "in any order, and repair of what needs none");
  // one byte less in 1 MB of the same byte: no boundary inside is shared, and nothing takes long
  student.ids[static_cast<size_t>(student.offsets[3])] += 1;
  expect::that(align_cases::run(student, teacher, OPD_ALIGN_REPAIR, kEdits, nullptr, &others) ==
                   OPD_OK,
               opd_last_error());
  expect::that(others.ends[3] - others.ends[2] == 1, "one chunk");
}

bool is_refused(opd_status_t status, const char* text) {
  const bool refused = status == OPD_INVALID_ARGUMENT && std::strstr(opd_last_error(), text);
  if (!refused) std::printf("status %d: %s\n", status, opd_last_error());
  return refused;
}

void test_refusals() {
  Chunks chunks;
  const Side good = side_of({"a", "b"});
  const auto status = [&](const Side& side, int32_t mode = OPD_ALIGN_STRICT,
                          int32_t max_edits = kEdits) {
    return align_cases::run(good, side, mode, max_edits, nullptr, &chunks);
  };
  Side side = good;
  side.ids[1] = 2;
  expect::that(is_refused(status(side), "ids must be in [0, 2), the teacher's vocabulary, got 2 at "
                                        "position 1 of sequence 0"),
               "id");
  side.ids[1] = -1;
  expect::that(is_refused(status(side), "got -1"), "negative id");
  side = good;
  side.table.offsets = {0, 2, 1};
  expect::that(is_refused(status(side), "must rise from 0 to 2, got 2 and 1 for id 1"), "table");
  side.table.offsets = {0, 1, 3};
  expect::that(is_refused(status(side), "got 1 and 3"), "beyond the data");
  side.table.offsets = {-1, 1, 2};
  expect::that(is_refused(status(side), "got -1 and 1"), "before the data");
  side = good;
  side.table.symbols[0] = 32;
  expect::that(is_refused(status(side), "symbols must be roles, 0 .. 31, got 32"), "roles");
  side = good;
  side.offsets = {1, 2};
  expect::that(is_refused(status(side), "offsets of the teacher must start at 0"), "start");
  side.offsets = {0, -1};
  expect::that(is_refused(status(side), "must not decrease, got -1 after 0"), "order");
  expect::that(is_refused(status(good, 2), "mode must be an opd_align_mode_t, got 2"), "mode");
  expect::that(is_refused(status(good, 0, 0), "max_edits must be in [1, 4096], got 0"), "edits");
  opd_align_tokens_args_t args{};
  expect::that(is_refused(opd_align_tokens(&args), "struct_size"), "another version");
  expect::that(is_refused(opd_align_tokens(nullptr), "args must not be NULL"), "NULL");
}

}  // namespace

int main() {
  test_chunks();
  test_repair();
  test_large();
  test_refusals();
  return expect::report("test_align_tokens");
}
