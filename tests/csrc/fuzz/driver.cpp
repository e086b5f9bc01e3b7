// SPDX-License-Identifier: Apache-2.0
// A coverage-guided fuzzer for compilers that have -fsanitize-coverage and no libFuzzer (gcc): inputs
// that reach an edge, or a closer comparison, that none has reached before are kept and mutated.
//   fuzz_align_tokens [seconds] [seed]
// An input that ends the process is left in crash.bin; give its path as the only argument to run it
// again.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMapSize = 1 << 16, kMaxInput = 600;
// how often an input took an edge, in powers of two; and which of these have been seen at all
uint8_t counts[kMapSize];
uint8_t seen[kMapSize];
uintptr_t previous = 0;
bool is_counting = false;
std::vector<uint8_t> current;
// values that the code has compared with: what a mutation may try
std::vector<uint64_t> compared;

void hit(uintptr_t key) {
  uint8_t& count = counts[(key ^ (key >> 16)) % kMapSize];
  if (count < 255) ++count;
}

// __builtin_return_address of the caller: where in the code under test this is
void edge(uintptr_t place) {
  if (!is_counting) return;
  hit(place * 0x9e3779b97f4a7c15u ^ previous);
  previous = place >> 1;
}

void comparison(uintptr_t place, uint64_t x, uint64_t y) {
  if (!is_counting) return;
  // how many bits agree
  const int agree = x == y ? 64 : __builtin_clzll(x ^ y);
  hit(place * 0x9e3779b97f4a7c15u + static_cast<uintptr_t>(agree) * 0xc2b2ae3d27d4eb4fu);
  if (compared.size() < 64 && x != y) compared.push_back(y);
}

}  // namespace

#define OPD_CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))
extern "C" {
void __sanitizer_cov_trace_pc() { edge(OPD_CALLER); }
void __sanitizer_cov_trace_cmp1(uint8_t x, uint8_t y) { comparison(OPD_CALLER, x, y); }
void __sanitizer_cov_trace_cmp2(uint16_t x, uint16_t y) { comparison(OPD_CALLER, x, y); }
void __sanitizer_cov_trace_cmp4(uint32_t x, uint32_t y) { comparison(OPD_CALLER, x, y); }
void __sanitizer_cov_trace_cmp8(uint64_t x, uint64_t y) { comparison(OPD_CALLER, x, y); }
void __sanitizer_cov_trace_const_cmp1(uint8_t x, uint8_t y) { comparison(OPD_CALLER, y, x); }
void __sanitizer_cov_trace_const_cmp2(uint16_t x, uint16_t y) { comparison(OPD_CALLER, y, x); }
void __sanitizer_cov_trace_const_cmp4(uint32_t x, uint32_t y) { comparison(OPD_CALLER, y, x); }
void __sanitizer_cov_trace_const_cmp8(uint64_t x, uint64_t y) { comparison(OPD_CALLER, y, x); }
void __sanitizer_cov_trace_switch(uint64_t, void*) {}
// of AddressSanitizer and UndefinedBehaviorSanitizer, before they end the process
void __sanitizer_set_death_callback(void (*callback)());
}

namespace {

void save_crash() {
  std::ofstream("crash.bin", std::ios::binary)
      .write(reinterpret_cast<const char*>(current.data()),
             static_cast<std::streamsize>(current.size()));
  std::fprintf(stderr, "fuzz: the input of %zu bytes is in crash.bin\n", current.size());
}

void save_and_die(int) {
  save_crash();
  std::_Exit(1);
}

bool is_zero(const uint8_t* eight) {
  uint64_t word;
  std::memcpy(&word, eight, sizeof(word));
  return word == 0;
}

// Runs `current`; whether it has gone where none has.
bool run() {
  std::memset(counts, 0, sizeof(counts));
  previous = 0;
  is_counting = true;
  LLVMFuzzerTestOneInput(current.data(), current.size());
  is_counting = false;
  bool is_new = false;
  for (size_t i = 0; i < kMapSize; ++i) {
    // eight at a time: nearly all are 0
    while (i % 8 == 0 && i < kMapSize && is_zero(counts + i)) i += 8;
    if (i == kMapSize) break;
    if (counts[i] == 0) continue;
    const uint8_t bucket = static_cast<uint8_t>(1 << (31 - __builtin_clz(counts[i])));
    is_new |= (seen[i] & bucket) == 0;
    seen[i] |= bucket;
  }
  return is_new;
}

using Random = std::mt19937_64;

size_t below(Random* random, size_t limit) { return limit == 0 ? 0 : (*random)() % limit; }

void mutate(Random* random, const std::vector<std::vector<uint8_t>>& corpus) {
  std::vector<uint8_t>& input = current;
  for (size_t times = size_t{1} << below(random, 5); times > 0; --times) {
    const size_t place = below(random, input.size() + 1);
    const auto at = input.begin() + static_cast<std::ptrdiff_t>(place);
    const size_t length = std::min(below(random, 16) + 1, input.size() - place);
    switch (below(random, 7)) {
      case 0:
        if (place < input.size()) input[place] ^= static_cast<uint8_t>(1 << below(random, 8));
        break;
      case 1:
        if (place < input.size()) input[place] = static_cast<uint8_t>((*random)());
        break;
      case 2:
        input.insert(at, below(random, 8) + 1, static_cast<uint8_t>((*random)()));
        break;
      case 3:
        input.erase(at, at + static_cast<std::ptrdiff_t>(length));
        break;
      case 4: {
        const std::vector<uint8_t> copy(at, at + static_cast<std::ptrdiff_t>(length));
        const size_t to = below(random, input.size() + 1);
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(to), copy.begin(), copy.end());
        break;
      }
      case 5: {
        const std::vector<uint8_t>& other = corpus[below(random, corpus.size())];
        const size_t from = below(random, other.size() + 1);
        input.resize(place);
        input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
        break;
      }
      default:
        if (!compared.empty() && place < input.size()) {
          input[place] = static_cast<uint8_t>(compared[below(random, compared.size())]);
        }
    }
  }
  if (input.size() > kMaxInput) input.resize(kMaxInput);
}

}  // namespace

int main(int argc, char** argv) {
  __sanitizer_set_death_callback(save_crash);
  // __builtin_trap
  std::signal(SIGILL, save_and_die);
  std::signal(SIGTRAP, save_and_die);
  std::signal(SIGABRT, save_and_die);
  if (argc == 2 && std::strspn(argv[1], "0123456789") != std::strlen(argv[1])) {
    std::ifstream file(argv[1], std::ios::binary);
    current.assign(std::istreambuf_iterator<char>(file), {});
    return run() ? 0 : 1;
  }
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10.0;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
  std::vector<std::vector<uint8_t>> corpus;
  current = {0};
  run();
  corpus.push_back(current);
  uint64_t executions = 1;
  const std::time_t begin = std::time(nullptr);
  while (std::difftime(std::time(nullptr), begin) < seconds) {
    // new inputs more often: what they have found is nearer to what has not been found
    const size_t back = std::min(below(&random, corpus.size()), below(&random, corpus.size()));
    current = corpus[corpus.size() - 1 - back];
    mutate(&random, corpus);
    compared.clear();
    ++executions;
    if (run()) corpus.push_back(current);
  }
  size_t edges = 0;
  for (uint8_t buckets : seen) edges += buckets != 0;
  std::printf("fuzz: %llu executions, %zu places of the map, %zu inputs kept, nothing found\n",
              static_cast<unsigned long long>(executions), edges, corpus.size());
  return 0;
}
