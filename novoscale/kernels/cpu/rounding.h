// Stochastic rounding, and the formats that need it: state/rounding.py and state/formats.py explain them.

#pragma once

#include <algorithm>
#include <cmath>

#include "formats.h"

namespace {

constexpr int64_t BLOCK = 128;  // elements of the first moment that have one scale
constexpr int64_t TILE_BLOCKS = TILE / BLOCK;

INLINE uint32_t scramble_rest(uint32_t x) {
  x *= 0x7feb352d;
  x = (x ^ x >> 15) * 0x846ca68b;
  return x ^ x >> 15;
}

INLINE uint32_t scramble(uint32_t x) { return scramble_rest(x ^ x >> 16); }

// Of n elements that do not cross a multiple of 2**32 in their parameter.
template <bool EACH>
INLINE void hash(int64_t position, const uint32_t *keys, uint32_t *bits, int64_t n) {
  constexpr uint32_t GOLDEN = 0x9e3779b9;
  const uint32_t high = scramble(static_cast<uint32_t>(position >> 32)), key = high ^ *keys;
  uint32_t x = static_cast<uint32_t>(position) * GOLDEN;
  for (int64_t i = 0; i < n; i++, x += GOLDEN) {
    bits[i] = scramble_rest(x ^ x >> 16 ^ (EACH ? high ^ keys[i] : key));
  }
}

VARIANTS void hash_layer(int64_t position, const uint32_t *key, uint32_t *bits, int64_t n) {
  hash<false>(position, key, bits, n);
}

VARIANTS void hash_each(int64_t position, const uint32_t *keys, uint32_t *bits, int64_t n) {
  hash<true>(position, keys, bits, n);
}

// 32 random bits for each of n elements from `position` on, of a layer or of layers of one element.
void random_bits(int64_t position, const uint32_t *keys, bool each, uint32_t *bits, int64_t n) {
  const int64_t rest = (int64_t{1} << 32) - (position & 0xffffffff);  // until the upper half changes
  const int64_t now = n < rest ? n : rest;
  (each ? hash_each : hash_layer)(position, keys, bits, now);
  if (now < n) random_bits(position + now, each ? keys + now : keys, each, bits + now, n - now);
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

// How the codes of a block are stored, and the largest of them. `unpack` returns where they lie: in place, or in
// the buffer. Codes are made in 32 bits and packed in a second loop: a loop that did both would use vectors of
// half the width.
struct Int8 {
  static constexpr int64_t BYTES = BLOCK;
  static constexpr int32_t LARGEST = 127;
  static INLINE const int8_t *unpack(const uint8_t *from, int8_t *) {
    return reinterpret_cast<const int8_t *>(from);
  }
  static INLINE void pack(const int32_t *codes, uint8_t *to) {
    for (int64_t i = 0; i < BYTES; i++) to[i] = static_cast<uint8_t>(codes[i]);
  }
};

struct Int4 {
  static constexpr int64_t BYTES = BLOCK / 2;
  static constexpr int32_t LARGEST = 7;
  static INLINE const int8_t *unpack(const uint8_t *from, int8_t *codes) {
    for (int64_t i = 0; i < BYTES; i++) {
      codes[2 * i] = static_cast<int8_t>(from[i] << 4) >> 4;
      codes[2 * i + 1] = static_cast<int8_t>(from[i]) >> 4;
    }
    return codes;
  }
  static INLINE void pack(const int32_t *codes, uint8_t *to) {
    alignas(64) int8_t bytes[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) bytes[i] = static_cast<int8_t>(codes[i]);
    for (int64_t i = 0; i < BYTES; i++) {
      to[i] = static_cast<uint8_t>((bytes[2 * i] & 15) | bytes[2 * i + 1] << 4);
    }
  }
};

template <typename Form>
INLINE void decode(const uint8_t *from, const BFloat16 *scales, float *values, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++, from += Form::BYTES, values += BLOCK) {
    alignas(64) int8_t buffer[BLOCK];
    const int8_t *codes = Form::unpack(from, buffer);
    const float scale = widen(scales[b]);
    for (int64_t i = 0; i < BLOCK; i++) values[i] = static_cast<float>(codes[i]) * scale;
  }
}

// The largest magnitude of each block, as bits: they are ordered as the numbers are, NaN above all.
VARIANTS void magnitudes_of(const float *values, uint32_t *magnitudes, int64_t blocks) {
  for (int64_t b = 0; b < blocks; b++, values += BLOCK) {
    uint32_t magnitude = 0;
    for (int64_t i = 0; i < BLOCK; i++) {
      const uint32_t own = bits_of(values[i]) & 0x7fffffff;
      magnitude = own > magnitude ? own : magnitude;
    }
    magnitudes[b] = magnitude;
  }
}

// The scale of a block, from the bits of its largest magnitude.
INLINE float scale_of(uint32_t magnitude, int32_t largest) {
  // Up to the next bfloat16, and not below the smallest normal number.
  const float quotient = float_of(magnitude) * static_cast<float>(1.0 / largest);
  const uint32_t up = (bits_of(quotient) + 0xffff) & 0xffff0000;
  const uint32_t scale = up < 0x00800000 ? 0x00800000 : up;
  return float_of(magnitude == 0 ? 0 : magnitude < 0x7f800000 ? scale : 0x7fc00000);
}

// Codes of a block whose values are finite.
INLINE void encode_block(const float *values, const uint32_t *bits, float inverse, int32_t largest,
                         int32_t *codes) {
  for (int64_t i = 0; i < BLOCK; i++) {
    // 1 + chance, from 16 bits and the middle between them and the next.
    const float above = float_of((bits[i] >> 9 & 0x7fff80) | 0x3f800040);
    const int32_t code = static_cast<int32_t>(std::floor(values[i] * inverse + (above - 1)));
    codes[i] = std::min(std::max(code, -largest), largest);
  }
}

// Write codes and scales of those of some blocks that changed; `magnitudes`: bits of their largest ones.
// There are values for all blocks.
template <typename Form>
INLINE void encode(const float *values, const uint32_t *bits, const uint32_t *magnitudes, const bool *changed,
                   uint8_t *to, BFloat16 *scales, int64_t blocks) {
  // The scales of all blocks first, for a block's codes would wait for the division.
  alignas(64) float scale[TILE_BLOCKS], inverse[TILE_BLOCKS];
  for (int64_t b = 0; b < TILE_BLOCKS; b++) {
    scale[b] = scale_of(magnitudes[b], Form::LARGEST);
    inverse[b] = 1 / scale[b];
  }
  for (int64_t b = 0; b < blocks; b++) {
    if (!changed[b]) continue;
    alignas(64) int32_t codes[BLOCK];
    if (scale[b] > 0) {
      encode_block(values + b * BLOCK, bits + b * BLOCK, inverse[b], Form::LARGEST, codes);
    } else {
      std::memset(codes, 0, sizeof codes);
    }
    Form::pack(codes, to + b * Form::BYTES);
    scales[b].bits = static_cast<uint16_t>(bits_of(scale[b]) >> 16);
  }
}

#define IN_BLOCKS(FORM) \
  VARIANTS void decode_##FORM(const uint8_t *from, const BFloat16 *scales, float *values, int64_t blocks) { \
    decode<FORM>(from, scales, values, blocks); \
  } \
  VARIANTS void encode_##FORM(const float *values, const uint32_t *bits, const uint32_t *magnitudes, \
                              const bool *changed, uint8_t *to, BFloat16 *scales, int64_t blocks) { \
    encode<FORM>(values, bits, magnitudes, changed, to, scales, blocks); \
  }

IN_BLOCKS(Int8)
IN_BLOCKS(Int4)

// The above by the number of the format. To add one: a struct like Int8, IN_BLOCKS, and a case in both.
void decode_blocks(int32_t format, const uint8_t *from, const BFloat16 *scales, float *values, int64_t blocks) {
  switch (format) {
    case INT4:
      return decode_Int4(from, scales, values, blocks);
    default:
      return decode_Int8(from, scales, values, blocks);
  }
}

void encode_blocks(int32_t format, const float *values, const uint32_t *bits, const uint32_t *magnitudes,
                   const bool *changed, uint8_t *to, BFloat16 *scales, int64_t blocks) {
  switch (format) {
    case INT4:
      return encode_Int4(values, bits, magnitudes, changed, to, scales, blocks);
    default:
      return encode_Int8(values, bits, magnitudes, changed, to, scales, blocks);
  }
}

}  // namespace
