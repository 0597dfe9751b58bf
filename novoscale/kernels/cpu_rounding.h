// Stochastic rounding, and the formats that need it: as in rounding.py and momentum.py, where they are
// explained.

#pragma once

#include <cmath>

#include "cpu_formats.h"

namespace {

constexpr int64_t BLOCK = 128;  // elements of the first moment that have one scale

INLINE uint32_t scramble_rest(uint32_t x) {
  x *= 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 15;
}

INLINE uint32_t scramble(uint32_t x) { return scramble_rest(x ^ x >> 16); }

VARIANTS void hash_of(uint32_t low, uint32_t high, uint32_t *bits, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t x = (low + static_cast<uint32_t>(i)) * 0x9e3779b9;
    bits[i] = x ^ x >> 16 ^ high;
  }
}

// What a key does not take part in, of the hash of n elements from `position` on.
void hash_positions(int64_t position, uint32_t *bits, int64_t n) {
  const int64_t rest = (int64_t{1} << 32) - (position & 0xffffffff);  // until the upper half changes
  const int64_t now = n < rest ? n : rest;
  hash_of(static_cast<uint32_t>(position), scramble(position >> 32), bits, now);
  if (now < n) hash_positions(position + now, bits + now, n - now);
}

// And the rest of it: 32 random bits for each.
VARIANTS void mix_key(uint32_t *bits, uint32_t key, int64_t n) {
  for (int64_t i = 0; i < n; i++) bits[i] = scramble_rest(bits[i] ^ key);
}

VARIANTS void mix_keys(uint32_t *bits, const uint32_t *keys, int64_t n) {
  for (int64_t i = 0; i < n; i++) bits[i] = scramble_rest(bits[i] ^ keys[i]);
}

// ---- bfloat16 ----

VARIANTS void round_to(const float *from, BFloat16 *to, const uint32_t *bits, int32_t shift, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t exact = bits_of(from[i]);
    const uint32_t rounded = (exact + (bits[i] >> shift & 0xffff)) >> 16;
    to[i].bits = static_cast<uint16_t>((exact & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
  }
}

// ---- blocks of codes ----

VARIANTS void decode(const int8_t *codes, float scale, float *values) {
  for (int64_t i = 0; i < BLOCK; i++) values[i] = static_cast<float>(codes[i]) * scale;
}

VARIANTS void unpack(const uint8_t *packed, int8_t *codes) {
  for (int64_t i = 0; i < BLOCK / 2; i++) {
    codes[2 * i] = static_cast<int8_t>(packed[i] << 4) >> 4;
    codes[2 * i + 1] = static_cast<int8_t>(packed[i]) >> 4;
  }
}

VARIANTS void pack(const int8_t *codes, uint8_t *packed) {
  for (int64_t i = 0; i < BLOCK / 2; i++) {
    packed[i] = static_cast<uint8_t>((codes[2 * i] & 15) | codes[2 * i + 1] << 4);
  }
}

// The largest magnitude of a block, as bits: they are ordered as the numbers are, NaN above all.
VARIANTS uint32_t magnitude_of(const float *values) {
  uint32_t magnitude = 0;
  for (int64_t i = 0; i < BLOCK; i++) {
    const uint32_t own = bits_of(values[i]) & 0x7fffffff;
    magnitude = own > magnitude ? own : magnitude;
  }
  return magnitude;
}

// Codes up to `largest` of a block, whose largest magnitude has these bits; returns the scale.
VARIANTS BFloat16 encode(const float *values, const uint32_t *bits, uint32_t magnitude, float largest,
                         int8_t *codes) {
  if (magnitude == 0 || magnitude >= 0x7f800000) {
    std::memset(codes, 0, BLOCK);
    return {static_cast<uint16_t>(magnitude == 0 ? 0 : 0x7fc0)};
  }
  // Up to the next bfloat16, and not below the smallest normal number.
  const float quotient = float_of(magnitude) * static_cast<float>(1 / static_cast<double>(largest));
  uint32_t scale = (bits_of(quotient) + 0xffff) & 0xffff0000;
  scale = scale < 0x00800000 ? 0x00800000 : scale;
  const float inverse = 1 / float_of(scale);
  for (int64_t i = 0; i < BLOCK; i++) {
    const float chance = static_cast<float>(static_cast<int32_t>(bits[i] >> 16) * 2 + 1) * 0x1p-17f;
    const float code = std::floor(values[i] * inverse + chance);
    const float least = code < -largest ? -largest : code;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(least > largest ? largest : least));
  }
  return {static_cast<uint16_t>(scale >> 16)};
}

}  // namespace
