// SPDX-License-Identifier: Apache-2.0
// A stable sort of items by unsigned keys, largest first: a counting sort per digit, lowest digit
// first, in time linear in the number of items.
#pragma once

#include <cstdint>
#include <utility>

namespace opd {

// The items in order, in `items` or in `spare`, which both hold `count`. Of the keys, the lowest
// kPasses * kDigitBits bits count; equal ones keep their order.
template <int kDigitBits, int kPasses, class Item, class KeyOf>
Item* sort_descending(Item* items, Item* spare, int64_t count, KeyOf key_of) {
  constexpr int kBuckets = 1 << kDigitBits;
  uint32_t places[kPasses][kBuckets] = {};
  for (int64_t i = 0; i < count; ++i) {
    const auto key = key_of(items[i]);
    for (int pass = 0; pass < kPasses; ++pass) {
      ++places[pass][(key >> (pass * kDigitBits)) & (kBuckets - 1)];
    }
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* const place = places[pass];
    bool is_sorted = false;
    uint32_t begin = 0;
    for (int bucket = kBuckets - 1; bucket >= 0; --bucket) {
      const uint32_t size = place[bucket];
      is_sorted |= size == static_cast<uint32_t>(count);
      place[bucket] = begin;
      begin += size;
    }
    // all of them have this digit
    if (is_sorted) continue;
    for (int64_t i = 0; i < count; ++i) {
      const auto key = key_of(items[i]);
      spare[place[(key >> (pass * kDigitBits)) & (kBuckets - 1)]++] = items[i];
    }
    std::swap(items, spare);
  }
  return items;
}

}  // namespace opd
