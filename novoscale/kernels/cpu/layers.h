// The pass over the layers, between the two over the elements. reference/layers.py is the definition, and has
// the same functions; cpu/layers.py calls the three at the end.

#pragma once

#include <cmath>
#include <cstdint>

#include "rounding.h"

namespace {

// The columns of a table of options: as in kernels/layers.py.
struct GroupOptions {
  double lr, beta1, beta2, beta3, weight_decay, eps, clip_threshold, sign, norm_type;
  double bias_correction, init_zero, rms, nesterov, inside, relative, seed, limit;
};

// A row of a table of parameters: as in kernels/layers.py.
struct Parameter {
  int64_t group, first, count, first_column, width, numel, layers, number, once, rounds, scattered;
  float *v, *columns, *steps;
};

// Layers (or columns) from..to of a parameter.
struct Stretch {
  int64_t parameter, from, to, columns;
};

// A step: as in cpu/layers.py.
struct LayerStep {
  const Parameter *parameters;
  const Stretch *stretches;
  const GroupOptions *options;
  double *statistic;
  const double *share;        // null where nothing is added up
  const double *mean_square;  // of each parameter; null: no update is clipped
  const bool *finite;         // one for all parameters, or one for each
  float *each, *row_root, *column_root;
  bool *active;
  int32_t *key;
  int64_t parameter_count, stretch_count, layers, columns, verdicts, threads;
  double inverse, clip;  // what multiplies the gradients: of a loss scale, and of clipping

  const double *number(int64_t which) const {
    return statistic + layers + columns + which * parameter_count;
  }
  bool stepped(int64_t parameter) const { return finite[verdicts == 1 ? 0 : parameter]; }
};

enum Number { FRESH, KEPT, WEIGHTS };  // only where there is a share

constexpr double LEAST_SCALE = 1e-3;
constexpr int64_t FEW_LAYERS = 1 << 12;  // are done before other threads would have started

// What multiplies a statistic where the gradients are multiplied by a factor.
double power_of(double factor, const GroupOptions &o) { return o.norm_type == 2 ? factor * factor : factor; }

double fresh(float v, double S, const GroupOptions &o) {
  return v == 0 && o.init_zero == 0 ? S : (1 - o.beta2) * S;
}

float averaged(float v, double S, const GroupOptions &o) {
  return static_cast<float>(o.beta2 * static_cast<double>(v) + fresh(v, S, o));
}

// By squaring, in the order of `powers` in reference/layers.py.
double power(double base, double exponent) {
  double result = 1;
  for (int64_t rest = static_cast<int64_t>(exponent); rest > 0; rest >>= 1) {
    if (rest & 1) result *= base;
    base *= base;
  }
  return result;
}

// Call visit(index) for each of some parameters or stretches.
template <typename Visit>
void each_of(int64_t count, const LayerStep &s, const Visit &visit) {
  const bool several = s.layers + s.columns > FEW_LAYERS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(s.threads)) if (several)
  for (int64_t index = 0; index < count; index++) visit(index);
}

// What is constant in a stretch of layers.
struct Constants {
  double lr, beta1, factor, divisor, root_divisor, step_size, ahead;
};

// What the update of a parameter is multiplied by: for clipping, and for a step relative to its weights.
double update_scale(const LayerStep &s, const Parameter &p, int64_t index, const GroupOptions &o) {
  double scale = 1;
  if (s.mean_square && o.clip_threshold > 0) {
    const double above = std::sqrt(s.mean_square[index]) / o.clip_threshold;
    scale = 1 / (above < 1 ? 1 : above);
  }
  if (o.relative > 0) {
    const double elements = static_cast<double>(p.layers * p.numel);
    const double rms = std::sqrt(s.number(WEIGHTS)[index] / elements);
    scale = (rms < LEAST_SCALE ? LEAST_SCALE : rms) * scale;
  }
  return scale;
}

void correct(Constants &c, const GroupOptions &o, double steps) {
  const double t = steps < 1 ? 1 : steps, decayed = power(c.beta1, t);
  c.root_divisor = std::sqrt(1 - power(o.beta2, t));
  c.step_size = c.lr / (1 - decayed);
  c.ahead = c.lr * c.beta1 / (1 - decayed * c.beta1);
}

Constants constants(const LayerStep &s, const Parameter &p, int64_t index, const GroupOptions &o) {
  const double numel = static_cast<double>(p.numel);
  Constants c{o.lr, o.beta1, o.sign * (s.clip * s.inverse) * update_scale(s, p, index, o),
              o.rms > 0 ? numel : 1, 1, o.lr, o.lr * o.beta1};
  if (p.width) {
    const double of_step = s.number(FRESH)[index] * power_of(s.clip, o);
    c.divisor = (of_step / numel + s.number(KEPT)[index]) / static_cast<double>(p.layers);
  }
  if (o.bias_correction > 0 && p.once) correct(c, o, *p.steps);
  return c;
}

void coefficients_of(const LayerStep &s, const Stretch &stretch) {
  const Parameter &p = s.parameters[stretch.parameter];
  const GroupOptions &o = s.options[p.group];
  if (stretch.columns) {
    for (int64_t i = stretch.from; i < stretch.to; i++) {
      s.column_root[p.first_column + i] = static_cast<float>(std::sqrt(static_cast<double>(p.columns[i])));
    }
    return;
  }
  Constants c = constants(s, p, stretch.parameter, o);
  const uint32_t seed = scramble(static_cast<uint32_t>(static_cast<int64_t>(o.seed)));
  const uint32_t start = scramble(seed ^ static_cast<uint32_t>(p.number));
  for (int64_t i = stretch.from; i < stretch.to; i++) {
    const int64_t layer = p.first + i;
    const double v = static_cast<double>(p.v[i]) / c.divisor;
    const double steps = p.steps ? p.steps[p.once ? 0 : i] : 0;
    if (o.bias_correction > 0 && !p.once) correct(c, o, steps);
    const double root = (o.norm_type == 2 ? std::sqrt(v) : v) / c.root_divisor;
    const double inverse = p.width ? 1 : 1 / (root + o.eps);
    const double of_moment = o.inside > 0 ? 1 : inverse;
    float *each = s.each + 4 * layer;
    each[0] = static_cast<float>(o.inside > 0 ? c.factor * inverse : c.factor);
    each[1] = static_cast<float>(c.step_size * of_moment);
    each[2] = static_cast<float>(o.lr * o.weight_decay);
    each[3] = o.nesterov > 0 ? static_cast<float>(c.ahead * of_moment) : 0;
    if (s.row_root) s.row_root[layer] = static_cast<float>(root);
    const uint32_t step = static_cast<uint32_t>(static_cast<int64_t>(steps));
    s.key[layer] = p.rounds ? static_cast<int32_t>(scramble(start ^ step)) : 0;
  }
}

void average_of(const LayerStep &s, const Stretch &stretch) {
  const Parameter &p = s.parameters[stretch.parameter];
  const GroupOptions &o = s.options[p.group];
  const bool stepped = s.stepped(stretch.parameter);
  const double clip = power_of(s.clip, o);
  if (stretch.columns) {
    const double *sums = s.statistic + s.layers + p.first_column;
    for (int64_t i = stretch.from; i < stretch.to && stepped; i++) {
      p.columns[i] = averaged(p.columns[i], sums[i] * clip / static_cast<double>(p.layers), o);
    }
    return;
  }
  for (int64_t i = stretch.from; i < stretch.to; i++) {
    double S = s.statistic[p.first + i] * clip;
    if (p.width) S /= static_cast<double>(p.numel);
    if (stepped) p.v[i] = averaged(p.v[i], S, o);
    const bool active = stepped && p.v[i] > 0;
    s.active[p.first + i] = active;
    if (p.steps && !p.once) p.steps[i] += active;
  }
}

// The mean of squares of the normalised gradient of a parameter: this rank's part.
double mean_square_of(const LayerStep &s, int64_t index) {
  const Parameter &p = s.parameters[index];
  const GroupOptions &o = s.options[p.group];
  if (o.clip_threshold == 0) return 0;
  const double clip = power_of(s.clip, o);
  const double numel = p.width || o.rms == 0 ? static_cast<double>(p.numel) : 1;
  double sum = 0;
  for (int64_t i = 0; i < p.count; i++) {
    const int64_t layer = p.first + i;
    if (!s.active[layer]) continue;
    double square = s.statistic[layer] * clip / numel / static_cast<double>(p.v[i]);
    if (o.bias_correction > 0) square *= 1 - power(o.beta2, p.steps[p.once ? 0 : i]);
    sum += square * (p.scattered ? s.share[layer] : 1);
  }
  return sum / static_cast<double>(p.layers);
}

}  // namespace

// Divide the statistic by a loss scale, and add up what the ranks have to know.
extern "C" void novoscale_begin(const LayerStep *step) {
  const LayerStep &s = *step;
  double *numbers = s.statistic + s.layers + s.columns;
  each_of(s.parameter_count, s, [&](int64_t index) {
    const Parameter &p = s.parameters[index];
    const GroupOptions &o = s.options[p.group];
    const double factor = power_of(s.inverse, o);
    double sum = 0, kept = 0;
    for (int64_t i = 0; i < p.count; i++) {
      double &S = s.statistic[p.first + i];
      S *= factor;
      sum += fresh(p.v[i], S, o);
      if (s.share) kept += s.share[p.first + i] * static_cast<double>(p.v[i]);
    }
    for (int64_t i = 0; i < p.width; i++) s.statistic[s.layers + p.first_column + i] *= factor;
    if (!s.share) return;
    numbers[FRESH * s.parameter_count + index] = sum;
    numbers[KEPT * s.parameter_count + index] = o.beta2 * kept;
  });
}

// Average the statistic into the second moments, and count the steps; say which layers are active, and, if
// there is room for it, the mean of squares of each parameter's update.
extern "C" void novoscale_average(const LayerStep *step, double *mean_square) {
  const LayerStep &s = *step;
  for (int64_t index = 0; index < s.parameter_count; index++) {
    const Parameter &p = s.parameters[index];
    if (!p.once || !p.steps || !s.stepped(index)) continue;
    const double of_step = s.number(FRESH)[index] * power_of(s.clip, s.options[p.group]);
    *p.steps += of_step + s.number(KEPT)[index] > 0;
  }
  each_of(s.stretch_count, s, [&](int64_t index) { average_of(s, s.stretches[index]); });
  if (!mean_square) return;
  each_of(s.parameter_count, s, [&](int64_t index) { mean_square[index] = mean_square_of(s, index); });
}

// What the update needs to know of each layer and column.
extern "C" void novoscale_coefficients(const LayerStep *step) {
  each_of(step->stretch_count, *step, [&](int64_t index) { coefficients_of(*step, step->stretches[index]); });
}
