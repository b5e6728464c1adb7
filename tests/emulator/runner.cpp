// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// Runs kernels that were compiled against shim.h as shared objects, in a process of its own.
//
// The emulated device's memory is a file mapped at one fixed address both here and in the tests'
// process, so device pointers mean the same everywhere and nothing is copied or relocated. Here, only
// the pages of storages that are alive are mapped, and in them AddressSanitizer allows exactly the
// storages' bytes: any other access ends the process with a report.
//
// A block's threads are fibers. A fiber takes one thread after the other until one has to wait, so a
// kernel without barriers needs a single fiber. Threads start, and go on after a barrier, in an
// order shuffled by the request's seed.
#include <dlfcn.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <random>
#include <string>
#include <vector>

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;  // of a fiber
constexpr size_t kPage = 4096;
constexpr int kFreshShared = 0xA5;  // what a block finds in its __shared__ memory

struct Index {
  unsigned x, y, z;
};

// One request on stdin, to be answered within `seconds`; then the path, the storages, the __shared__ variables and the record.
struct Request {
  unsigned path_bytes, storages, shared, record_bytes;
  Index grid;
  unsigned threads, seconds, unused;
  unsigned long long seed;
};

struct Range {
  unsigned long long begin, size;
};

// The answer on stdout: paging.cuh's Fault.
struct Fault {
  unsigned taken, argument;
  long long row, value, limit;
};

// Where a switch goes on: the buffer of __builtin_setjmp. ASan intercepts swapcontext and longjmp
// and would forget the red zones of the stacks that are left.
using Jump = void* [5];

struct Fiber {
  Jump jump;
  char* stack;
  bool entered = false;
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned thread = 0;
  bool at_barrier = false;               // waits for the block, else for lanes of its warp
  unsigned mask = 0;                     // of the warp operation waited for
  unsigned long long given = 0;          // to it
  unsigned long long received[kWarp];    // from it
};

using Kernel = void (*)(const void* record);

Kernel kernel;
const void* record;
std::mt19937_64 random_bits;

Jump scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;

std::vector<Fiber*> idle;
Fiber* current;
Fiber* waiting[kMaxThreads];  // by thread
unsigned order[kMaxThreads];
unsigned threads, started, finished;

}  // namespace

extern "C" {
Index threadIdx, blockIdx, blockDim, gridDim;

[[noreturn]] void emulator_refuse(const char* why) {
  fprintf(stderr, "ERROR: %s: block (%u, %u, %u), thread %u\n", why, blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x);
  __sanitizer_print_stack_trace();
  _exit(1);
}
}

namespace {

template <typename T>
void shuffle(T* items, unsigned count) {
  for (unsigned i = count; i > 1; --i) {
    const unsigned j = random_bits() % i;
    const T held = items[i - 1];
    items[i - 1] = items[j];
    items[j] = held;
  }
}

// --- fibers ---------------------------------------------------------------------------------------

__attribute__((noinline)) void to_scheduler() {
  __sanitizer_start_switch_fiber(&current->fake_stack, scheduler_stack, scheduler_stack_bytes);
  if (!__builtin_setjmp(current->jump)) __builtin_longjmp(scheduler, 1);
  __sanitizer_finish_switch_fiber(current->fake_stack, nullptr, nullptr);
}

void run_threads() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    while (started < threads) {
      current->thread = threadIdx.x = order[started++];
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

__attribute__((noinline)) void resume(Fiber* fiber) {
  current = fiber;
  threadIdx.x = fiber->thread;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack, kStack);
  if (!__builtin_setjmp(scheduler)) {
    if (!fiber->entered) enter(fiber);
    __builtin_longjmp(fiber->jump, 1);
  }
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
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
  unsigned long long given[kWarp] = {};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1) given[lane] = waiting[first + lane]->given;
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    memcpy(waiting[first + lane]->received, given, sizeof(given));
    released.push_back(waiting[first + lane]);
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
      for (unsigned t = 0; t < threads; ++t) {
        if (waiting[t]) released.push_back(waiting[t]);
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

const unsigned long long* emulator_exchange(unsigned mask, unsigned long long given) {
  if (!(mask >> threadIdx.x % kWarp & 1)) {
    emulator_refuse("a thread is not in the mask of its own warp operation");
  }
  current->mask = mask;
  current->given = given;
  wait(false);
  return current->received;
}
}

namespace {

// --- memory ---------------------------------------------------------------------------------------

void* fixed_map(unsigned long long begin, size_t size, int access, int flags, int fd, off_t at) {
  void* wanted = reinterpret_cast<void*>(begin);
  if (mmap(wanted, size, access, flags | MAP_FIXED, fd, at) != wanted) {
    perror("ERROR: mapping the emulated device's memory");
    _exit(1);
  }
  return wanted;
}

struct Memory {
  int fd;
  unsigned long long base;
  std::vector<Range> mapped;

  void hide(unsigned long long begin, size_t size) {
    fixed_map(begin, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }

  // Makes exactly `storages` accessible.
  void expose(const std::vector<Range>& storages) {
    for (const Range& range : mapped) hide(range.begin, range.size);
    mapped.clear();
    for (const Range& storage : storages) {
      const unsigned long long begin = storage.begin / kPage * kPage;
      const unsigned long long end = (storage.begin + storage.size + kPage) / kPage * kPage;
      mapped.push_back({begin, end - begin});
      void* pages = fixed_map(begin, end - begin, PROT_READ | PROT_WRITE, MAP_SHARED, fd, begin - base);
      __asan_poison_memory_region(pages, end - begin);
      __asan_unpoison_memory_region(reinterpret_cast<void*>(storage.begin), storage.size);
    }
  }
};

// --- requests -------------------------------------------------------------------------------------

bool read_bytes(void* to, size_t size) { return fread(to, 1, size, stdin) == size; }

void run(const Request& request, const std::string& path, std::vector<Range> shared) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "ERROR: %s\n", dlerror());
    _exit(1);
  }
  kernel = reinterpret_cast<Kernel>(dlsym(library, "emulator_kernel"));
  Dl_info where;
  dladdr(reinterpret_cast<void*>(kernel), &where);
  for (Range& range : shared) range.begin += reinterpret_cast<unsigned long long>(where.dli_fbase);

  random_bits.seed(request.seed);
  threads = request.threads;
  blockDim = {threads, 1, 1};
  gridDim = request.grid;
  const unsigned long long blocks = 1ull * gridDim.x * gridDim.y * gridDim.z;
  const bool backwards = request.seed & 1;
  for (unsigned long long i = 0; i < blocks; ++i) {
    const unsigned long long block = backwards ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(block % gridDim.x),
                static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    for (const Range& range : shared) {
      memset(reinterpret_cast<void*>(range.begin), kFreshShared, range.size);
    }
    run_block();
  }

  Fault answer = {};
  if (void* fault = dlsym(library, "emulator_fault")) {
    Fault* found = *static_cast<Fault**>(fault);
    answer = *found;
    *found = Fault{};
  }
  fwrite(&answer, sizeof(answer), 1, stdout);
  fflush(stdout);
}

}  // namespace

// runner FD BASE SIZE: the device memory's file, address and size.
int main(int, char** arguments) {
  Memory memory{atoi(arguments[1]), strtoull(arguments[2], nullptr, 10), {}};
  memory.hide(memory.base, strtoull(arguments[3], nullptr, 10));
  Request request;
  while (read_bytes(&request, sizeof(request))) {
    std::string path(request.path_bytes, '\0');
    std::vector<Range> storages(request.storages), shared(request.shared);
    std::vector<char> bytes(request.record_bytes);  // exactly, so that reads past it are seen
    if (!read_bytes(path.data(), path.size()) ||
        !read_bytes(storages.data(), storages.size() * sizeof(Range)) ||
        !read_bytes(shared.data(), shared.size() * sizeof(Range)) ||
        !read_bytes(bytes.data(), bytes.size())) {
      return 1;
    }
    record = bytes.data();
    memory.expose(storages);
    alarm(request.seconds);
    run(request, path, shared);
    alarm(0);
  }
  return 0;
}
