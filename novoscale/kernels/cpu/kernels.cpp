// Both passes over the elements, for tensors in a CPU's memory. reference/elements.py is the definition;
// build.py builds this file; elements.py fills the tables and calls the three functions at the end.
//
// The sums of a factored parameter's rows and columns are made of panels, in one pass over them. What a panel
// adds to the columns goes into memory of its own, and is added up when all panels of a wave are done.
//
// The update of a chunk goes by tiles, of complete blocks where the first moment is in blocks. What is not
// float32 is widened into a buffer in the first-level cache and narrowed from there, so the arithmetic is
// written once, for float32. Meanwhile the elements of a later tile are fetched.
//
// Flags that matter: -ffp-contract=off (each product and each sum is rounded), -fno-trapping-math
// (conditional values become vector code); never -ffast-math.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "layers.h"
#include "rounding.h"

namespace {

constexpr int64_t AHEAD = 4 * TILE;  // how far what will be needed is fetched: see `fetch`
constexpr int64_t SMALL = 1 << 15;  // elements that are done before other threads would have started

// What is done to an element. As in elements.py, except FACTORED and EACH, which are known of a chunk.
enum Option : int32_t {
  MOMENT = 1,  // there is a first moment
  NESTEROV = 2,  // only with one
  DECAYS = 4,
  FACTORED = 8,
  INSIDE = 16,  // the decay, and the division by a factored root, come before the moment
  EACH = 32,  // each element is a layer
};

// One tensor with its options. As in elements.py.
struct Shard {
  void *param, *grad, *exp_avg, *scale;  // exp_avg is null where none is kept, scale where it has none
  int32_t param_format, grad_format, exp_avg_format;
  int32_t norm_type, options, rounds_weights, group;
};

// What the update needs to know of a layer, and of a param group: see Coefficients in shards.py.
struct Record {
  float grad_scale, step_size, decay, ahead;
};

struct Group {
  float beta1, beta3, weight_decay, eps;
};

// Elements start..stop of a shard: see shards.py. `end` elements are in the chunks up to this one.
struct Chunk {
  int64_t start, stop, layer, position, size, place, column, sharded, shard, end;

  // Whether its layers have one element each, as those of a vector may. Such layers are done together.
  bool each() const { return size == 1; }

  // Call visit(layer, start, stop) for each layer of which the chunk has elements; or once for all layers.
  template <typename Visit>
  void each_run(const Visit &visit) const {
    if (each()) return visit(layer, start, stop);
    int64_t from = start, to = start + size - position % size;
    for (int64_t index = layer; from < stop; index++, from = to, to += size) {
      visit(index, from, to < stop ? to : stop);
    }
  }
};

// Rows of a factored parameter, or the same columns of them; `stride` elements lie between the beginnings of
// two. `end` elements are in the panels up to this one; its sums are put at `offset`, those of its rows first.
// A wave begins where that is 0.
struct Panel {
  int64_t start, rows, width, stride, layer, column, shard, end, offset;
};

// Fetch n elements, while others are computed: loads alone would leave memory idle meanwhile. Not many at once,
// for then the loads wait. They may be beyond an end, for nothing is read.
template <typename T>
INLINE void fetch(const T *from, int64_t n) {
  const char *bytes = reinterpret_cast<const char *>(from);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, 0, 2);
}

// ---- The first pass over a chunk or a panel ----

constexpr int64_t SHORT = 1 << 13;  // elements below which streams are not worth their beginnings

// Sixteen sums in each of some streams, put together in a fixed order: the same bits whatever the vectors'
// width. Four streams run through a quarter of the chunk each: a single one would wait for memory at
// each new page.
template <int64_t STREAMS, typename T>
INLINE double sum_of_squares(const T *g, int64_t n) {
  constexpr int64_t LANES = 16;
  const int64_t length = n / (STREAMS * LANES) * LANES;  // of a stream
  double sums[STREAMS * LANES] = {};
  for (int64_t from = 0; from < length; from += TILE) {
    if (STREAMS > 1) {  // of a short layer most would be beyond its end
      for (int64_t stream = 0; stream < STREAMS; stream++) fetch(g + stream * length + from + TILE, TILE);
    }
    const int64_t to = std::min(from + TILE, length);
    for (int64_t i = from; i < to; i += LANES) {
      for (int64_t stream = 0; stream < STREAMS; stream++) {
        for (int64_t lane = 0; lane < LANES; lane++) {
          const double value = widen(g[stream * length + i + lane]);
          sums[stream * LANES + lane] += value * value;
        }
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

// Of layers of one element each.
template <typename T>
INLINE void statistics(const T *g, int64_t n, int32_t norm_type, double *result) {
  for (int64_t i = 0; i < n; i++) {
    const float value = widen(g[i]);
    const double square = static_cast<double>(value) * value;
    result[i] = norm_type == 2 ? square : float_of(bits_of(value) & 0x7fffffff);
  }
}

constexpr int64_t ROWS = 8;

// The squares of some rows, added to the sums of the columns and of the rows. Several rows at once, so that
// the columns' sums are read and written once for all of them.
template <int64_t COUNT>
INLINE void sum_rows(const float *g, int64_t width, int64_t stride, double *rows, double *columns) {
  constexpr int64_t LANES = 8;
  double sums[COUNT * LANES] = {};
  int64_t j = 0;
  for (; j + LANES <= width; j += LANES) {
    double column[LANES];
    for (int64_t lane = 0; lane < LANES; lane++) column[lane] = columns[j + lane];
    for (int64_t row = 0; row < COUNT; row++) {
      for (int64_t lane = 0; lane < LANES; lane++) {
        const double value = g[row * stride + j + lane];
        column[lane] += value * value;
        sums[row * LANES + lane] += value * value;
      }
    }
    for (int64_t lane = 0; lane < LANES; lane++) columns[j + lane] = column[lane];
  }
  for (int64_t row = 0; row < COUNT; row++) {
    double sum = 0;
    for (int64_t lane = 0; lane < LANES; lane++) sum += sums[row * LANES + lane];
    for (int64_t k = j; k < width; k++) {
      const double value = g[row * stride + k];
      columns[k] += value * value;
      sum += value * value;
    }
    rows[row] += sum;
  }
}

VARIANTS void sum_squares(const float *g, int64_t count, int64_t width, int64_t stride, double *rows,
                          double *columns) {
  int64_t row = 0;
  for (; row + ROWS <= count; row += ROWS) sum_rows<ROWS>(g + row * stride, width, stride, rows + row, columns);
  for (; row < count; row++) sum_rows<1>(g + row * stride, width, stride, rows + row, columns);
}

// The sums of a panel's rows, followed by those of its columns.
void sum_panel(const float *g, const Panel &panel, double *sums) {
  std::memset(sums, 0, (panel.rows + panel.width) * sizeof *sums);
  sum_squares(g, panel.rows, panel.width, panel.stride, sums, sums + panel.rows);
}

// Elements of 16 bits are widened first: in one loop with the squares, that would be done in short vectors.
template <typename T>
void sum_panel(const T *g, const Panel &panel, double *sums) {
  alignas(64) float wide[ROWS * TILE];
  std::memset(sums, 0, (panel.rows + panel.width) * sizeof *sums);
  for (int64_t row = 0; row < panel.rows; row += ROWS) {
    const int64_t rows = std::min(ROWS, panel.rows - row);
    for (int64_t j = 0; j < panel.width; j += TILE) {
      const int64_t width = std::min(TILE, panel.width - j);
      for (int64_t k = 0; k < rows; k++) {
        const T *from = g + (row + k) * panel.stride + j;
        fetch(from + TILE, TILE);
        widen(from, wide + k * TILE, width);
      }
      sum_squares(wide, rows, width, TILE, sums + row, sums + panel.rows + j);
    }
  }
}

// What is done to gradients of each format.
#define FIRST_PASS(T) \
  VARIANTS double statistic(const T *g, int64_t n, int32_t norm_type) { \
    return norm_type == 2 ? sum_of_squares(g, n) : largest_magnitude(g, n); \
  } \
  VARIANTS void statistics_of_each(const T *g, int64_t n, int32_t norm_type, double *result) { \
    statistics(g, n, norm_type, result); \
  }

FIRST_PASS(float)
FIRST_PASS(BFloat16)
FIRST_PASS(Float16)

// Call visit(address) for the gradient from `start` on.
template <typename Visit>
auto with_gradient(const Shard &shard, int64_t start, const Visit &visit) {
  switch (shard.grad_format) {
    case BFLOAT16:
      return visit(static_cast<const BFloat16 *>(shard.grad) + start);
    case FLOAT16:
      return visit(static_cast<const Float16 *>(shard.grad) + start);
    default:
      return visit(static_cast<const float *>(shard.grad) + start);
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

// Fetch what comes AHEAD of the elements of a tile that ends at `stop`, if so many `more` follow.
void fetch_next(const void *tensor, int32_t format, int64_t stop, int64_t more) {
  const int64_t n = std::min(TILE, more - AHEAD);
  fetch(static_cast<const uint8_t *>(tensor) + (stop + AHEAD) * BITS[format] / 8, n * BITS[format] / 8);
}

// Write back what `load` returned; float32 was changed in place. With bits, bfloat16 is rounded by 16 of them.
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

// The numbers of a step, for consecutive elements. What is an address is that of the first element's number.
struct Step {
  // One for all elements; EACH: one for each.
  const Record *layer;
  const float *row_root;
  const bool *active;
  const float *column_root;  // one for each element; EACH: one for all
  Group group;
  int32_t options;

  // Whether any of the elements from..to is active.
  bool changes(int64_t from, int64_t to) const {
    const int64_t each = options & EACH ? 1 : 0;
    for (int64_t i = from; i < to; i++) {
      if (active[each * i] && (!(options & FACTORED) || column_root[(1 - each) * i] > 0)) return true;
    }
    return false;
  }
};

// The options are known where this becomes part of a caller, so that nothing is decided in the loop.
INLINE void step_piece(float *w, const float *g, float *m, int64_t start, int64_t stop, const Step &s,
                       const int32_t options) {
  const bool each = options & EACH, factored = options & FACTORED, nesterov = options & NESTEROV;
  const bool decays_inside = (options & DECAYS) && (options & INSIDE);
  const bool decays_outside = (options & DECAYS) && !(options & INSIDE);
  const Record layer = *s.layer;
  const float row_root = *s.row_root, column_root = factored ? *s.column_root : 0;
#pragma omp simd
  for (int64_t i = start; i < stop; i++) {
    const float column = factored && !each ? s.column_root[i] : column_root;
    const float root = (each ? s.row_root[i] : row_root) * column + s.group.eps;
    const bool active = (!each || s.active[i]) && (!factored || column > 0);
    float term = g[i] * (each ? s.layer[i].grad_scale : layer.grad_scale);
    if (factored && (options & INSIDE)) term /= root;
    if (decays_inside) term += w[i] * s.group.weight_decay;
    term *= s.group.beta3;
    float moment = term;
    if (options & MOMENT) {
      moment += m[i] * s.group.beta1;
      m[i] = active ? moment : m[i];
    }
    const float size = each ? s.layer[i].step_size : layer.step_size;
    float change = moment * (nesterov ? each ? s.layer[i].ahead : layer.ahead : size);
    if (nesterov) change += term * size;
    if (factored && !(options & INSIDE)) change /= root;
    if (decays_outside) change += w[i] * (each ? s.layer[i].decay : layer.decay);
    w[i] = active ? w[i] - change : w[i];
  }
}

// In two streams, for the same reason as the sums.
template <int32_t OPTIONS>
INLINE void step_layer(float *w, const float *g, float *m, int64_t n, const Step &s) {
  constexpr int64_t STREAMS = 2, PIECE = 64;
  const int64_t length = n < SHORT ? 0 : n / (STREAMS * PIECE) * PIECE;  // of a stream
  for (int64_t i = 0; i < length; i += PIECE) {
    for (int64_t stream = 0; stream < STREAMS; stream++) {
      const int64_t at = stream * length + i;
      step_piece(w, g, m, at, at + PIECE, s, OPTIONS);
    }
  }
  step_piece(w, g, m, STREAMS * length, n, s, OPTIONS);
}

// One option after another becomes known to the compiler, if it makes a difference.
template <int32_t KNOWN, int32_t OPTION>
INLINE void step_with(float *w, const float *g, float *m, int64_t n, const Step &s) {
  constexpr bool differs = OPTION == NESTEROV ? KNOWN & MOMENT : OPTION != INSIDE || KNOWN & (DECAYS | FACTORED);
  if constexpr (OPTION == EACH) {
    step_layer<KNOWN>(w, g, m, n, s);
  } else if (differs && s.options & OPTION) {
    step_with<differs ? KNOWN | OPTION : KNOWN, 2 * OPTION>(w, g, m, n, s);
  } else {
    step_with<KNOWN, 2 * OPTION>(w, g, m, n, s);
  }
}

VARIANTS void step(float *w, const float *g, float *m, int64_t n, const Step &given) {
  const Step s = given;
  // Vectors hold few of a model's elements: nothing else is known, so that all compiles in seconds.
  if (s.options & EACH && m) return step_piece(w, g, m, 0, n, s, s.options | EACH | MOMENT);
  if (s.options & EACH) return step_piece(w, g, m, 0, n, s, (s.options | EACH) & ~MOMENT);
  step_with<0, 1>(w, g, m, n, s);
}

// One element per layer; per param group; and of column_root per column.
struct Layers {
  const Record *each;
  const Group *groups;
  const float *row_root, *column_root;
  const bool *active;
  const uint32_t *key;
  const int32_t *sharded_largest, *sharded_active;  // one of each sharded block

  // For the elements of a chunk from `start` on, which is in this layer.
  Step step(const Shard &shard, const Chunk &chunk, int64_t layer, int64_t start) const {
    const bool factored = chunk.column >= 0;
    const int64_t within = factored ? (chunk.position + start - chunk.start) % chunk.size : 0;
    return {each + layer,
            row_root + layer,
            active + layer,
            factored ? column_root + chunk.column + within : nullptr,
            groups[shard.group],
            shard.options | (factored ? FACTORED : 0) | (chunk.each() ? EACH : 0)};
  }

  // Random bits of n elements from `start` on, of which the first is in this layer.
  void random(const Chunk &chunk, int64_t layer, int64_t start, uint32_t *bits, int64_t n) const {
    random_bits(chunk.position + start - chunk.start, key + layer, chunk.each(), bits, n);
  }
};

// Elements start..stop of a chunk, of one layer or of layers of one element.
void update_elements(const Shard &shard, const Chunk &chunk, int64_t layer, int64_t start, int64_t stop,
                     const Layers &layers) {
  alignas(64) float buffers[3][TILE];
  alignas(64) uint32_t bits[TILE];
  const bool in_place = shard.param_format == FLOAT32 && shard.grad_format == FLOAT32 &&
                        shard.exp_avg_format == FLOAT32;
  const bool rounds_moment = shard.exp_avg_format == BFLOAT16;
  const int64_t tile = in_place ? stop - start : TILE;
  for (int64_t at = start; at < stop; at += tile) {
    const int64_t n = stop - at < tile ? stop - at : tile;
    const int64_t moments = chunk.place + at - chunk.start;
    const int64_t first = chunk.each() ? layer + at - start : layer;
    if (shard.rounds_weights || rounds_moment) layers.random(chunk, first, at, bits, n);
    const int64_t more = in_place ? 0 : chunk.stop - at - n;  // in place two streams do as well: see `step_layer`
    fetch_next(shard.grad, shard.grad_format, at + n, more);
    const float *g = load(shard.grad, shard.grad_format, at, n, buffers[0]);
    fetch_next(shard.param, shard.param_format, at + n, more);
    float *w = load(shard.param, shard.param_format, at, n, buffers[1]);
    if (shard.exp_avg) fetch_next(shard.exp_avg, shard.exp_avg_format, moments + n, more);
    float *m = shard.exp_avg ? load(shard.exp_avg, shard.exp_avg_format, moments, n, buffers[2]) : nullptr;
    step(w, g, m, n, layers.step(shard, chunk, first, at));
    store(w, shard.param, shard.param_format, at, n, shard.rounds_weights ? bits : nullptr, 0);
    if (m) store(m, shard.exp_avg, shard.exp_avg_format, moments, n, bits, 16);
  }
}

// The moments of some blocks, which may be of several layers, while they are updated.
struct Blocks {
  alignas(64) float moments[TILE_BLOCKS * BLOCK];
  alignas(64) uint32_t bits[TILE_BLOCKS * BLOCK];
  uint32_t magnitudes[TILE_BLOCKS] = {};
  bool changed[TILE_BLOCKS];  // whether any element is active

  // Make those of elements 0 that another rank has, or none.
  void clear(int64_t from, int64_t to) {
    std::memset(moments + from, 0, (to - from) * sizeof *moments);
    std::memset(bits + from, 0, (to - from) * sizeof *bits);
  }
};

// The elements of a part of a chunk, at most of a tile's blocks; `more` elements of the chunk follow. Unless
// `stored`, nothing is stored.
void update_blocks(const Shard &shard, const Chunk &part, int64_t more, const Layers &layers, bool stored,
                   Blocks &of) {
  alignas(64) float weights[TILE_BLOCKS * BLOCK], gradients[TILE_BLOCKS * BLOCK];
  const int64_t lane = part.position % BLOCK, end = lane + part.stop - part.start;
  const int64_t blocks = (end - 1) / BLOCK + 1;
  uint8_t *codes = static_cast<uint8_t *>(shard.exp_avg) + part.place * BLOCK * BITS[shard.exp_avg_format] / 8;
  BFloat16 *scales = static_cast<BFloat16 *>(shard.scale) + part.place;
  fetch_next(shard.grad, shard.grad_format, part.stop, more);
  decode_blocks(shard.exp_avg_format, codes, scales, of.moments, blocks);
  fetch_next(codes, shard.exp_avg_format, blocks * BLOCK, more);
  std::memset(of.changed, 0, sizeof of.changed);
  part.each_run([&](int64_t layer, int64_t start, int64_t stop) {
    const int64_t from = lane + start - part.start, to = from + stop - start, n = stop - start;
    layers.random(part, layer, start, of.bits + from, n);
    const Step s = layers.step(shard, part, layer, start);
    bool any = false;
    for (int64_t b = from / BLOCK; b * BLOCK < to; b++) {
      const bool own = s.changes(std::max(b * BLOCK, from) - from, std::min((b + 1) * BLOCK, to) - from);
      of.changed[b] |= own;
      any |= own;
    }
    if (!any) return;
    const float *g = load(shard.grad, shard.grad_format, start, n, gradients);
    float *w = load(shard.param, shard.param_format, start, n, weights);
    if (!stored && w != weights) w = static_cast<float *>(std::memcpy(weights, w, n * sizeof *w));
    step(w, g, of.moments + from, n, s);
    if (!stored) return;
    store(w, shard.param, shard.param_format, start, n, shard.rounds_weights ? of.bits + from : nullptr, 0);
  });
  fetch_next(shard.param, shard.param_format, part.stop, more);
  of.clear(0, lane);
  of.clear(end, blocks * BLOCK);
  magnitudes_of(of.moments, of.magnitudes, blocks);
  if (!stored) return;
  if (part.sharded >= 0) {
    of.magnitudes[0] = layers.sharded_largest[part.sharded];
    of.changed[0] = layers.sharded_active[part.sharded];
  }
  encode_blocks(shard.exp_avg_format, of.moments, of.bits, of.magnitudes, of.changed, codes, scales, blocks);
}

void update(const Shard &shard, const Chunk &chunk, const Layers &layers) {
  if (!shard.scale) {
    chunk.each_run([&](int64_t layer, int64_t start, int64_t stop) {
      if (chunk.each() || layers.active[layer]) update_elements(shard, chunk, layer, start, stop, layers);
    });
    return;
  }
  Blocks blocks;
  Chunk part = chunk;
  for (; part.start < chunk.stop; part.start = part.stop) {
    part.position = chunk.position + part.start - chunk.start;
    part.layer = chunk.layer + part.position / part.size - chunk.position / part.size;
    part.place = chunk.place + part.position / BLOCK - chunk.position / BLOCK;
    part.stop = std::min(part.start + TILE_BLOCKS * BLOCK - part.position % BLOCK, chunk.stop);
    update_blocks(shard, part, chunk.stop - part.stop, layers, true, blocks);
  }
}

// ---- The threads ----

struct Range {
  int64_t first, last;  // the last is not in it
};

// The part of consecutive rows of a table that one thread does: about as many elements as any other's.
template <typename Row>
Range own_rows(const Row *table, Range rows, int64_t thread, int64_t team) {
  const int64_t before = rows.first ? table[rows.first - 1].end : 0;
  const int64_t total = rows.first < rows.last ? table[rows.last - 1].end - before : 0;
  const auto ending_within = [&](int64_t elements) {
    const auto ends = [](const Row &row, int64_t most) { return row.end <= most; };
    return std::lower_bound(table + rows.first, table + rows.last, before + elements, ends) - table;
  };
  return {ending_within(total * thread / team), ending_within(total * (thread + 1) / team)};
}

// How many threads to use for so many elements. One or all: libgomp would end the threads that a smaller team
// leaves out, and start them again.
int64_t team_for(int64_t elements, int64_t threads) { return elements <= SMALL ? 1 : threads; }

// Call visit(index) for every chunk. Each thread has a run of them, the same in both passes, so that the same
// core reads a gradient twice.
template <typename Visit>
void each_chunk(const Chunk *chunks, int64_t count, int64_t threads, const Visit &visit) {
  if (!count) return;
#pragma omp parallel num_threads(team_for(chunks[count - 1].end, threads))
  {
    const Range own = own_rows(chunks, {0, count}, omp_get_thread_num(), omp_get_num_threads());
    for (int64_t index = own.first; index < own.last; index++) visit(index);
  }
}

// The statistic of each layer that is not factored. `ends` has room for two numbers per chunk.
void sum_chunks(const Shard *shards, const Chunk *chunks, int64_t count, double *ends, double *result,
                int64_t threads) {
  // Only the first and the last layer of a chunk may go on in another one.
  each_chunk(chunks, count, threads, [&](int64_t index) {
    const Chunk &chunk = chunks[index];
    const Shard &shard = shards[chunk.shard];
    chunk.each_run([&](int64_t layer, int64_t start, int64_t stop) {
      with_gradient(shard, start, [&](auto *g) {
        if (chunk.each()) return statistics_of_each(g, stop - start, shard.norm_type, result + layer);
        const double found = statistic(g, stop - start, shard.norm_type);
        if (start == chunk.start) {
          ends[2 * index] = found;
        } else if (stop == chunk.stop) {
          ends[2 * index + 1] = found;
        } else {
          result[layer] = found;
        }
      });
    });
  });
  // In the order of the table, so the bits do not depend on the threads.
  for (int64_t index = 0; index < count; index++) {
    const Chunk &chunk = chunks[index];
    if (chunk.each()) continue;
    const int32_t norm_type = shards[chunk.shard].norm_type;
    const int64_t more = (chunk.position % chunk.size + chunk.stop - chunk.start - 1) / chunk.size;
    result[chunk.layer] = combine(result[chunk.layer], ends[2 * index], norm_type);
    if (more) result[chunk.layer + more] = combine(result[chunk.layer + more], ends[2 * index + 1], norm_type);
  }
}

// What the panels of a wave found for some of their layers, or columns, added to the results: those of one
// thread, in the order of the table, so the bits do not depend on the threads.
// place(panel): its first layer or column, how many, and where their sums are.
template <typename Place>
void add_own(const Panel *panels, Range wave, double *result, int64_t thread, int64_t team, const Place &place) {
  int64_t low = INT64_MAX, high = 0;
  for (int64_t index = wave.first; index < wave.last; index++) {
    const auto [first, n, sums] = place(panels[index]);
    low = std::min(low, first);
    high = std::max(high, first + n);
  }
  const int64_t from = low + (high - low) * thread / team, to = low + (high - low) * (thread + 1) / team;
  for (int64_t index = wave.first; index < wave.last; index++) {
    const auto [first, n, sums] = place(panels[index]);
    const int64_t stop = std::min(to, first + n);
    for (int64_t k = std::max(from, first); k < stop; k++) result[k] += sums[k - first];
  }
}

// The sums of squares of factored parameters. `partial` has room for all sums of a wave.
void sum_panels(const Shard *shards, const Panel *panels, int64_t count, double *partial, double *rows,
                double *columns, int64_t threads) {
  if (!count) return;
  struct Sums {
    int64_t first, n;
    const double *values;
  };
#pragma omp parallel num_threads(team_for(panels[count - 1].end, threads))
  for (Range wave = {0, 0}; wave.first < count; wave.first = wave.last) {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    do wave.last++;
    while (wave.last < count && panels[wave.last].offset > 0);
    const Range own = own_rows(panels, wave, thread, team);
    for (int64_t index = own.first; index < own.last; index++) {
      const Panel &panel = panels[index];
      with_gradient(shards[panel.shard], panel.start,
                    [&](auto *g) { sum_panel(g, panel, partial + panel.offset); });
    }
#pragma omp barrier
    add_own(panels, wave, rows, thread, team, [&](const Panel &p) {
      return Sums{p.layer, p.rows, partial + p.offset};
    });
    add_own(panels, wave, columns, thread, team, [&](const Panel &p) {
      return Sums{p.column, p.width, partial + p.offset + p.rows};
    });
#pragma omp barrier
  }
}

}  // namespace

// The statistic of each layer, followed by that of each column.
extern "C" void novoscale_sum_of_squares(const Shard *shards, const Chunk *chunks, int64_t chunk_count,
                                         const Panel *panels, int64_t panel_count, double *ends,
                                         double *partial, double *result, int64_t layers, int64_t columns,
                                         int64_t threads) {
  std::memset(result, 0, (layers + columns) * sizeof *result);
  sum_chunks(shards, chunks, chunk_count, ends, result, threads);
  sum_panels(shards, panels, panel_count, partial, result, result + layers, threads);
}

// The largest magnitude of this rank's moments in each sharded block after the update, and whether any of its
// elements is active: see interface.py. The chunks are parts of such blocks; `found` has room for two numbers of
// each.
extern "C" void novoscale_largest(const Shard *shards, const Chunk *chunks, int64_t count, int32_t *found,
                                  const Record *each, const Group *groups, const float *row_root,
                                  const float *column_root, const bool *active, const uint32_t *key,
                                  int64_t threads, int32_t *largest, int32_t *any) {
  const Layers layers{each, groups, row_root, column_root, active, key, nullptr, nullptr};
  each_chunk(chunks, count, threads, [&](int64_t index) {
    Blocks block;
    update_blocks(shards[chunks[index].shard], chunks[index], 0, layers, false, block);
    found[2 * index] = static_cast<int32_t>(block.magnitudes[0]);
    found[2 * index + 1] = block.changed[0];
  });
  for (int64_t index = 0; index < count; index++) {
    const int64_t sharded = chunks[index].sharded;
    largest[sharded] = std::max(largest[sharded], found[2 * index]);
    any[sharded] = std::max(any[sharded], found[2 * index + 1]);
  }
}

extern "C" void novoscale_update(const Shard *shards, const Chunk *chunks, int64_t count,
                                 const Record *each, const Group *groups, const float *row_root,
                                 const float *column_root, const bool *active, const uint32_t *key,
                                 const int32_t *sharded_largest, const int32_t *sharded_active, int64_t threads) {
  const Layers layers{each, groups, row_root, column_root, active, key, sharded_largest, sharded_active};
  each_chunk(chunks, count, threads,
             [&](int64_t index) { update(shards[chunks[index].shard], chunks[index], layers); });
}
