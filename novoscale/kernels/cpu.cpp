// Both passes over the elements, for tensors in a CPU's memory. reference.py is the definition; cpu.py
// builds this file, fills the tables and calls the two functions at the end.
//
// The update of a chunk goes by tiles: what is not float32 is widened into a buffer in the first-level
// cache and narrowed from there, so the arithmetic is written once, for float32.
//
// Flags that matter: -ffp-contract=off (each product and each sum is rounded), -fno-trapping-math
// (conditional values become vector code); never -ffast-math.

#include <omp.h>

#include <cstdint>
#include <cstring>

#include "cpu_formats.h"

namespace {

constexpr int64_t TILE = 256;  // elements; with more, memory idles while a tile is widened
constexpr int64_t SMALL = 1 << 15;  // elements that are done before other threads would have started

enum Decay : int32_t { NO_DECAY, INSIDE, OUTSIDE };  // of the first moment

// One tensor with its options. As in cpu.py.
struct Shard {
  void *param, *grad, *exp_avg;  // exp_avg is null where none is kept
  int32_t param_format, grad_format, exp_avg_format;
  int32_t norm_type, decay;
  float beta1, beta3, weight_decay;
};

// Elements start..stop of a shard, of one layer; `end` elements are in the chunks up to this one.
struct Chunk {
  int64_t shard, start, stop, layer, end;
};

struct Table {
  const Shard *shards;
  const Chunk *chunks;
  int64_t count;
};

// ---- The first pass over a chunk ----

// Sixteen sums in each of four streams, put together in a fixed order: the same bits whatever the vectors'
// width. The streams run through a quarter of the chunk each: a single one would wait for memory at
// each new page.
template <typename T>
INLINE double sum_of_squares(const T *g, int64_t n) {
  constexpr int64_t STREAMS = 4, LANES = 16;
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

double statistic(const Shard &shard, const Chunk &chunk) {
  const int64_t n = chunk.stop - chunk.start;
  switch (shard.grad_format) {
    case BFLOAT16:
      return statistic(static_cast<const BFloat16 *>(shard.grad) + chunk.start, n, shard.norm_type);
    case FLOAT16:
      return statistic(static_cast<const Float16 *>(shard.grad) + chunk.start, n, shard.norm_type);
    default:
      return statistic(static_cast<const float *>(shard.grad) + chunk.start, n, shard.norm_type);
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

// Write back what `load` returned; float32 was changed where it lies.
void store(const float *values, void *tensor, int32_t format, int64_t start, int64_t n) {
  switch (format) {
    case BFLOAT16:
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
  const int64_t length = n / (STREAMS * PIECE) * PIECE;  // of a stream
  for (int64_t i = 0; i < length; i += PIECE) {
    for (int64_t stream = 0; stream < STREAMS; stream++) {
      const int64_t at = stream * length + i;
      step_piece(w + at, g + at, m ? m + at : nullptr, PIECE, s);
    }
  }
  const int64_t rest = STREAMS * length;
  step_piece(w + rest, g + rest, m ? m + rest : nullptr, n - rest, s);
}

void update(const Shard &shard, const Chunk &chunk, const Step &s) {
  alignas(64) float buffers[3][TILE];
  const bool in_place = shard.param_format == FLOAT32 && shard.grad_format == FLOAT32 &&
                        shard.exp_avg_format == FLOAT32;
  const int64_t tile = in_place ? chunk.stop - chunk.start : TILE;
  for (int64_t start = chunk.start; start < chunk.stop; start += tile) {
    const int64_t n = chunk.stop - start < tile ? chunk.stop - start : tile;
    const float *g = load(shard.grad, shard.grad_format, start, n, buffers[0]);
    float *w = load(shard.param, shard.param_format, start, n, buffers[1]);
    float *m = shard.exp_avg ? load(shard.exp_avg, shard.exp_avg_format, start, n, buffers[2]) : nullptr;
    step(w, g, m, n, s);
    store(w, shard.param, shard.param_format, start, n);
    if (m) store(m, shard.exp_avg, shard.exp_avg_format, start, n);
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

// The statistic of each of `layers` layers; `partial` has room for one number per chunk.
extern "C" void novoscale_sum_of_squares(const Shard *shards, const Chunk *chunks, int64_t count,
                                         double *partial, double *result, int64_t layers, int64_t threads) {
  each_chunk({shards, chunks, count}, threads, [&](int64_t index) {
    partial[index] = statistic(shards[chunks[index].shard], chunks[index]);
  });
  // In the order of the table, so the bits do not depend on the threads.
  std::memset(result, 0, layers * sizeof *result);
  for (int64_t index = 0; index < count; index++) {
    double &slot = result[chunks[index].layer];
    slot = combine(slot, partial[index], shards[chunks[index].shard].norm_type);
  }
}

// The vectors have one element per layer. What they hold enters the arithmetic as float32.
extern "C" void novoscale_update(const Shard *shards, const Chunk *chunks, int64_t count,
                                 const double *grad_scale, const double *step_size, const double *decay,
                                 const bool *active, int64_t threads) {
  each_chunk({shards, chunks, count}, threads, [&](int64_t index) {
    const Chunk &chunk = chunks[index];
    const Shard &shard = shards[chunk.shard];
    const int64_t layer = chunk.layer;
    if (!active[layer]) return;
    update(shard, chunk,
           {static_cast<float>(grad_scale[layer]), static_cast<float>(step_size[layer]),
            static_cast<float>(decay[layer]), shard.beta1, shard.beta3, shard.weight_decay, shard.decay});
  });
}
