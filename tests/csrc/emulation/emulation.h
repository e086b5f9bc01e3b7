// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the CPU, thread by thread, so that their arithmetic and their barriers are
// tested where there is no GPU. A thread is a fiber that runs until it waits; the blocks of a cluster
// run together, clusters one after another. What a GPU leaves open is chosen against the kernel.
// Shared memory starts as NaN, and asynchronous copies land as late as they may. An
// OPD_EMULATION_SEED other than 0 shuffles the threads, keeps a block or a warp waiting until nobody
// else can go on, and lets some of the copies land at once. A barrier that not every thread reaches is
// an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace emulation {

struct Dim {
  unsigned x, y, z;
};

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA kernel: %s\n", what);
  std::abort();
}

// -- fibers ----------------------------------------------------------------------------------------

using Stack = std::unique_ptr<char[]>;
constexpr size_t kStackBytes = 256 * 1024;

#if defined(__x86_64__)
// Saves what the ABI lets a function keep, swaps stacks, restores. A signal mask, which swapcontext
// saves with two system calls, is of no interest here.
extern "C" void opd_emulation_switch(void** save, void* load);
__asm__(
    ".weak opd_emulation_switch\n"
    ".type opd_emulation_switch, @function\n"
    "opd_emulation_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size opd_emulation_switch, . - opd_emulation_switch\n");
#endif

class Fiber {
 public:
  // `entry` must not return. Stacks of other numbers begin in other sets of the caches: a thousand
  // that begin in the same ones would evict each other at every switch.
  void start(char* stack, unsigned number, void (*entry)()) {
    const size_t stack_bytes = kStackBytes - 64 * (number % 64);
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes) & ~uintptr_t(63);
    void** slots = reinterpret_cast<void**>(top);
    --slots;  // as after a call: the stack is aligned before the return address
    *slots = nullptr;
    *--slots = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--slots = nullptr;
    point_ = slots;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = stack_bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }
  void switch_to(Fiber& other) {
#if defined(__x86_64__)
    opd_emulation_switch(&point_, other.point_);
#else
    swapcontext(&context_, &other.context_);
#endif
  }

 private:
  void* point_ = nullptr;
#if !defined(__x86_64__)
  ucontext_t context_;
#endif
};

// -- a cluster of blocks -----------------------------------------------------------------------------

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

// An asynchronous copy, or store of a value, that has been issued and has not landed.
struct Copy {
  void* to;
  const void* from;  // nullptr: `value`
  size_t bytes;
  double value = 0;
};

struct Block {
  Dim index;
  unsigned rank = 0;  // in its cluster
  unsigned live = 0;  // threads that have not returned
  std::vector<unsigned> live_in_warp;
  std::unique_ptr<char[]> storage;
  char* shared = nullptr;
  size_t shared_bytes = 0;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<uint64_t> lanes[2];  // what a warp's lanes exchange, this time and the next
  std::vector<char> votes;      // of the threads
};

struct Machine;

struct Thread {
  Fiber fiber;
  Dim index;
  Machine* machine = nullptr;
  Block* block = nullptr;
  unsigned warp = 0, lane = 0;
  unsigned exchanges = 0;
  bool done = false;
  // the barrier that it waits at, and for how many; a turn before they have come would change nothing
  const Barrier* barrier = nullptr;
  unsigned generation = 0;
  const unsigned* expected = nullptr;

  bool waits() const {
    return barrier != nullptr && barrier->generation == generation && barrier->arrived < *expected;
  }
};

// The threads that are kept waiting: none, those of a block, or those of a warp.
struct Laggards {
  const Block* block = nullptr;
  bool whole_block = false;
  unsigned warp = 0;
  bool include(const Thread& thread) const {
    return thread.block == block && (whole_block || thread.warp == warp);
  }
};

struct Machine {
  Dim grid, threads;
  unsigned cluster_size = 1;
  std::vector<Block> blocks;
  std::vector<Thread> fibers;
  std::vector<Stack> stacks;
  std::vector<unsigned> order;  // of a round, in which each thread has at most one turn
  size_t turn = 0;
  Laggards laggards;
  Barrier cluster_barrier;
  unsigned live = 0;
  uint64_t progress = 0;
  Fiber scheduler;
  const std::function<void()>* kernel = nullptr;
  std::vector<std::pair<void*, Copy>> copies;  // by mbarrier
  std::mt19937 random;
  const char* waiting_for = "";
};

// The thread that runs. Kernels ask for it all the time, and one of the calling thread would take a
// call to find: threads of the host that launch at once take turns.
inline Thread* running = nullptr;

inline Thread& self() { return *running; }

// That of the calling thread of the host.
inline Machine& machine() {
  static thread_local Machine instance;
  return instance;
}

// Whose turn comes next in this round, or nobody's.
inline Thread* next_thread(Machine& m) {
  while (m.turn < m.order.size()) {
    Thread& thread = m.fibers[m.order[m.turn++]];
    if (!thread.done && !thread.waits() && !m.laggards.include(thread)) return &thread;
  }
  return nullptr;
}

// Ends the turn of the thread that runs.
inline void yield() {
  Thread& mine = self();
  Machine& m = *mine.machine;
  if (Thread* const next = next_thread(m)) {
    running = next;
    mine.fiber.switch_to(next->fiber);
  } else {
    mine.fiber.switch_to(m.scheduler);
  }
}

// Waits until `expected` threads, which become fewer as threads return, have arrived.
inline void wait_at(Barrier& barrier, const unsigned& expected, const char* what) {
  Thread& mine = self();
  Machine& m = *mine.machine;
  const unsigned generation = barrier.generation;
  ++barrier.arrived;
  ++m.progress;
  while (barrier.generation == generation) {
    if (barrier.arrived >= expected) {
      barrier.arrived = 0;
      ++barrier.generation;
      ++m.progress;
      break;
    }
    m.waiting_for = what;
    mine.barrier = &barrier, mine.generation = generation, mine.expected = &expected;
    yield();
    mine.barrier = nullptr;
  }
}

inline void sync_block() {
  Block& block = *self().block;
  wait_at(block.barrier, block.live, "__syncthreads");
}

// Whether any thread of the block gives true.
inline bool sync_block_or(bool value) {
  Thread& thread = self();
  Block& block = *thread.block;
  if (block.live != block.votes.size()) fail("a vote of threads some of which have returned");
  block.votes[thread.index.x] = value;
  sync_block();
  const bool any = std::find(block.votes.begin(), block.votes.end(), 1) != block.votes.end();
  sync_block();
  return any;
}

inline void sync_cluster() {
  Machine& m = *self().machine;
  wait_at(m.cluster_barrier, m.live, "a cluster barrier");
}

inline void sync_warp() {
  Thread& thread = self();
  Block& block = *thread.block;
  wait_at(block.warps[thread.warp], block.live_in_warp[thread.warp], "__syncwarp");
}

// The 8 bytes of each lane of the warp in this exchange. Those of the one after it are elsewhere, and
// before the second one after it every lane has been through the next: so nobody's are overwritten
// before they are read, and a lane that has read need not wait.
inline uint64_t* exchanged(Thread& thread) {
  return thread.block->lanes[thread.exchanges++ % 2].data() + thread.warp * 32;
}

// Every lane of the warp gives a value and takes that of lane `from`.
template <class T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  Thread& thread = self();
  uint64_t* const lanes = exchanged(thread);
  std::memcpy(&lanes[thread.lane], &value, sizeof(T));
  sync_warp();
  T taken;
  std::memcpy(&taken, &lanes[from & 31], sizeof(T));
  return taken;
}

// A bit for each lane of the warp that gives true.
inline uint32_t ballot(bool value) {
  Thread& thread = self();
  uint64_t* const lanes = exchanged(thread);
  lanes[thread.lane] = value;
  sync_warp();
  uint32_t bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(lanes[lane] != 0) << lane;
  return bits;
}

// The same address in the shared memory of another block of the cluster.
inline void* peer(void* pointer, unsigned rank) {
  Machine& m = *self().machine;
  Block& mine = *self().block;
  const ptrdiff_t offset = static_cast<char*>(pointer) - mine.shared;
  if (offset < 0 || size_t(offset) >= mine.shared_bytes) fail("not an address in shared memory");
  if (rank >= m.cluster_size) fail("no such block in the cluster");
  return m.blocks[rank].shared + offset;
}

inline void check_shared(const void* pointer, size_t bytes) {
  const Block& block = *self().block;
  const char* at = static_cast<const char*>(pointer);
  if (at < block.shared || at + bytes > block.shared + block.shared_bytes) {
    fail("a copy beyond shared memory");
  }
}

inline unsigned seed() {
  const char* text = std::getenv("OPD_EMULATION_SEED");
  return text ? static_cast<unsigned>(std::atoi(text)) : 0;
}

// Whether a copy that is issued now lands now.
inline bool lands_at_once() { return seed() != 0 && machine().random() % 2 == 0; }

inline void carry_out(const Copy& copy) {
  std::memcpy(copy.to, copy.from ? copy.from : &copy.value, copy.bytes);
}

inline size_t issue(const Copy& copy, void* mbarrier) {
  ++machine().progress;
  if (lands_at_once()) return carry_out(copy), copy.bytes;
  machine().copies.push_back({mbarrier, copy});
  return 0;
}

// A copy of bulk, or of one value. Its bytes if it has landed: those of the others are land()'s.
inline size_t copy_bulk(void* to, const void* from, size_t bytes, void* mbarrier) {
  check_shared(to, bytes);
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) & 15) {
    fail("a bulk copy needs 16-byte addresses and sizes");
  }
  return issue({to, from, bytes}, mbarrier);
}

inline size_t store_value(double* to, double value, void* mbarrier) {
  return issue({to, nullptr, sizeof(double), value}, mbarrier);
}

// Lets the copies of this mbarrier land; their bytes.
inline size_t land(void* mbarrier) {
  auto& copies = machine().copies;
  size_t bytes = 0;
  for (auto& [owner, copy] : copies) {
    if (owner != mbarrier) continue;
    carry_out(copy);
    bytes += copy.bytes;
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(),
                              [&](const auto& item) { return item.first == mbarrier; }),
               copies.end());
  return bytes;
}

inline void thread_main() {
  Thread& mine = self();
  Machine& m = *mine.machine;
  (*m.kernel)();
  mine.done = true;
  --m.live;
  --mine.block->live;
  --mine.block->live_in_warp[mine.warp];
  ++m.progress;
  yield();
  fail("a fiber ran on after its end");
}

inline Laggards choose_laggards(Machine& m, unsigned warps) {
  if (seed() == 0) return {};
  const Block* const block = &m.blocks[m.random() % m.cluster_size];
  return {block, m.random() % 2 == 0, static_cast<unsigned>(m.random() % warps)};
}

inline void run_cluster(Machine& m, unsigned first_block, size_t shared_bytes) {
  const unsigned per_block = m.threads.x;
  const unsigned warps = (per_block + 31) / 32;
  m.blocks = std::vector<Block>(m.cluster_size);
  m.fibers = std::vector<Thread>(size_t(m.cluster_size) * per_block);
  m.cluster_barrier = {};
  m.copies.clear();
  m.live = m.cluster_size * per_block;
  while (m.stacks.size() < m.fibers.size()) m.stacks.push_back(Stack(new char[kStackBytes]));
  for (unsigned b = 0; b < m.cluster_size; ++b) {
    Block& block = m.blocks[b];
    block.index = {first_block + b, 0, 0};
    block.rank = b;
    block.live = per_block;
    block.shared_bytes = shared_bytes;
    block.storage.reset(new char[shared_bytes + 1024]);
    block.shared = block.storage.get() +
                   (1024 - reinterpret_cast<uintptr_t>(block.storage.get()) % 1024);
    std::memset(block.storage.get(), 0xff, shared_bytes + 1024);  // NaN, as floats and as doubles
    block.warps.assign(warps, {});
    for (auto& lanes : block.lanes) lanes.assign(warps * 32, 0);
    block.votes.assign(per_block, 0);
    block.live_in_warp.assign(warps, 0);
    for (unsigned t = 0; t < per_block; ++t) {
      Thread& thread = m.fibers[b * per_block + t];
      thread.index = {t, 0, 0};
      thread.machine = &m;
      thread.block = &block;
      thread.warp = t / 32;
      thread.lane = t % 32;
      ++block.live_in_warp[thread.warp];
      const unsigned number = b * per_block + t;
      thread.fiber.start(m.stacks[number].get(), number, &thread_main);
    }
  }
  m.order.resize(m.fibers.size());
  std::iota(m.order.begin(), m.order.end(), 0u);
  m.laggards = choose_laggards(m, warps);
  while (m.live > 0) {
    const uint64_t before = m.progress;
    if (seed() != 0) std::shuffle(m.order.begin(), m.order.end(), m.random);
    m.turn = 0;
    if (Thread* const first = next_thread(m)) {
      running = first;
      m.scheduler.switch_to(first->fiber);
    }
    if (m.progress != before) {
      if (m.laggards.block == nullptr) m.laggards = choose_laggards(m, warps);
    } else if (m.laggards.block != nullptr) {
      // all of them have a turn
      m.laggards = {};
    } else {
      std::fprintf(stderr, "waiting for %s: ", m.waiting_for);
      fail("no thread can go on");
    }
  }
  if (!m.copies.empty()) fail("a kernel ended before its copies had landed");
}

inline void launch(Dim grid, Dim threads, unsigned cluster_size, size_t shared_bytes,
                   const std::function<void()>& kernel) {
  static std::mutex turns;
  const std::lock_guard<std::mutex> turn(turns);
  Machine& m = machine();
  if (grid.y != 1 || grid.z != 1 || threads.y != 1 || threads.z != 1) fail("only 1-D launches");
  if (grid.x % cluster_size) fail("the grid must be a multiple of the cluster");
  if (threads.x > 1024 || cluster_size > 16) fail("too many threads or blocks");
  m.grid = grid;
  m.threads = threads;
  m.cluster_size = cluster_size;
  m.kernel = &kernel;
  m.random.seed(seed());
  for (unsigned first = 0; first < grid.x; first += cluster_size) {
    run_cluster(m, first, shared_bytes);
  }
}

}  // namespace emulation
