// The loops are plain: the compiler makes one version per instruction set of those it can choose between at run time.
#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EACH_LEVEL __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define EACH_LEVEL
#endif

namespace secateur {
namespace {

// exp(x) for x <= 0 and moderate positive x, relative error below 2e-7: 2^n times a polynomial in the remainder
// (coefficients of the Taylor series of 2^f on [-0.5, 0.5]). A loop over it becomes vector code.
inline float fast_exp(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to a whole number
  const float f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // x - n ln 2, in two exact steps
  float p = 1.0f / 5040.0f;
  p = p * f + 1.0f / 720.0f;
  p = p * f + 1.0f / 120.0f;
  p = p * f + 1.0f / 24.0f;
  p = p * f + 1.0f / 6.0f;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

EACH_LEVEL void silu_row(const float* both, float* y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) y[i] = both[i] / (1.0f + fast_exp(-both[i])) * both[n + i];
}

// tanh(t) = 1 - 2 / (exp(2 t) + 1), with t = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh(t)) / 2 = x - x / (exp(2 t) + 1).
EACH_LEVEL void gelu_tanh_row(const float* both, float* y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) {
    const float x = both[i], twice = 1.5957691216f * (x + 0.044715f * x * x * x);
    y[i] = (x - x / (fast_exp(twice) + 1.0f)) * both[n + i];
  }
}

EACH_LEVEL void relu_row(const float* both, float* y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) y[i] = (both[i] > 0.0f ? both[i] : 0.0f) * both[n + i];
}

void gelu_row(const float* both, float* y, i64 n) {
  for (i64 i = 0; i < n; i++) y[i] = 0.5f * both[i] * (1.0f + std::erf(both[i] * 0.70710678f)) * both[n + i];
}

// Scores of four keys at once: four independent sums hide the latency of adding.
EACH_LEVEL void four_scores(const float* query, const float* keys, float* scores, i64 size, float scale) {
  const float *k1 = keys + size, *k2 = keys + 2 * size, *k3 = keys + 3 * size;
  float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
#pragma omp simd reduction(+ : a, b, c, d)
  for (i64 i = 0; i < size; i++) {
    a += query[i] * keys[i], b += query[i] * k1[i];
    c += query[i] * k2[i], d += query[i] * k3[i];
  }
  scores[0] = a * scale, scores[1] = b * scale, scores[2] = c * scale, scores[3] = d * scale;
}

EACH_LEVEL float one_score(const float* query, const float* key, i64 size) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < size; i++) sum += query[i] * key[i];
  return sum;
}

// Scores to exp(score - top); their sum.
EACH_LEVEL float exponentials(float* scores, i64 n, float top) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (i64 t = 0; t < n; t++) {
    scores[t] = fast_exp(scores[t] - top);
    sum += scores[t];
  }
  return sum;
}

// out += the values [n, size], each times its share.
EACH_LEVEL void add_values(float* out, const float* values, const float* shares, i64 n, i64 size) {
  i64 t = 0;
  for (; t + 4 <= n; t += 4) {  // out is read and written once for four of them
    const float *v = values + t * size, *v1 = v + size, *v2 = v + 2 * size, *v3 = v + 3 * size;
    const float a = shares[t], b = shares[t + 1], c = shares[t + 2], d = shares[t + 3];
#pragma omp simd
    for (i64 i = 0; i < size; i++) out[i] += (a * v[i] + b * v1[i]) + (c * v2[i] + d * v3[i]);
  }
  for (; t < n; t++) {
#pragma omp simd
    for (i64 i = 0; i < size; i++) out[i] += shares[t] * values[t * size + i];
  }
}

EACH_LEVEL void scale_row(float* x, float by, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) x[i] *= by;
}

}  // namespace

EACH_LEVEL void norm_row(const float* x, const float* weight, float* y, i64 n, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (i64 i = 0; i < n; i++) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
#pragma omp simd
  for (i64 i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

EACH_LEVEL void add_row(float* x, const float* y, i64 n) {
#pragma omp simd
  for (i64 i = 0; i < n; i++) x[i] += y[i];
}

EACH_LEVEL void turn(float* head, const float* cosine, const float* sine, i64 size) {
  const i64 half = size / 2;
#pragma omp simd
  for (i64 i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

void gate_row(Act act, const float* both, float* y, i64 n) {
  switch (act) {
    case SILU: return silu_row(both, y, n);
    case GELU: return gelu_row(both, y, n);
    case GELU_TANH: return gelu_tanh_row(both, y, n);
    default: return relu_row(both, y, n);
  }
}

void attend_head(const float* query, const Past& past, float* out, float* scores, float scale) {
  const i64 before = past.before, size = past.size;
  i64 t = 0;
  for (; t + 4 <= before; t += 4) four_scores(query, past.keys + t * size, scores + t, size, scale);
  for (; t < before; t++) scores[t] = one_score(query, past.keys + t * size, size) * scale;
  scores[before] = one_score(query, past.new_key, size) * scale;
  const float sum = exponentials(scores, before + 1, *std::max_element(scores, scores + before + 1));
  memset(out, 0, sizeof(float) * size_t(size));
  add_values(out, past.values, scores, before, size);
  add_values(out, past.new_value, scores + before, 1, size);
  scale_row(out, 1.0f / sum, size);
}

}  // namespace secateur
