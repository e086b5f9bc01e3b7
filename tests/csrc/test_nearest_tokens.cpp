// SPDX-License-Identifier: Apache-2.0
// opd_nearest_tokens against the textbook's whole table, and what it refuses.
#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "expect.h"
#include "opd/nearest_tokens.h"

namespace {

struct Strings {
  std::string data;
  std::vector<int64_t> offsets{0};

  void add(const std::string& text) {
    data += text;
    offsets.push_back(static_cast<int64_t>(data.size()));
  }
  opd_token_table_t view(const uint8_t* symbols = nullptr) const {
    return {reinterpret_cast<const uint8_t*>(data.data()), static_cast<int64_t>(data.size()),
            offsets.data(), symbols, static_cast<int64_t>(offsets.size()) - 1};
  }
  std::string at(size_t i) const { return data.substr(offsets[i], offsets[i + 1] - offsets[i]); }
  size_t size() const { return offsets.size() - 1; }
};

int64_t edits(const std::string& a, const std::string& b) {
  std::vector<std::vector<int64_t>> table(a.size() + 1, std::vector<int64_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        table[i][j] = static_cast<int64_t>(i + j);
        continue;
      }
      table[i][j] = std::min({table[i - 1][j] + 1, table[i][j - 1] + 1,
                              table[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
    }
  }
  return table[a.size()][b.size()];
}

opd_nearest_tokens_args_t arguments(const Strings& queries, const Strings& vocabulary,
                                    std::vector<int64_t>& nearest, std::vector<int64_t>& distances) {
  nearest.assign(queries.size(), -7);
  distances.assign(queries.size(), -7);
  opd_nearest_tokens_args_t args;
  std::memset(&args, 0, sizeof(args));
  args.struct_size = sizeof(args);
  args.queries = queries.view();
  args.vocabulary = vocabulary.view();
  args.nearest = nearest.data();
  args.distances = distances.data();
  return args;
}

void compare_with_the_table(size_t longest, int letters, unsigned seed) {
  std::mt19937 random(seed);
  const auto text = [&] {
    std::string made(random() % (longest + 1), ' ');
    for (char& letter : made) letter = static_cast<char>('a' + static_cast<int>(random() % letters));
    return made;
  };
  Strings queries, vocabulary;
  for (int i = 0; i < 40; ++i) queries.add(text());
  std::vector<uint8_t> is_special;
  for (int i = 0; i < 70; ++i) {
    vocabulary.add(text());
    is_special.push_back(random() % 8 == 0);
  }
  std::vector<int64_t> nearest, distances;
  opd_nearest_tokens_args_t args = arguments(queries, vocabulary, nearest, distances);
  args.vocabulary = vocabulary.view(is_special.data());
  expect::that(opd_nearest_tokens(&args) == OPD_OK, "it runs");
  for (size_t i = 0; i < queries.size(); ++i) {
    int64_t id = -1, least = -1;
    for (size_t j = 0; !queries.at(i).empty() && j < vocabulary.size(); ++j) {
      if (is_special[j] || vocabulary.at(j).empty()) continue;
      const int64_t distance = edits(queries.at(i), vocabulary.at(j));
      if (id < 0 || distance < least) id = static_cast<int64_t>(j), least = distance;
    }
    expect::that(nearest[i] == id, "the lowest of the nearest ids");
    expect::that(distances[i] == least, "its distance");
  }
}

void refusals() {
  Strings queries, vocabulary;
  queries.add("a");
  std::vector<int64_t> nearest, distances;
  opd_nearest_tokens_args_t args = arguments(queries, vocabulary, nearest, distances);
  expect::that(opd_nearest_tokens(&args) == OPD_OK, "an empty vocabulary is one");
  expect::that(nearest[0] == -1 && distances[0] == -1, "and has nothing near");
  expect::that(opd_nearest_tokens(nullptr) == OPD_INVALID_ARGUMENT, "no arguments");
  args.struct_size = 8;
  expect::that(opd_nearest_tokens(&args) == OPD_INVALID_ARGUMENT, "another header's struct");
  args = arguments(queries, vocabulary, nearest, distances);
  const int64_t falling[] = {0, 3, 2};
  args.vocabulary = {reinterpret_cast<const uint8_t*>("abc"), 3, falling, nullptr, 2};
  expect::that(opd_nearest_tokens(&args) == OPD_INVALID_ARGUMENT, "offsets that fall");
  args = arguments(queries, vocabulary, nearest, distances);
  args.queries.data_size = 0;
  expect::that(opd_nearest_tokens(&args) == OPD_INVALID_ARGUMENT, "fewer bytes than offsets say");
  args = arguments(queries, vocabulary, nearest, distances);
  args.nearest = nullptr;
  expect::that(opd_nearest_tokens(&args) == OPD_INVALID_ARGUMENT, "nowhere to write");
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 20; ++seed) {
    compare_with_the_table(7, 3, seed);
    compare_with_the_table(12, 26, seed);
    compare_with_the_table(64, 2, seed);
  }
  // both sides of a word of 64 bytes
  for (unsigned seed = 0; seed < 4; ++seed) compare_with_the_table(150, 3, seed);
  refusals();
  return expect::report("test_nearest_tokens");
}
