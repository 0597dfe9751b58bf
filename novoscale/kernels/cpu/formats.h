// The formats of elements: one element to and from float32, and arrays of them.
//
// Without branches, so that loops over them become vector code. To add one: `Format`, `BITS`, `widen` and
// `narrow`; a case in `load`, `store` and, for gradients, `FIRST_PASS` and `with_gradient` (kernels.cpp); and
// its number in elements.py. Formats in blocks of codes are in rounding.h.

#pragma once

#include <cstdint>
#include <cstring>

// One library for every x86-64; the variant is chosen when it is loaded. Needs glibc's loader. From x86-64-v4 on
// vectors of 512 bits hold bytes and 16 bits too; a GCC before 12 does not know that name.
#if !defined(VARIANTS) && defined(__x86_64__) && defined(__GLIBC__)
#if __GNUC__ >= 12
#define VARIANTS __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VARIANTS __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#elif !defined(VARIANTS)
#define VARIANTS
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t TILE = 256;  // elements that are done at once: with more, memory idles meanwhile

enum Format : int32_t { FLOAT32, BFLOAT16, FLOAT16, INT8, INT4 };  // as in elements.py
constexpr int64_t BITS[] = {32, 16, 16, 8, 4};  // of an element

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE float widen(float value) { return value; }

INLINE float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

INLINE void narrow(float value, BFloat16 &to) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = static_cast<uint16_t>(nan ? 0x7fc0 : rounded);
}

// Float16's exponents in float32: what to add to one, and the smallest of a normal number.
constexpr uint32_t REBIAS = (127 - 15) << 23, SMALLEST_NORMAL = (127 - 14) << 23;

INLINE float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t normal = magnitude + REBIAS;
  const uint32_t special = magnitude | 0x7f800000;  // infinity and NaN
  // A subnormal is its fraction put onto the smallest normal number, less that number.
  const uint32_t subnormal = bits_of(float_of(magnitude + SMALLEST_NORMAL) - float_of(SMALLEST_NORMAL));
  const uint32_t finite = magnitude < 1 << 23 ? subnormal : normal;
  return float_of(sign | (magnitude < 31 << 23 ? finite : special));
}

INLINE void narrow(float value, Float16 &to) {
  constexpr uint32_t OVERFLOW = 0x477ff000;  // 65520, from which on the nearest is infinity
  const uint32_t sign = bits_of(value) >> 16 & 0x8000;
  const uint32_t magnitude = bits_of(value) & 0x7fffffff;
  const uint32_t normal = (magnitude - REBIAS + 0xfff + (magnitude >> 13 & 1)) >> 13;  // as above
  // Float32 next to 0.5 is spaced as float16's subnormals are: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < SMALLEST_NORMAL ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  to.bits = static_cast<uint16_t>(sign | (magnitude < OVERFLOW ? finite : special));
}

VARIANTS void widen(const BFloat16 *from, float *to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

VARIANTS void widen(const Float16 *from, float *to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = widen(from[i]);
}

VARIANTS void narrow(const float *from, BFloat16 *to, int64_t n) {
  for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
}

VARIANTS void narrow(const float *from, Float16 *to, int64_t n) {
  for (int64_t i = 0; i < n; i++) narrow(from[i], to[i]);
}

}  // namespace
