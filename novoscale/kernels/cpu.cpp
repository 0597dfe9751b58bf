// Both passes over the elements, for tensors in a CPU's memory. reference.py is the definition; cpu.py
// builds this file, fills the tables and calls the two functions at the end.
//
// The update of a chunk goes by tiles, or by blocks of the first moment: what is not float32 is widened into
// a buffer in the first-level cache and narrowed from there, so the arithmetic is written once, for float32.
//
// Flags that matter: -ffp-contract=off (each product and each sum is rounded), -fno-trapping-math
// (conditional values become vector code); never -ffast-math.

#include <omp.h>

#include <cstdint>
#include <cstring>

#include "cpu_formats.h"
#include "cpu_rounding.h"

namespace {

constexpr int64_t TILE = 256;  // elements; with more, memory idles while a tile is widened
constexpr int64_t SMALL = 1 << 15;  // elements that are done before other threads would have started

enum Decay : int32_t { NO_DECAY, INSIDE, OUTSIDE };  // of the first moment

// One tensor with its options. As in cpu.py.
struct Shard {
  void *param, *grad, *exp_avg, *scale;  // exp_avg is null where none is kept, scale where it has none
  int32_t param_format, grad_format, exp_avg_format;
  int32_t norm_type, decay, rounds_weights;
  float beta1, beta3, weight_decay;
};

// Elements start..stop of a shard: see shards.py. `end` elements are in the chunks up to this one.
struct Chunk {
  int64_t start, stop, layer, position, size, place, shard, end;

  // Call visit(layer, start, stop) for each layer of which the chunk has elements.
  template <typename Visit>
  void each_layer(const Visit &visit) const {
    int64_t from = start, to = start + size - position % size;
    for (int64_t index = layer; from < stop; index++, from = to, to += size) {
      visit(index, from, to < stop ? to : stop);
    }
  }
};

struct Table {
  const Shard *shards;
  const Chunk *chunks;
  int64_t count;
};

// ---- The first pass over a chunk ----

constexpr int64_t SHORT = 1 << 13;  // elements below which streams are not worth their beginnings

// Sixteen sums in each of some streams, put together in a fixed order: the same bits whatever the vectors'
// width. Four streams run through a quarter of the chunk each: a single one would wait for memory at
// each new page.
template <int64_t STREAMS, typename T>
INLINE double sum_of_squares(const T *g, int64_t n) {
  constexpr int64_t LANES = 16;
  const int64_t length = n / (STREAMS * LANES) * LANES;  // of a stream
  double sums[STREAMS * LANES] = {};
  for (int64_t i = 0; i < length; i += LANES) {
    for (int64_t stream = 0; stream < STREAMS; stream++) {
      for (int64_t lane = 0; lane < LANES; lane++) {
        const double value = widen(g[stream * length + i + lane]);
        sums[stream * LANES + lane] += value * value;
      }
    }
  }
  double sum = 0;
  for (int64_t i = STREAMS * length; i < n; i++) {
    const double value = widen(g[i]);
    sum += value * value;
  }
  // By halves: a chain of additions would take longer than the squares of a small layer.
#pragma GCC unroll 6
  for (int64_t width = STREAMS * LANES / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; k++) sums[k] += sums[k + width];
  }
  return sum + sums[0];
}

template <typename T>
INLINE double sum_of_squares(const T *g, int64_t n) {
  return n < SHORT ? sum_of_squares<1>(g, n) : sum_of_squares<4>(g, n);
}

// Magnitudes are ordered as their bits are, NaN above all.
template <typename T>
INLINE double largest_magnitude(const T *g, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; i++) {
    const uint32_t magnitude = bits_of(widen(g[i])) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return float_of(largest);
}

VARIANTS double statistic(const float *g, int64_t n, int32_t norm_type) {
  return norm_type == 2 ? sum_of_squares(g, n) : largest_magnitude(g, n);
}

VARIANTS double statistic(const BFloat16 *g, int64_t n, int32_t norm_type) {
  return norm_type == 2 ? sum_of_squares(g, n) : largest_magnitude(g, n);
}

VARIANTS double statistic(const Float16 *g, int64_t n, int32_t norm_type) {
  return norm_type == 2 ? sum_of_squares(g, n) : largest_magnitude(g, n);
}

double statistic(const Shard &shard, int64_t start, int64_t n) {
  switch (shard.grad_format) {
    case BFLOAT16:
      return statistic(static_cast<const BFloat16 *>(shard.grad) + start, n, shard.norm_type);
    case FLOAT16:
      return statistic(static_cast<const Float16 *>(shard.grad) + start, n, shard.norm_type);
    default:
      return statistic(static_cast<const float *>(shard.grad) + start, n, shard.norm_type);
  }
}

// Two statistics of a layer as one.
double combine(double a, double b, int32_t norm_type) {
  if (norm_type == 2) return a + b;
  return b > a || b != b ? b : a;  // a NaN stays
}

// ---- The second pass over a chunk ----

// n elements from `start` on as float32: where they lie, or in the buffer.
float *load(void *tensor, int32_t format, int64_t start, int64_t n, float *buffer) {
  switch (format) {
    case BFLOAT16:
      widen(static_cast<const BFloat16 *>(tensor) + start, buffer, n);
      return buffer;
    case FLOAT16:
      widen(static_cast<const Float16 *>(tensor) + start, buffer, n);
      return buffer;
    default:
      return static_cast<float *>(tensor) + start;
  }
}

// Write back what `load` returned; float32 was changed where it lies. With bits, bfloat16 is rounded by 16 of
// them.
void store(const float *values, void *tensor, int32_t format, int64_t start, int64_t n,
           const uint32_t *bits, int32_t shift) {
  switch (format) {
    case BFLOAT16:
      if (bits) return round_to(values, static_cast<BFloat16 *>(tensor) + start, bits, shift, n);
      return narrow(values, static_cast<BFloat16 *>(tensor) + start, n);
    case FLOAT16:
      return narrow(values, static_cast<Float16 *>(tensor) + start, n);
  }
}

struct Step {
  float grad_scale, step_size, outside_decay, beta1, beta3, weight_decay;
  int32_t decay;
};

INLINE void step_piece(float *w, const float *g, float *m, int64_t n, const Step &s) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    float moment = g[i] * s.grad_scale;
    if (s.decay == INSIDE) moment += w[i] * s.weight_decay;
    moment *= s.beta3;
    if (m) {
      moment += m[i] * s.beta1;
      m[i] = moment;
    }
    float change = moment * s.step_size;
    if (s.decay == OUTSIDE) change += w[i] * s.outside_decay;
    w[i] -= change;
  }
}

// In two streams, for the same reason as the sums.
VARIANTS void step(float *w, const float *g, float *m, int64_t n, const Step s) {
  constexpr int64_t STREAMS = 2, PIECE = 64;
  const int64_t length = n < SHORT ? 0 : n / (STREAMS * PIECE) * PIECE;  // of a stream
  for (int64_t i = 0; i < length; i += PIECE) {
    for (int64_t stream = 0; stream < STREAMS; stream++) {
      const int64_t at = stream * length + i;
      step_piece(w + at, g + at, m ? m + at : nullptr, PIECE, s);
    }
  }
  const int64_t rest = STREAMS * length;
  step_piece(w + rest, g + rest, m ? m + rest : nullptr, n - rest, s);
}

// Vectors with one element per layer. What they hold enters the arithmetic as float32.
struct Layers {
  const double *grad_scale, *step_size, *decay;
  const bool *active;
  const int64_t *key;

  Step step(int64_t layer, const Shard &shard) const {
    return {static_cast<float>(grad_scale[layer]),
            static_cast<float>(step_size[layer]),
            static_cast<float>(decay[layer]),
            shard.beta1,
            shard.beta3,
            shard.weight_decay,
            shard.decay};
  }
};

// Elements start..stop of one layer; the moments lie from `place` on.
void update_elements(const Shard &shard, int64_t start, int64_t stop, int64_t place, int64_t position,
                     uint32_t key, const Step &s) {
  alignas(64) float buffers[3][TILE];
  alignas(64) uint32_t bits[TILE];
  const bool in_place = shard.param_format == FLOAT32 && shard.grad_format == FLOAT32 &&
                        shard.exp_avg_format == FLOAT32;
  const bool rounds_moment = shard.exp_avg_format == BFLOAT16;
  const int64_t tile = in_place ? stop - start : TILE;
  for (int64_t at = start; at < stop; at += tile) {
    const int64_t n = stop - at < tile ? stop - at : tile;
    const int64_t moments = place + at - start;
    if (shard.rounds_weights || rounds_moment) random_bits(position + at - start, key, bits, n);
    const float *g = load(shard.grad, shard.grad_format, at, n, buffers[0]);
    float *w = load(shard.param, shard.param_format, at, n, buffers[1]);
    float *m = shard.exp_avg ? load(shard.exp_avg, shard.exp_avg_format, moments, n, buffers[2]) : nullptr;
    step(w, g, m, n, s);
    store(w, shard.param, shard.param_format, at, n, shard.rounds_weights ? bits : nullptr, 0);
    if (m) store(m, shard.exp_avg, shard.exp_avg_format, moments, n, bits, 16);
  }
}

// The moments of a block to and from a buffer.
void load_block(const Shard &shard, int64_t block, float *values) {
  alignas(64) int8_t codes[BLOCK];
  const float scale = widen(static_cast<const BFloat16 *>(shard.scale)[block]);
  if (shard.exp_avg_format == INT4) {
    unpack(static_cast<const uint8_t *>(shard.exp_avg) + block * BLOCK / 2, codes);
    decode(codes, scale, values);
  } else {
    decode(static_cast<const int8_t *>(shard.exp_avg) + block * BLOCK, scale, values);
  }
}

void store_block(const Shard &shard, int64_t block, const float *values, const uint32_t *bits) {
  alignas(64) int8_t codes[BLOCK];
  const bool packed = shard.exp_avg_format == INT4;
  int8_t *to = packed ? codes : static_cast<int8_t *>(shard.exp_avg) + block * BLOCK;
  static_cast<BFloat16 *>(shard.scale)[block] = encode(values, bits, packed ? 7.0f : 127.0f, to);
  if (packed) pack(codes, static_cast<uint8_t *>(shard.exp_avg) + block * BLOCK / 2);
}

// The elements of one block of the first moment, which may be of several layers.
void update_block(const Shard &shard, const Chunk &part, const Layers &layers) {
  alignas(64) float weights[BLOCK], gradients[BLOCK], moments[BLOCK];
  alignas(64) uint32_t bits[BLOCK];
  const int64_t lane = part.position % BLOCK, n = part.stop - part.start;
  bool any = false, loaded = false;
  part.each_layer([&](int64_t layer, int64_t start, int64_t stop) {
    const uint32_t key = static_cast<uint32_t>(layers.key[layer]);
    const int64_t from = lane + start - part.start, count = stop - start;
    random_bits(part.position + start - part.start, key, bits + from, count);
    if (!layers.active[layer]) return;
    if (!loaded) load_block(shard, part.place, moments);
    any = loaded = true;
    const float *g = load(shard.grad, shard.grad_format, start, count, gradients);
    float *w = load(shard.param, shard.param_format, start, count, weights);
    step(w, g, moments + from, count, layers.step(layer, shard));
    store(w, shard.param, shard.param_format, start, count, shard.rounds_weights ? bits + from : nullptr, 0);
  });
  if (!any) return;
  // Of the rest of the block another rank has a part, or nobody.
  const auto clear = [&](int64_t from, int64_t to) {
    std::memset(moments + from, 0, (to - from) * sizeof *moments);
    std::memset(bits + from, 0, (to - from) * sizeof *bits);
  };
  clear(0, lane);
  clear(lane + n, BLOCK);
  store_block(shard, part.place, moments, bits);
}

void update(const Shard &shard, const Chunk &chunk, const Layers &layers) {
  if (!shard.scale) {
    chunk.each_layer([&](int64_t layer, int64_t start, int64_t stop) {
      const int64_t done = start - chunk.start;
      if (!layers.active[layer]) return;
      update_elements(shard, start, stop, chunk.place + done, chunk.position + done,
                      static_cast<uint32_t>(layers.key[layer]), layers.step(layer, shard));
    });
    return;
  }
  Chunk part = chunk;
  for (; part.start < chunk.stop; part.start = part.stop, part.place++) {
    part.position = chunk.position + part.start - chunk.start;
    part.layer = chunk.layer + part.position / part.size - chunk.position / part.size;
    const int64_t stop = part.start + BLOCK - part.position % BLOCK;
    part.stop = stop < chunk.stop ? stop : chunk.stop;
    update_block(shard, part, layers);
  }
}

// ---- The threads ----

// The number of chunks that end within the first `elements`.
int64_t chunks_within(const Table &table, int64_t elements) {
  int64_t low = 0, high = table.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (table.chunks[middle].end <= elements) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Call visit(index) for every chunk. Each thread has a stretch of them, of about as many elements as any
// other's and the same in both passes, so that a gradient is read twice by the same core.
template <typename Visit>
void each_chunk(const Table &table, int64_t threads, const Visit &visit) {
  const int64_t total = table.count ? table.chunks[table.count - 1].end : 0;
  // One or all: libgomp would end the threads that a smaller team leaves out, and start them again.
#pragma omp parallel num_threads(total <= SMALL ? 1 : threads)
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = chunks_within(table, total * thread / team);
    const int64_t last = chunks_within(table, total * (thread + 1) / team);
    for (int64_t index = first; index < last; index++) visit(index);
  }
}

}  // namespace

// The statistic of each of `layers` layers; `partial` has room for two numbers per chunk.
extern "C" void novoscale_sum_of_squares(const Shard *shards, const Chunk *chunks, int64_t count,
                                         double *partial, double *result, int64_t layers, int64_t threads) {
  std::memset(result, 0, layers * sizeof *result);
  // Only the first and the last layer of a chunk may go on in another one.
  each_chunk({shards, chunks, count}, threads, [&](int64_t index) {
    const Chunk &chunk = chunks[index];
    chunk.each_layer([&](int64_t layer, int64_t start, int64_t stop) {
      const double found = statistic(shards[chunk.shard], start, stop - start);
      if (start == chunk.start) {
        partial[2 * index] = found;
      } else if (stop == chunk.stop) {
        partial[2 * index + 1] = found;
      } else {
        result[layer] = found;
      }
    });
  });
  // In the order of the table, so the bits do not depend on the threads.
  for (int64_t index = 0; index < count; index++) {
    const Chunk &chunk = chunks[index];
    const int32_t norm_type = shards[chunk.shard].norm_type;
    const int64_t more = (chunk.position % chunk.size + chunk.stop - chunk.start - 1) / chunk.size;
    result[chunk.layer] = combine(result[chunk.layer], partial[2 * index], norm_type);
    if (more) result[chunk.layer + more] = combine(result[chunk.layer + more], partial[2 * index + 1], norm_type);
  }
}

extern "C" void novoscale_update(const Shard *shards, const Chunk *chunks, int64_t count,
                                 const double *grad_scale, const double *step_size, const double *decay,
                                 const bool *active, const int64_t *key, int64_t threads) {
  const Layers layers{grad_scale, step_size, decay, active, key};
  each_chunk({shards, chunks, count}, threads,
             [&](int64_t index) { update(shards[chunks[index].shard], chunks[index], layers); });
}
