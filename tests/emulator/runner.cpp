// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Runs kernels that were compiled against shim.h as shared objects, in a process of its own.
//
// The emulated device's memory is a file mapped at one fixed address both here and in the tests'
// process, so device pointers mean the same everywhere and nothing is copied or relocated.
//
// A block's threads are fibers. A fiber takes one thread after the other until one has to wait, so a
// kernel without barriers needs a single fiber. Threads start, and go on after a barrier, in an
// order shuffled by the request's seed, which also decides whether copies are done at once, or when they
// are waited for.
//
// Kernels are instrumented as for ThreadSanitizer, which knows no fibers and is not linked: before
// each access they call a function of ours. It looks whether the thread may touch these bytes, and
// whether another thread of the launch touched one of them, with nothing between that orders the
// two. Either ends the process with a report. A fence and then an atomic access order what the block
// had done with what another does after an atomic access to the same word, and a fence.
#include <dlfcn.h>
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;  // of a fiber
constexpr size_t kPage = 4096;
constexpr int kFreshShared = 0xA5;  // what a block finds in its __shared__ memory

using u32 = unsigned;
using u64 = unsigned long long;

struct Index {
  unsigned x, y, z;
};

// One request on stdin, to be answered within `seconds`; then the path, the storages by address, the
// __shared__ variables and the record.
struct Request {
  unsigned path_bytes, storages, shared, record_bytes;
  Index grid;
  unsigned threads, seconds;
  unsigned writes_one_value;  // so that it does not matter which thread writes a byte last
  u64 seed;
};

struct Range {
  u64 begin, size;
};

// The answer on stdout: paging.cuh's Fault.
struct Fault {
  unsigned taken, argument;
  long long row, value, limit;
};

// Where a switch goes on: the buffer of __builtin_setjmp, which is quicker than swapcontext.
using Jump = void* [5];

struct Fiber {
  Jump jump;
  char* stack;
  bool entered = false;
  unsigned thread = 0;
  bool at_barrier = false;  // waits for the block, else for lanes of its warp
  unsigned mask = 0;        // of the warp operation waited for
  bool orders = false;      // it orders accesses to memory too
  u64 given = 0;            // to it

  u32 segment;       // what the thread does now, or 0: see Segment
  u32 clock;         // how often the thread's accesses were ordered with others of its warp, plus 1
  u32 seen[kWarp];   // those of the lanes' clocks that are ordered before what it does now
};

using Kernel = void (*)(const void* record);

Kernel kernel;
const void* record;

Jump scheduler;
std::vector<Fiber*> idle;
Fiber* current;
Fiber* waiting[kMaxThreads];  // by thread
unsigned order[kMaxThreads];
unsigned threads, started, finished;
u64 received[kMaxThreads / kWarp][kWarp];  // from warp operations, by lane, until the next one

// What `EmulatorCopy` is in shim.h.
struct Copy {
  u64 from;
  unsigned to, bytes, size;
};
// A thread's copies that were put off, in their order; those before `next` are done.
struct PutOff {
  std::vector<std::pair<unsigned, Copy>> copies;  // of their groups
  size_t next = 0;
  unsigned group = 0;
};
PutOff put_off[kMaxThreads];
// Of rows, and of the block.
struct Piece {
  unsigned word, to;
  u64 bits[2];
};
std::vector<Piece> pieces_put_off;
bool copies_late;

void* library_base;

// Where in the kernel's shared object the functions are that lead here.
void print_stack() {
  void* frames[64];
  const int count = backtrace(frames, 64);
  for (int i = 0; i < count; ++i) {
    Dl_info where;
    if (dladdr(frames[i], &where) && where.dli_fbase == library_base) {
      fprintf(stderr, "at 0x%zx\n", static_cast<char*>(frames[i]) - 1 - static_cast<char*>(library_base));
    }
  }
}

}  // namespace

extern "C" {
Index threadIdx, blockIdx, blockDim, gridDim;

[[noreturn]] void emulator_refuse(const char* why) {
  fprintf(stderr, "ERROR: %s: thread %u of block (%u, %u, %u)\n", why, threadIdx.x, blockIdx.x,
          blockIdx.y, blockIdx.z);
  print_stack();
  _exit(1);
}
}

namespace {

u64 random_state;

// One of the numbers below `limit` (SplitMix64).
unsigned random_below(unsigned limit) {
  u64 bits = random_state += 0x9e3779b97f4a7c15;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  return (bits >> 32) * limit >> 32;
}

template <typename T>
void shuffle(T* items, unsigned count) {
  for (unsigned i = count; i > 1; --i) {
    const unsigned j = random_below(i);
    const T held = items[i - 1];
    items[i - 1] = items[j];
    items[j] = held;
  }
}

// --- accesses -------------------------------------------------------------------------------------

// What a thread does between two operations that order it with others. Segments of all launches are
// numbered, from 1; only those of the present launch are known.
struct Segment {
  u64 block;
  unsigned thread;
  u32 barriers;  // that the block has passed
  u32 clock;
};

// The segments that touched a byte last, or 0. Of reads with no order among them two are kept; what
// is written after both has no order with one of them, unless parts of a warp wait for each other.
struct Shadow {
  u32 write, read, other_read, atomic;
};

// Bytes that threads may touch.
struct Area {
  u64 begin, size;
  Shadow* shadow;     // null: they may only be read
  const u32* oldest;  // segments before this number had other memory here

  bool has(u64 at, u64 bytes) const { return at - begin <= size && bytes <= size - (at - begin); }
};

enum class Access { kRead, kWrite, kAtomic };

// Shadows of the device's memory are at kShadow, in the same order.
constexpr u64 kShadow = 0x100000000000;
u64 memory_begin, memory_size;

std::vector<Segment> segments;  // of this launch
u32 first_of_launch = 1, first_of_block = 1;
u64 block_number;
u32 barriers;  // that this block has passed
bool writes_one_value;

// What of a block is ordered before something: segments before this number, of this thread or from
// before the latest barrier.
struct Fence {
  u64 block;
  u32 segment, barriers;
  unsigned thread;
};
Fence fence = {};                           // the latest of this block; segment 0: none
std::map<u64, std::vector<Fence>> changes;  // of this launch: those before atomic accesses, by word
std::vector<Fence> found;                   // by this block's atomic accesses
std::vector<Fence> known;                   // those ordered before `known_by`, and what is behind it
Fence known_by = {};

std::vector<Area> storages;  // by address
std::vector<Area> variables;

void begin_block() {
  first_of_block = first_of_launch + segments.size();
  barriers = 0;
  fence = known_by = {};
  found.clear();
  known.clear();
}

const Segment& segment(u32 number) { return segments[number - first_of_launch]; }

u32 present_segment() {
  if (!current->segment) {
    current->segment = first_of_launch + segments.size();
    segments.push_back({block_number, current->thread, barriers, current->clock});
  }
  return current->segment;
}

// Whether what the running thread does is ordered behind an earlier access, or that is its own.
bool is_ordered(u32 earlier) {
  const Segment& then = segment(earlier);
  if (then.block != block_number) {
    if (barriers == known_by.barriers && current->thread != known_by.thread) return false;
    return std::any_of(known.begin(), known.end(), [&](const Fence& before) {
      return before.block == then.block && earlier < before.segment &&
             (then.barriers < before.barriers || then.thread == before.thread);
    });
  }
  if (then.barriers != barriers || then.thread == current->thread) return true;
  return then.thread / kWarp == current->thread / kWarp &&
         current->seen[then.thread % kWarp] >= then.clock;
}

Index index_of(u64 block) {
  return {static_cast<unsigned>(block % gridDim.x),
          static_cast<unsigned>(block / gridDim.x % gridDim.y),
          static_cast<unsigned>(block / gridDim.x / gridDim.y)};
}

[[noreturn]] void refuse_access(Access access, u64 at, u64 bytes, u32 earlier, const char* earlier_did) {
  const char* does = access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "changes";
  const char* kind = earlier ? "race" : "out of bounds";
  fprintf(stderr, "ERROR: %s: thread %u of block (%u, %u, %u) %s %llu bytes at address 0x%llx",
          kind, threadIdx.x, blockIdx.x, blockIdx.y, blockIdx.z, does, bytes, at);
  if (earlier) {
    const Segment& then = segment(earlier);
    const Index block = index_of(then.block);
    fprintf(stderr, " that thread %u of block (%u, %u, %u) %s with no barrier between", then.thread,
            block.x, block.y, block.z, earlier_did);
  }
  fprintf(stderr, "\n");
  for (size_t i = 0; i < variables.size(); ++i) {
    const u64 near = 128, size = variables[i].size;
    if (size && at + near - variables[i].begin < near + size + near) {
      const long long byte = at - variables[i].begin;
      fprintf(stderr, "The address is byte %lld of variable %zu.\n", byte, i);
    }
  }
  print_stack();
  _exit(1);
}

const Area* area_of(u64 at, u64 bytes) {
  static size_t latest = 0;
  if (at - memory_begin < memory_size) {
    if (latest < storages.size() && storages[latest].has(at, bytes)) return &storages[latest];
    const auto behind = std::upper_bound(storages.begin(), storages.end(), at,
                                         [](u64 a, const Area& area) { return a < area.begin; });
    latest = behind - storages.begin() - 1;  // if there is none: the largest number
    if (latest < storages.size() && storages[latest].has(at, bytes)) return &storages[latest];
    return nullptr;
  }
  for (const Area& area : variables) {
    if (area.has(at, bytes)) return &area;
  }
  return nullptr;
}

__attribute__((noinline)) void touch_memory(u64 at, u64 bytes, Access access) {
  const Area* area = area_of(at, bytes);
  if (!area || (!area->shadow && access != Access::kRead)) refuse_access(access, at, bytes, 0, "");
  if (!area->shadow || !bytes) return;
  const u32 now = present_segment(), oldest = *area->oldest;
  Shadow* shadow = area->shadow + (at - area->begin);
  const auto is_race = [&](u32 earlier) { return earlier >= oldest && !is_ordered(earlier); };
  const auto touched = [&](Shadow byte, u64 i) -> Shadow {
    const auto check = [&](u32 earlier, const char* did) {
      if (is_race(earlier)) refuse_access(access, at + i, bytes - i, earlier, did);
    };
    if (access == Access::kRead) {
      if (byte.read == now) return byte;  // nothing was written since
      check(byte.write, "wrote");
      check(byte.atomic, "changed");
      (is_race(byte.read) && !is_race(byte.other_read) ? byte.other_read : byte.read) = now;
      return byte;
    }
    if (!writes_one_value) check(byte.write, "wrote");
    check(byte.read, "read");
    check(byte.other_read, "read");
    if (access != Access::kAtomic) {
      check(byte.atomic, "changed");
      return {now, 0, 0, 0};
    }
    byte.atomic = now;
    return byte;
  };
  Shadow before = shadow[0], after = shadow[0] = touched(before, 0);
  for (u64 i = 1; i < bytes; ++i) {
    if (memcmp(&shadow[i], &before, sizeof(before))) {  // most bytes are as the one in front was
      before = shadow[i];
      after = touched(before, i);
    }
    shadow[i] = after;
  }
}

inline void touch(const void* address, u64 bytes, Access access) {
  const u64 at = reinterpret_cast<u64>(address);
  if (at - reinterpret_cast<u64>(current->stack) < kStack) return;  // local variables
  touch_memory(at, bytes, access);
}

}  // namespace

// What the instrumented code calls, by the names of ThreadSanitizer's runtime library.
extern "C" {
#define SIZES(bytes)                                                                \
  void __tsan_read##bytes(const void* at) { touch(at, bytes, Access::kRead); }      \
  void __tsan_write##bytes(void* at) { touch(at, bytes, Access::kWrite); }
SIZES(1) SIZES(2) SIZES(4) SIZES(8) SIZES(16)
void __tsan_read_range(const void* at, u64 bytes) { touch(at, bytes, Access::kRead); }
void __tsan_write_range(void* at, u64 bytes) { touch(at, bytes, Access::kWrite); }
void __tsan_init() {}
void emulator_atomic(void* at, unsigned bytes) {
  touch(at, bytes, Access::kAtomic);
  std::vector<Fence>& before = changes[reinterpret_cast<u64>(at)];
  found.insert(found.end(), before.begin(), before.end());
  if (!fence.segment || fence.thread != current->thread) return;
  before.push_back(fence);
  before.insert(before.end(), known.begin(), known.end());
}
void emulator_fence() {
  current->segment = 0;
  const u32 next = first_of_launch + segments.size();
  fence = {block_number, next, barriers, current->thread};
  if (found.empty()) return;
  known = found;
  known_by = fence;
}
}

namespace {

// --- fibers ---------------------------------------------------------------------------------------

// A function of its own, and one that g++ knows nothing of: or it would take it that nobody comes back
// to where it is called.
[[noreturn]] __attribute__((noipa)) void go_on(Jump& jump) { __builtin_longjmp(jump, 1); }

__attribute__((noipa)) void to_scheduler() {
  if (!__builtin_setjmp(current->jump)) go_on(scheduler);
}

void run_threads() {
  for (;;) {
    while (started < threads) {
      current->thread = threadIdx.x = order[started++];
      current->segment = 0;
      current->clock = 1;
      memset(current->seen, 0, sizeof(current->seen));
      put_off[threadIdx.x] = {};
      kernel(record);
      ++finished;
    }
    idle.push_back(current);
    to_scheduler();
  }
}

void enter(Fiber* fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_threads, 0);
  fiber->entered = true;
  setcontext(&context);
}

__attribute__((noipa)) void resume(Fiber* fiber) {
  current = fiber;
  threadIdx.x = fiber->thread;
  if (!__builtin_setjmp(scheduler)) {
    if (!fiber->entered) enter(fiber);
    go_on(fiber->jump);
  }
}

Fiber* idle_fiber() {
  if (!idle.empty()) {
    Fiber* fiber = idle.back();
    idle.pop_back();
    return fiber;
  }
  Fiber* fiber = new Fiber;
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kPage, PROT_NONE)) abort();  // a guard page below
  fiber->stack = static_cast<char*>(stack);
  return fiber;
}

void wait(bool at_barrier) {
  current->at_barrier = at_barrier;
  waiting[current->thread] = current;
  to_scheduler();
}

// Whether all lanes of the fiber's mask wait for the same warp operation.
bool warp_is_complete(const Fiber* fiber) {
  const unsigned first = fiber->thread / kWarp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(fiber->mask >> lane & 1)) continue;
    const Fiber* other = waiting[first + lane];
    if (!other || other->at_barrier || other->mask != fiber->mask) return false;
  }
  return true;
}

void release_warp(const Fiber* fiber, std::vector<Fiber*>& released) {
  const unsigned first = fiber->thread / kWarp * kWarp, mask = fiber->mask;
  bool orders = false;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) orders |= waiting[first + lane]->orders;
  }
  u32 seen[kWarp] = {};
  if (orders) {
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Fiber* other = waiting[first + lane];
      seen[lane] = std::max(seen[lane], other->clock);
      for (unsigned i = 0; i < kWarp; ++i) seen[i] = std::max(seen[i], other->seen[i]);
    }
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber* other = waiting[first + lane];
    received[first / kWarp][lane] = other->given;
    if (other->orders) {
      memcpy(other->seen, seen, sizeof(seen));
      ++other->clock;
      other->segment = 0;
    }
    released.push_back(other);
    waiting[first + lane] = nullptr;
  }
}

[[noreturn]] void report_deadlock() {
  fprintf(stderr, "ERROR: deadlock: block (%u, %u, %u): %u of %u threads have returned\n",
          blockIdx.x, blockIdx.y, blockIdx.z, finished, threads);
  for (unsigned t = 0, shown = 0; t < threads && shown < 8; ++t) {
    if (!waiting[t]) continue;
    ++shown;
    if (waiting[t]->at_barrier) {
      fprintf(stderr, "  thread %u waits at __syncthreads\n", t);
    } else {
      fprintf(stderr, "  thread %u waits for the lanes of mask 0x%08x\n", t, waiting[t]->mask);
    }
  }
  _exit(1);
}

void run_block() {
  for (unsigned t = 0; t < threads; ++t) order[t] = t;
  shuffle(order, threads);
  started = finished = 0;
  pieces_put_off.clear();
  begin_block();
  while (started < threads) resume(idle_fiber());

  std::vector<Fiber*> released;
  while (finished < threads) {
    released.clear();
    unsigned at_barrier = 0;
    for (unsigned t = 0; t < threads; ++t) {
      if (!waiting[t]) continue;
      if (waiting[t]->at_barrier) {
        ++at_barrier;
      } else if (warp_is_complete(waiting[t])) {
        release_warp(waiting[t], released);
      }
    }
    if (at_barrier == threads - finished) {  // threads that have returned do not count
      ++barriers;
      for (unsigned t = 0; t < threads; ++t) {
        if (!waiting[t]) continue;
        waiting[t]->segment = 0;
        released.push_back(waiting[t]);
        waiting[t] = nullptr;
      }
    }
    if (released.empty()) report_deadlock();
    shuffle(released.data(), released.size());
    for (Fiber* fiber : released) resume(fiber);
  }
}

}  // namespace

extern "C" {

void emulator_sync_block() { wait(true); }

bool emulator_put_off(Copy copy) {
  PutOff& its = put_off[threadIdx.x];
  if (copies_late) its.copies.push_back({its.group, copy});
  return copies_late;
}
void emulator_end_group() { ++put_off[threadIdx.x].group; }
bool emulator_awaited(unsigned groups, Copy* copy) {
  PutOff& its = put_off[threadIdx.x];
  if (its.next == its.copies.size()) its.copies.clear(), its.next = 0;
  if (its.copies.empty() || its.copies[its.next].first + groups >= its.group) return false;
  *copy = its.copies[its.next++].second;
  return true;
}

bool emulator_put_off_piece(Piece piece) {
  if (copies_late) pieces_put_off.push_back(piece);
  return copies_late;
}
bool emulator_awaited_piece(unsigned word, Piece* piece) {
  for (auto it = pieces_put_off.begin(); it != pieces_put_off.end(); ++it) {
    if (it->word != word) continue;
    *piece = *it;
    pieces_put_off.erase(it);
    return true;
  }
  return false;
}

const u64* emulator_exchange(unsigned mask, u64 given, bool orders) {
  if (!(mask >> threadIdx.x % kWarp & 1)) {
    emulator_refuse("a thread is not in the mask of its own warp operation");
  }
  current->mask = mask;
  current->given = given;
  current->orders = orders;
  wait(false);
  return received[threadIdx.x / kWarp];
}
}

namespace {

// --- products of matrices -------------------------------------------------------------------------

// The number of each code of 16 bits.
template <typename T>
const double* numbers() {
  static const std::vector<double> all = [] {
    std::vector<double> made;
    for (unsigned code = 0; code < 0x10000; ++code) {
      const double magnitude = T::decode(code & 0x7fff);
      made.push_back(code & 0x8000 ? -magnitude : magnitude);
    }
    return made;
  }();
  return all.data();
}

// Eight numbers of a row, or a column: of the first register of the four lanes from `first` on, or of
// the second, which the lanes give with it.
void take(double* to, const u64* given, int first, int second, const double* numbers) {
  for (int i = 0; i < 8; ++i) {
    to[i] = numbers[given[first + i / 2] >> (32 * second + 16 * (i % 2)) & 0xffff];
  }
}

}  // namespace

extern "C" {

const double* emulator_numbers(bool is_bf16) {
  return is_bf16 ? numbers<ptx::BF16>() : numbers<ptx::F16>();
}

void emulator_mma(bool is_bf16, int depth, float* d, const unsigned* a, const unsigned* b, const float* c) {
  const double* numbers = emulator_numbers(is_bf16);
  double left[2][16], right[2][16];  // two rows of A, two columns of B
  const int lane = threadIdx.x % kWarp, row = lane / 4, column = lane % 4 * 2;
  for (int at = 0; at < depth; at += 8) {
    const u64 both = static_cast<u64>(a[at / 4 + 1]) << 32 | a[at / 4];
    const u64* given = emulator_exchange(~0u, both, false);
    for (int i = 0; i < 2; ++i) take(left[i] + at, given, row * 4, i, numbers);
    given = emulator_exchange(~0u, b[at / 8], false);
    for (int i = 0; i < 2; ++i) take(right[i] + at, given, (column + i) * 4, 0, numbers);
  }
  for (int part = 0; part < 4; ++part) {
    double sum = ptx::as_double(c[part]);
    for (int k = 0; k < depth; ++k) sum += left[part / 2][k] * right[part % 2][k];
    d[part] = static_cast<float>(sum);
  }
}
}

namespace {

// --- memory ---------------------------------------------------------------------------------------

void fixed_map(u64 begin, size_t size, int flags, int fd) {
  void* wanted = reinterpret_cast<void*>(begin);
  const int access = PROT_READ | PROT_WRITE;
  if (mmap(wanted, size, access, flags | MAP_FIXED_NOREPLACE | MAP_NORESERVE, fd, 0) != wanted) {
    perror("ERROR: mapping the emulated device's memory");
    _exit(1);
  }
}

// --- requests -------------------------------------------------------------------------------------

bool read_bytes(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }

// What a launch may touch: storages, the __shared__ variables and the fault record of the module at
// `base`, the parameters.
struct Memory {
  std::vector<Shadow> shadows;  // of what is not the device's memory

  void expose(const std::vector<Range>& given, const std::vector<Range>& shared, Range fault,
              Range parameters) {
    if (first_of_launch + segments.size() > 0xf0000000) {  // numbers begin anew
      madvise(reinterpret_cast<void*>(kShadow), memory_size * sizeof(Shadow), MADV_DONTNEED);
      first_of_launch = 1;
    } else {
      first_of_launch += segments.size();
    }
    segments.clear();
    changes.clear();
    storages.clear();
    for (const Range& range : given) {
      Shadow* shadow = reinterpret_cast<Shadow*>(kShadow) + (range.begin - memory_begin);
      storages.push_back({range.begin, range.size, shadow, &first_of_launch});
    }
    size_t bytes = fault.size;
    for (const Range& range : shared) bytes += range.size;
    shadows.assign(bytes, {});
    variables.clear();
    Shadow* shadow = shadows.data();
    for (const Range& range : shared) {
      variables.push_back({range.begin, range.size, shadow, &first_of_block});
      shadow += range.size;
    }
    variables.push_back({fault.begin, fault.size, shadow, &first_of_launch});
    variables.push_back({parameters.begin, parameters.size, nullptr, nullptr});
  }
};

Memory memory;

void run(const Request& request, const std::string& path, const std::vector<Range>& given,
         std::vector<Range> shared) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "ERROR: %s\n", dlerror());
    _exit(1);
  }
  kernel = reinterpret_cast<Kernel>(dlsym(library, "emulator_kernel"));
  Dl_info where;
  dladdr(reinterpret_cast<void*>(kernel), &where);
  library_base = where.dli_fbase;
  for (Range& range : shared) range.begin += reinterpret_cast<u64>(library_base);
  Fault* fault = nullptr;
  if (void* found = dlsym(library, "emulator_fault")) fault = *static_cast<Fault**>(found);
  memory.expose(given, shared, {reinterpret_cast<u64>(fault), fault ? sizeof(Fault) : 0},
                {reinterpret_cast<u64>(record), request.record_bytes});

  writes_one_value = request.writes_one_value;
  random_state = request.seed;
  copies_late = request.seed >> 1 & 1;
  threads = request.threads;
  blockDim = {threads, 1, 1};
  gridDim = request.grid;
  const u64 blocks = 1ull * gridDim.x * gridDim.y * gridDim.z;
  const bool backwards = request.seed & 1;
  for (u64 i = 0; i < blocks; ++i) {
    block_number = backwards ? blocks - 1 - i : i;
    blockIdx = index_of(block_number);
    for (const Range& range : shared) {
      memset(reinterpret_cast<void*>(range.begin), kFreshShared, range.size);
    }
    run_block();
  }

  Fault answer = {};
  if (fault) std::swap(answer, *fault);
  fwrite(&answer, sizeof(answer), 1, stdout);
  fflush(stdout);
}

}  // namespace

// runner FD BASE SIZE: the device memory's file, address and size.
int main(int, char** arguments) {
#ifdef __SSE__  // floats below the normal ones are taken and given as 0, as compiled kernels do
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#endif
  memory_begin = strtoull(arguments[2], nullptr, 10);
  memory_size = strtoull(arguments[3], nullptr, 10);
  fixed_map(memory_begin, memory_size, MAP_SHARED, atoi(arguments[1]));
  fixed_map(kShadow, memory_size * sizeof(Shadow), MAP_PRIVATE | MAP_ANONYMOUS, -1);
  Request request;
  while (read_bytes(&request, sizeof(request))) {
    std::string path(request.path_bytes, '\0');
    std::vector<Range> given(request.storages), shared(request.shared);
    std::vector<char> bytes(request.record_bytes);
    if (!read_bytes(path.data(), path.size()) ||
        !read_bytes(given.data(), given.size() * sizeof(Range)) ||
        !read_bytes(shared.data(), shared.size() * sizeof(Range)) ||
        !read_bytes(bytes.data(), bytes.size())) {
      return 1;
    }
    record = bytes.data();
    alarm(request.seconds);
    run(request, path, given, shared);
    alarm(0);
  }
  return 0;
}
