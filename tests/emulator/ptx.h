// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// What the inline PTX of the kernels does, by the PTX ISA's description and not by what the kernels
// have in its place elsewhere. ptx.py puts calls of these functions where the instructions stand;
// their parameters are the operands as they are numbered.

namespace ptx {

inline void cvt_f32_f16(float& to, unsigned short from) {
  const float value = static_cast<float>(F16::decode(from & 0x7fff));
  to = from >> 15 ? -value : value;
}
inline void cvt_rn_f16_f32(unsigned short& to, float from) { to = F16::encode_float<15>(from); }
inline void cvt_rn_bf16_f32(unsigned short& to, float from) { to = BF16::encode_float<15>(from); }
inline void cvt_rn_f16x2_e4m3x2(unsigned& to, unsigned short from) {
  const auto half = [](unsigned code) {
    return F16::encode(E4M3::decode(code & 0x7f)) | ((code & 0x7f) == 0x7f ? 0 : (code & 0x80) << 8);
  };
  to = half(from & 0xff) | half(from >> 8) << 16;
}
inline void cvt_rn_f16x2_e4m3x2_high(unsigned& to, unsigned from) {
  cvt_rn_f16x2_e4m3x2(to, static_cast<unsigned short>(from >> 16));
}
// The first of two goes into the upper half.
inline void cvt_rn_satfinite_e5m2x2_f32(unsigned short& to, float high, float low) {
  to = E5M2::encode_float<7>(high) << 8 | E5M2::encode_float<7>(low);
}
inline void cvt_rn_satfinite_e4m3x2_f32(unsigned short& to, float high, float low) {
  to = E4M3::encode_float<7>(high) << 8 | E4M3::encode_float<7>(low);
}
inline void cvt_pack_sat_s8_s32_b32(unsigned& to, int high, int low) {
  const auto saturated = [](int value) {
    return static_cast<unsigned>(value < -128 ? -128 : value > 127 ? 127 : value) & 0xff;
  };
  to = saturated(high) << 8 | saturated(low);
}

// Not the compiled kernels' own arithmetic, for which numbers below the normal ones are 0.
struct WithSmallNumbers {
#ifdef __SSE__
  unsigned before = __builtin_ia32_stmxcsr();
  WithSmallNumbers() { __builtin_ia32_ldmxcsr(before & ~0x8040u); }
  ~WithSmallNumbers() { __builtin_ia32_ldmxcsr(before); }
#endif
};
inline void div_rn_f32(float& to, float a, float b) {
  volatile float x = a, y = b, result;
  {
    WithSmallNumbers here;
    result = x / y;
  }
  to = result;
}
inline void mul_rn_f32(float& to, float a, float b) {
  volatile float x = a, y = b, result;
  {
    WithSmallNumbers here;
    result = x * y;
  }
  to = result;
}
inline void add_rn_f32(float& to, float a, float b) {
  volatile float x = a, y = b, result;
  {
    WithSmallNumbers here;
    result = x + y;
  }
  to = result;
}
inline void sub_rn_f32(float& to, float a, float b) {
  volatile float x = a, y = b, result;
  {
    WithSmallNumbers here;
    result = x - y;
  }
  to = result;
}

template <typename T>
__forceinline__ const T& at(unsigned long long address) {
  return *reinterpret_cast<const T*>(address);
}
__forceinline__ void mov_s64(unsigned long long& to, unsigned long long from) { to = from; }
__forceinline__ void ld_s64(long long& to, unsigned long long from) { to = at<long long>(from); }
__forceinline__ void ld_s32(int& to, unsigned long long from) { to = at<int>(from); }

// What the L2 is to do with the lines changes no result.
using Policy = unsigned long long;
__forceinline__ void ld_v4_u32(
    unsigned& x, unsigned& y, unsigned& z, unsigned& w, unsigned long long from, Policy) {
  const uint4 all = at<uint4>(from);
  x = all.x, y = all.y, z = all.z, w = all.w;
}
__forceinline__ void ld_v2_u32(unsigned& x, unsigned& y, unsigned long long from, Policy) {
  const uint2 all = at<uint2>(from);
  x = all.x, y = all.y;
}
__forceinline__ void ld_u32(unsigned& to, unsigned long long from, Policy) { to = at<unsigned>(from); }
__forceinline__ void ld_u16(unsigned short& to, unsigned long long from, Policy) {
  to = at<unsigned short>(from);
}
__forceinline__ void ld_u8(unsigned short& to, unsigned long long from, Policy) {
  to = at<unsigned char>(from);
}
template <typename T>
__forceinline__ void st(unsigned long long to, const T& value, unsigned when) {
  if (when != 0) *reinterpret_cast<T*>(to) = value;
}
__forceinline__ void st_v4_u32(
    unsigned long long to, unsigned x, unsigned y, unsigned z, unsigned w, Policy, unsigned when) {
  st<uint4>(to, {x, y, z, w}, when);
}
__forceinline__ void st_v2_u32(
    unsigned long long to, unsigned x, unsigned y, Policy, unsigned when) {
  st<uint2>(to, {x, y}, when);
}
__forceinline__ void st_u32(unsigned long long to, unsigned value, Policy, unsigned when) {
  st<unsigned>(to, value, when);
}
__forceinline__ void st_u16(unsigned long long to, unsigned short value, Policy, unsigned when) {
  st<unsigned short>(to, value, when);
}
__forceinline__ void st_u8(unsigned long long to, unsigned short value, Policy, unsigned when) {
  st<unsigned char>(to, static_cast<unsigned char>(value), when);
}

EMULATOR_OWN inline char* shared(unsigned address) {
  return reinterpret_cast<char*>(emulator_shared | address);
}

template <typename T>
__forceinline__ void cp(unsigned to, unsigned long long from, unsigned bytes) {
  T value = {};
  if (bytes == sizeof(T)) value = at<T>(from);
  *reinterpret_cast<T*>(shared(to)) = value;
}
// Copies whose end must be waited for are done as early as may be, at once, or as late as may be, when
// they are waited for: as the launch has it.
template <typename T>
__forceinline__ void cp_or_later(unsigned to, unsigned long long from, unsigned bytes) {
  if (!emulator_put_off({from, to, bytes, sizeof(T)})) cp<T>(to, from, bytes);
}
__forceinline__ void cp_16(unsigned to, unsigned long long from, unsigned bytes) {
  cp_or_later<uint4>(to, from, bytes);
}
__forceinline__ void cp_8(unsigned to, unsigned long long from, unsigned bytes) {
  cp_or_later<uint2>(to, from, bytes);
}
__forceinline__ void cp_4(unsigned to, unsigned long long from, unsigned bytes) {
  cp_or_later<unsigned>(to, from, bytes);
}
inline void cp_commit() { emulator_end_group(); }
inline void cp_wait(unsigned groups) {
  EmulatorCopy copy;
  while (emulator_awaited(groups, &copy)) {
    if (copy.size == 16) cp<uint4>(copy.to, copy.from, copy.bytes);
    else if (copy.size == 8) cp<uint2>(copy.to, copy.from, copy.bytes);
    else cp<unsigned>(copy.to, copy.from, copy.bytes);
  }
}
inline void cp_wait_0() { cp_wait(0); }
inline void cp_wait_1() { cp_wait(1); }
inline void cp_wait_2() { cp_wait(2); }
inline void cp_wait_3() { cp_wait(3); }

inline void nothing() {}
// Of a word at which copies arrive: how many threads arrive in a round, how many have, the bytes that
// are expected and not there yet, and the number of the round. As of an mbarrier, no more than the
// instructions know what is in it; its accesses order nothing, and so are not seen.
struct Arrivals {
  unsigned expected : 8, arrived : 8, round : 16;
  int missing;
};
EMULATOR_OWN inline Arrivals load_arrivals(unsigned at) {
  return *reinterpret_cast<Arrivals*>(shared(at));
}
EMULATOR_OWN inline void store_arrivals(unsigned at, Arrivals word) {
  if (word.arrived == word.expected && word.missing == 0) word.arrived = 0, ++word.round;
  *reinterpret_cast<Arrivals*>(shared(at)) = word;
}
inline void mbarrier_init(unsigned at, unsigned count) {
  Arrivals word = {};
  word.expected = count;
  store_arrivals(at, word);
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(unsigned at, unsigned bytes) {
  Arrivals word = load_arrivals(at);
  ++word.arrived;
  word.missing += static_cast<int>(bytes);
  store_arrivals(at, word);
}
inline void arrive_bytes(unsigned at, int bytes) {
  Arrivals word = load_arrivals(at);
  word.missing -= bytes;
  store_arrivals(at, word);
}
inline void cp_bulk(unsigned to, unsigned long long from, unsigned bytes, unsigned arrivals) {
  if (to % 16 != 0 || from % 16 != 0 || bytes % 16 != 0) {
    emulator_refuse("a row that is not aligned to 16 bytes is copied");
  }
  int done = 0;
  for (unsigned i = 0; i < bytes; i += 16) {
    const uint4 read = at<uint4>(from + i);
    EmulatorPiece piece = {arrivals, to + i, {}};
    memcpy(piece.bits, &read, 16);
    if (emulator_put_off_piece(piece)) continue;
    *reinterpret_cast<uint4*>(shared(to + i)) = read;
    done += 16;
  }
  arrive_bytes(arrivals, done);
}
// Who waits is not who copied, and other threads read at once: what comes late is not seen.
EMULATOR_OWN inline void store_late(const EmulatorPiece& piece) {
  unsigned long long* to = reinterpret_cast<unsigned long long*>(shared(piece.to));
  to[0] = piece.bits[0], to[1] = piece.bits[1];
}
inline bool is_over(unsigned at, unsigned odd) { return load_arrivals(at).round % 2 != odd; }
inline void mbarrier_try_wait(unsigned& over, unsigned at, unsigned odd = 0) {
  EmulatorPiece piece;
  while (!is_over(at, odd) && emulator_awaited_piece(at, &piece)) {
    store_late(piece);
    arrive_bytes(at, 16);
  }
  over = is_over(at, odd);
  if (!over) emulator_exchange(1u << emulator::lane(), 0);  // the others go on
}
inline void fence_proxy() {}

// All of a block's warps wait, where some would do: all come to such barriers equally often.
inline void bar_sync(unsigned, unsigned) { emulator_sync_block(); }

// A cluster has one block here.
inline void cluster_sync() { emulator_sync_block(); }
inline void mapa(unsigned& to, unsigned from, unsigned) { to = from; }
inline void st_async(unsigned to, float x, float y, unsigned arrivals) {
  *reinterpret_cast<float2*>(shared(to)) = {x, y};
  arrive_bytes(arrivals, sizeof(float2));
}
inline void ld_cluster(float& x, float& y, unsigned from) {
  const float2 both = *reinterpret_cast<const float2*>(shared(from));
  x = both.x, y = both.y;
}

inline void ex2(float& to, float from) { to = static_cast<float>(exp2(as_double(from))); }
inline void sub_f16x2(unsigned& to, unsigned a, unsigned b) {
  const auto number = [](unsigned half) {
    const double value = F16::decode(half & 0x7fff);
    return half & 0x8000 ? -value : value;
  };
  to = 0;
  for (int at = 0; at < 32; at += 16) {
    const double difference = number(a >> at & 0xffff) - number(b >> at & 0xffff);
    to |= (F16::encode(fabs(difference)) | (difference < 0 ? 0x8000 : 0)) << at;
  }
}

// Lane l has the address of row l % 8 of matrix l / 8. A row is 16 bytes; lane l gets the two
// elements of row l / 4 from number 2 * (l % 4) on or, transposed, those of column l / 4.
inline unsigned element(unsigned long long row, int number) {
  return reinterpret_cast<const unsigned short*>(row)[number];
}
EMULATOR_OWN inline void take_rows(unsigned long long (&rows)[32], unsigned from) {
  const unsigned long long* given = emulator_exchange(~0u, from);
  for (int i = 0; i < 32; ++i) {
    rows[i] = reinterpret_cast<unsigned long long>(shared(static_cast<unsigned>(given[i])));
  }
}
template <bool kTransposed>
inline void ldmatrix(unsigned (&to)[4], unsigned from) {
  const int lane = emulator::lane();
  unsigned long long rows[32];
  take_rows(rows, from);
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned found[2];
    for (int i = 0; i < 2; ++i) {
      const int major = lane / 4, minor = lane % 4 * 2 + i;
      found[i] = kTransposed ? element(rows[8 * matrix + minor], major)
                             : element(rows[8 * matrix + major], minor);
    }
    to[matrix] = found[0] | found[1] << 16;
  }
}
inline void ldmatrix_x4(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned from) {
  unsigned to[4];
  ldmatrix<false>(to, from);
  a = to[0], b = to[1], c = to[2], d = to[3];
}
inline void ldmatrix_x4_trans(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned from) {
  unsigned to[4];
  ldmatrix<true>(to, from);
  a = to[0], b = to[1], c = to[2], d = to[3];
}
// Lane l has the elements 2 * (l % 4) and the next of row l / 4, and gets those of column l / 4.
EMULATOR_OWN inline void movmatrix_trans(unsigned& to, unsigned from) {
  const unsigned long long* given = emulator_exchange(~0u, from);
  const int row = emulator::lane() % 4 * 2, column = emulator::lane() / 4;
  unsigned found[2];
  for (int i = 0; i < 2; ++i) {
    found[i] = given[(row + i) * 4 + column / 2] >> column % 2 * 16 & 0xffff;
  }
  to = found[0] | found[1] << 16;
}

// d = A * B + C, of which every lane has parts. Of A [16, depth] and B [depth, 8] they are pairs of
// neighbours along the depth, in registers for 8 rows and 8 of the depth each: first those for the
// upper 8 rows, then for the lower.
#define EMULATOR_MMA_16(name, is_bf16)                                                           \
  inline void name(                                                                             \
      float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2,        \
      unsigned a3, unsigned b0, unsigned b1, float c0, float c1, float c2, float c3) {          \
    float d[4];                                                                                 \
    const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};                                     \
    const float c[4] = {c0, c1, c2, c3};                                                         \
    emulator_mma(is_bf16, 16, d, a, b, c);                                                       \
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];                                                  \
  }
EMULATOR_MMA_16(mma_bf16, true)
EMULATOR_MMA_16(mma_f16, false)
inline void mma_f16_8(
    float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned b0, float c0,
    float c1, float c2, float c3) {
  float d[4];
  const unsigned a[2] = {a0, a1}, b[1] = {b0};
  const float c[4] = {c0, c1, c2, c3};
  emulator_mma(false, 8, d, a, b, c);
  d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

// What a descriptor of a matrix in shared memory tells: where it is, and how far apart groups of eight
// rows of 128 bytes are. An address has all its bits here, as these are no more where shared memory
// begins at 0. Bits 4 to 6 of it are exchanged by bits 7 to 9.
struct Matrix {
  unsigned at, stride;
  explicit Matrix(unsigned long long bits)
      : at(static_cast<unsigned>(bits) << 4), stride((bits >> 32 & 0x3fff) * 16) {
    if (bits >> 62 != 1) emulator_refuse("a matrix whose chunks are not exchanged among 128 bytes");
    if (bits >> 49 & 7) emulator_refuse("a matrix that is not at a multiple of 1,024 bytes");
  }
  // Of a row of 16 elements or, transposed, of a row of 64 one of 16.
  unsigned element(int row, int column) const {
    unsigned address = at + row / 8 * stride + row % 8 * 128 + column * 2;
    address ^= (address >> 7 & 7) << 4;
    return *reinterpret_cast<const unsigned short*>(shared(address));
  }
};
EMULATOR_OWN inline double number(bool is_bf16, unsigned code) {
  return emulator_numbers(is_bf16)[code];
}
// A thread's sums of a product of 64 rows: row lane / 4 of 16 of its warp's, and eight rows further,
// of which it has the columns 2 * (lane % 4) and the next, of eight.
template <int kColumns>
void wgmma(bool is_bf16, float* const (&sums)[kColumns / 2], Matrix a, Matrix b, bool transposed) {
  const int lane = emulator::lane(), warp = threadIdx.x / 32 % 4;
  for (int i = 0; i < kColumns / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = as_double(*sums[i]);
    for (int k = 0; k < 16; ++k) {
      const unsigned its = transposed ? a.element(k, row) : a.element(row, k);
      sum += number(is_bf16, its) * number(is_bf16, b.element(column, k));
    }
    *sums[i] = static_cast<float>(sum);
  }
}
// A product's operands: its sums, the two matrices, and whether it transposes.
template <int kColumns, typename... Operands>
void wgmma_operands(bool is_bf16, Operands&&... operands) {
  const void* all[] = {&operands...};
  constexpr int kSums = kColumns / 2;
  static_assert(sizeof...(operands) == kSums + 3, "a product's operands");
  float* sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = static_cast<float*>(const_cast<void*>(all[i]));
  const auto matrix = [&](int number) {
    return Matrix(*static_cast<const unsigned long long*>(all[number]));
  };
  const bool transposed = *static_cast<const bool*>(all[kSums + 2]);
  wgmma<kColumns>(is_bf16, sums, matrix(kSums), matrix(kSums + 1), transposed);
}
template <int kColumns, typename... Operands>
void wgmma_bf16(Operands&&... operands) {
  wgmma_operands<kColumns>(true, operands...);
}
template <int kColumns, typename... Operands>
void wgmma_f16(Operands&&... operands) {
  wgmma_operands<kColumns>(false, operands...);
}

}  // namespace ptx
