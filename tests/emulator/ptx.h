// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// What the inline PTX of the kernels does, by the PTX ISA's description and not by what the kernels
// have in its place elsewhere. ptx.py puts calls of these functions where the instructions stand;
// their parameters are the operands as they are numbered.
//
// Numbers are handled as double, which holds each of them: where results of float operations that
// are too small for a normal float become 0, as the kernels are compiled, those of double do not.

extern "C" {
double ldexp(double, int) noexcept;
int ilogb(double) noexcept;
}

namespace ptx {

inline double as_double(float value) {
  const unsigned bits = emulator::bits<unsigned>(value);
  const int exponent = bits >> 23 & 0xff, mantissa = bits & 0x7fffff;
  const double sign = bits >> 31 ? -1.0 : 1.0;
  if (exponent == 0xff) return mantissa ? __builtin_nan("") : sign * __builtin_inf();
  return sign * (exponent ? ldexp(mantissa | 0x800000, exponent - 150) : ldexp(mantissa, -149));
}

// A type of kMantissa bits behind the point of a normal number, the smallest of which is
// 2 ** kSmallest. Codes from kEnd on are no numbers: the first is infinity, unless kFinite.
template <int kMantissa, int kSmallest, unsigned kEnd, bool kFinite>
struct Type {
  // The bits without the sign, of the number nearest to a magnitude; of two, the even one.
  static unsigned encode(double magnitude) {
    if (magnitude != magnitude) return kFinite ? 0x7f : 0x7fff;
    if (magnitude == __builtin_inf()) return kFinite ? kEnd - 1 : kEnd;
    int exponent = magnitude > 0 ? ilogb(magnitude) : kSmallest;
    if (exponent < kSmallest) exponent = kSmallest;
    const double steps = rint(ldexp(magnitude, kMantissa - exponent));
    const double code = ldexp(exponent - kSmallest, kMantissa) + steps;
    return code < kEnd ? static_cast<unsigned>(code) : kFinite ? kEnd - 1 : kEnd;
  }
  // Of a float, with its sign in bit kSign.
  template <int kSign>
  static unsigned encode_float(float value) {
    const double number = as_double(value);
    const unsigned sign = emulator::bits<unsigned>(value) >> 31;
    return encode(fabs(number)) | (number == number ? sign << kSign : 0);
  }
  static double decode(unsigned magnitude) {
    if (magnitude >= kEnd) {
      return magnitude == kEnd && !kFinite ? __builtin_inf() : __builtin_nan("");
    }
    const int exponent = magnitude >> kMantissa, mantissa = magnitude & ((1 << kMantissa) - 1);
    return exponent ? ldexp(mantissa + (1 << kMantissa), exponent - 1 + kSmallest - kMantissa)
                    : ldexp(mantissa, kSmallest - kMantissa);
  }
};
using F16 = Type<10, -14, 0x7c00, false>;
using BF16 = Type<7, -126, 0x7f80, false>;
using E4M3 = Type<3, -6, 0x7f, true>;
using E5M2 = Type<2, -14, 0x7c, true>;

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

template <typename T>
__forceinline__ const T& at(unsigned long long address) {
  return *reinterpret_cast<const T*>(address);
}
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

}  // namespace ptx
