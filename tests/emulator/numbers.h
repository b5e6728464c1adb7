// SPDX-FileCopyrightText: Copyright (c) 2026 the cupy_cache authors
// SPDX-License-Identifier: Apache-2.0
// The numbers that codes of few bits stand for: in kernels, and in the runner.
//
// They are handled as double, which holds each of them: where results of float operations that are
// too small for a normal float become 0, as the kernels are compiled, those of double do not.

extern "C" {
double ldexp(double, int) noexcept;
int ilogb(double) noexcept;
double rint(double) noexcept;
double fabs(double) noexcept;
}

namespace ptx {

inline unsigned bits_of(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline double as_double(float value) {
  const unsigned bits = bits_of(value);
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
    return encode(fabs(number)) | (number == number ? bits_of(value) >> 31 << kSign : 0);
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

}  // namespace ptx
