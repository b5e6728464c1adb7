// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// CUDA C++ as plain C++17: what a kernel's source needs before it, so that g++ compiles it. The
// thread's indices and everything that makes threads wait for each other live in runner.cpp.
//
// Headers, the standard ones too, are avoided: they would cost more than the kernel does.

#define __global__
#define __device__
#define __host__
#define __constant__
// A block's threads are fibers of one process and its blocks run one after the other.
// Pages of their own: what is behind one of them is no other.
#define __shared__ static __attribute__((aligned(4096)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) __attribute__((aligned(n)))
// What a kernel assumes must be so: here it ends the process.
#define __builtin_assume(condition) ((condition) ? (void)0 : __builtin_trap())

struct dim3 { unsigned x = 1, y = 1, z = 1; };
#define EMULATOR_VECTORS(T, name, align2, align4) \
  struct name##1 { T x; };                        \
  struct alignas(align2) name##2 { T x, y; };     \
  struct name##3 { T x, y, z; };                  \
  struct alignas(align4) name##4 { T x, y, z, w; };
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned int, uint, 8, 16)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
#define EMULATOR_MAKE_2_4(T, name)                                                              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                    \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_MAKE_2_4(int, int)
EMULATOR_MAKE_2_4(unsigned int, uint)
EMULATOR_MAKE_2_4(float, float)

extern "C" {
#define EMULATOR_MATH(name) float name##f(float) noexcept; double name(double) noexcept;
EMULATOR_MATH(sqrt) EMULATOR_MATH(exp) EMULATOR_MATH(exp2) EMULATOR_MATH(log) EMULATOR_MATH(log2)
EMULATOR_MATH(floor) EMULATOR_MATH(ceil) EMULATOR_MATH(trunc) EMULATOR_MATH(round)
EMULATOR_MATH(rint) EMULATOR_MATH(nearbyint) EMULATOR_MATH(fabs)
float fminf(float, float) noexcept;
float fmaxf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
float powf(float, float) noexcept;
float ldexpf(float, int) noexcept;
float copysignf(float, float) noexcept;
void __tsan_read_range(const void*, unsigned long long);
void __tsan_write_range(void*, unsigned long long);
void* memset(void*, int, unsigned long) noexcept;
}
// The compiler tells the runner of no accesses but those that it makes itself. Local variables are
// of no interest, and would have to be in memory if it were told of them.
__forceinline__ void* memcpy(void* to, const void* from, unsigned long bytes) {
  const bool is_inline = __builtin_constant_p(bytes) && bytes <= 16;
  if (!is_inline && __builtin_object_size(from, 0) == -1ul) __tsan_read_range(from, bytes);
  if (!is_inline && __builtin_object_size(to, 0) == -1ul) __tsan_write_range(to, bytes);
  return __builtin_memcpy(to, from, bytes);
}
inline bool isnan(float x) { return __builtin_isnan(x); }
// CUDA handles signalling NaN as quiet; in the C library they win.
inline float emulator_fminf(float a, float b) { return a != a ? b : b != b ? a : fminf(a, b); }
inline float emulator_fmaxf(float a, float b) { return a != a ? b : b != b ? a : fmaxf(a, b); }
#define fminf emulator_fminf
#define fmaxf emulator_fmaxf
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }

// --- threads (runner.cpp) -------------------------------------------------------------------------

// Of `bytes` bytes, of `size` or none, to an address in shared memory.
struct EmulatorCopy {
  unsigned long long from;
  unsigned to, bytes, size;
};

extern "C" {
extern const uint3 threadIdx, blockIdx, blockDim, gridDim;  // to each thread
// Waits for every thread of the block that has not returned.
void emulator_sync_block();
// Waits for the lanes of `mask`; returns what each of them gave, by lane. Of the warp's operations
// only __syncwarp `orders` accesses to memory.
const unsigned long long* emulator_exchange(unsigned mask, unsigned long long given, bool orders = false);
// Notes an atomic access.
void emulator_atomic(void* at, unsigned bytes);
// Orders what the thread, and those behind a barrier before it, did before with its next atomic access.
void emulator_fence();
// Puts a copy off until the thread waits for it, if this launch has copies late.
bool emulator_put_off(EmulatorCopy copy);
// Ends a group of the thread's copies.
void emulator_end_group();
// Whether a copy is left that was put off, and is of none of the thread's latest groups: the next one.
bool emulator_awaited(unsigned groups, EmulatorCopy* copy);
// Of a row that is copied 16 bytes to an address in shared memory, and the word at which they arrive.
struct EmulatorPiece {
  unsigned word, to;
  unsigned long long bits[2];
};
// Puts them off until a thread of the block waits at the word, if this launch has copies late.
bool emulator_put_off_piece(EmulatorPiece piece);
// Whether any are left that were put off and arrive at this word: the next ones.
bool emulator_awaited_piece(unsigned word, EmulatorPiece* piece);
// The number that each code of 16 bits is, of float16 or bfloat16.
const double* emulator_numbers(bool is_bf16);
// The warp's product of two matrices and sum: see ptx.h.
void emulator_mma(bool is_bf16, int depth, float* d, const unsigned* a, const unsigned* b, const float* c);
// Reports a misuse of a warp operation and ends the process.
[[noreturn]] void emulator_refuse(const char* why);
}
constexpr int warpSize = 32;

inline void __syncthreads() { emulator_sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator_exchange(mask, 0, true); }
inline void __threadfence() { emulator_fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { emulator_fence(); }

// The runner is not told of what these access: it is no memory of the kernel's.
#define EMULATOR_UNSEEN __attribute__((no_sanitize("thread")))
#define EMULATOR_OWN __attribute__((noinline, no_sanitize("thread", "undefined")))

namespace emulator {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) >= sizeof(From) || sizeof(From) == 8, "lanes give at most 8 bytes");
  To to{};
  __builtin_memcpy(&to, &from, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}

inline int lane() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize;
}

template <typename T>
EMULATOR_OWN inline T shuffle(unsigned mask, T value, int source) {
  const unsigned long long* given = emulator_exchange(mask, bits<unsigned long long>(value));
  if (!(mask >> source & 1)) emulator_refuse("a shuffle reads a lane that is not in its mask");
  return bits<T>(given[source]);
}

template <typename T, typename Join>
EMULATOR_UNSEEN inline T reduce(unsigned mask, T value, Join join) {
  const unsigned long long* given = emulator_exchange(mask, bits<unsigned long long>(value));
  T joined = value;
  for (int i = 0; i < warpSize; ++i) {
    if (mask >> i & 1 && i != lane()) joined = join(joined, bits<T>(given[i]));
  }
  return joined;
}

}  // namespace emulator

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return emulator::shuffle(mask, value, (emulator::lane() & ~(width - 1)) + (source & (width - 1)));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int other, int width = warpSize) {
  const int lane = emulator::lane(), source = lane ^ other;
  return emulator::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = emulator::lane(), inside = lane & (width - 1);
  return emulator::shuffle(mask, value, inside >= static_cast<int>(delta) ? lane - delta : lane);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const int lane = emulator::lane(), inside = lane & (width - 1);
  return emulator::shuffle(mask, value, inside + static_cast<int>(delta) < width ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned lane = predicate ? 1u << emulator::lane() : 0u;
  return emulator::reduce(mask, lane, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
#define EMULATOR_REDUCE(name, joined)                                                        \
  template <typename T>                                                                      \
  inline T name(unsigned mask, T value) {                                                    \
    return emulator::reduce(mask, value, [](T a, T b) { return static_cast<T>(joined); });   \
  }
EMULATOR_REDUCE(__reduce_add_sync, a + b)
EMULATOR_REDUCE(__reduce_min_sync, a < b ? a : b)
EMULATOR_REDUCE(__reduce_max_sync, a > b ? a : b)
EMULATOR_REDUCE(__reduce_and_sync, a & b)
EMULATOR_REDUCE(__reduce_or_sync, a | b)
EMULATOR_REDUCE(__reduce_xor_sync, a ^ b)

// --- memory ---------------------------------------------------------------------------------------

#define EMULATOR_LOAD(name)             \
  template <typename T>                 \
  __forceinline__ T name(const T* at) { \
    return *at;                         \
  }
EMULATOR_LOAD(__ldg) EMULATOR_LOAD(__ldca) EMULATOR_LOAD(__ldcg) EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldcv) EMULATOR_LOAD(__ldlu)
#define EMULATOR_STORE(name)                   \
  template <typename T>                        \
  __forceinline__ void name(T* at, T value) {  \
    *at = value;                               \
  }
EMULATOR_STORE(__stcg) EMULATOR_STORE(__stcs) EMULATOR_STORE(__stwb) EMULATOR_STORE(__stwt)

// One operating-system thread runs everything, so plain reads and writes are atomic.
#define EMULATOR_ATOMIC(name, result)             \
  template <typename T>                           \
  EMULATOR_UNSEEN inline T name(T* at, T value) { \
    emulator_atomic(at, sizeof(T));               \
    const T old = *at;                            \
    *at = static_cast<T>(result);                 \
    return old;                                   \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicMin, value < old ? value : old)
EMULATOR_ATOMIC(atomicMax, value > old ? value : old)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicAnd, old & value)
EMULATOR_ATOMIC(atomicExch, value)
template <typename T>
EMULATOR_UNSEEN inline T atomicCAS(T* at, T expected, T value) {
  emulator_atomic(at, sizeof(T));
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}

// --- arithmetic -----------------------------------------------------------------------------------

template <typename A, typename B>
constexpr auto min(A a, B b) -> decltype(a + b) { return b < a ? b : a; }
template <typename A, typename B>
constexpr auto max(A a, B b) -> decltype(a + b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }  // NaN loses, as in CUDA
inline float max(float a, float b) { return fmaxf(a, b); }

// Of an address in shared memory the kernels take the lower half: all of it has the upper one in
// common. That is no access of a kernel's.
static unsigned long long emulator_shared = 0;
EMULATOR_OWN inline unsigned long long __cvta_generic_to_shared(const void* at) {
  const unsigned long long address = reinterpret_cast<unsigned long long>(at);
  emulator_shared = address >> 32 << 32;
  return address;
}
inline unsigned long long __cvta_generic_to_global(const void* at) {
  return reinterpret_cast<unsigned long long>(at);
}
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
// Towards zero: what the double sum lost, or the float lost of it, tells the side.
inline float __fadd_rz(float a, float b) {
  const double sum = static_cast<double>(a) + b, part = sum - a;
  const double lost = (a - (sum - part)) + (b - part);
  const float near = static_cast<float>(sum);
  const double over = near != sum ? near - sum : -lost;  // near, less the exact sum
  if (near == 0 || near != near || !(near > 0 ? over > 0 : over < 0)) return near;
  return emulator::bits<float>(emulator::bits<unsigned>(near) - 1);
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
// Both saturate; a NaN becomes 0.
inline int __float2int_rz(float x) {
  return x != x ? 0 : x >= 0x1p31f ? 0x7fffffff : x <= -0x1p31f ? -0x7fffffff - 1 : static_cast<int>(x);
}
inline unsigned __float2uint_rz(float x) {
  return !(x > 0.0f) ? 0u : x >= 0x1p32f ? 0xffffffffu : static_cast<unsigned>(x);
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) {
    found |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return found;
}
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
