// What lies between the products of one decoding step: RMS norm, attention over a static cache, gated activation.
//
// All buffers are fp32, contiguous and owned by the caller; nothing is allocated but one row of scores per thread.
// The loops are plain: the compiler makes one version per instruction set of those it can choose between at run time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define EACH_LEVEL __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define EACH_LEVEL
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kParallelFrom = 1 << 14;  // multiply-adds below which a second thread costs more than it brings

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

EACH_LEVEL void norm_row(const float* x, const float* weight, float* y, int64_t n, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(n) + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * weight[i];
}

// Turn one head in place by its position's angles: pairs (i, i + size/2).
EACH_LEVEL void turn(float* head, const float* cosine, const float* sine, int64_t size) {
  const int64_t half = size / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i + half] + a * sine[i + half];
  }
}

// One query over `seen` keys and values [seen, size]; scores is scratch of `seen` floats.
EACH_LEVEL void attend_head(const float* query, const float* keys, const float* values, float* out, float* scores,
              int64_t seen, int64_t size, float scale) {
  float top = -INFINITY;
  for (int64_t t = 0; t < seen; ++t) {
    const float* key = keys + t * size;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < size; ++i) dot += query[i] * key[i];
    scores[t] = dot * scale;
    top = std::max(top, scores[t]);
  }
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < seen; ++t) {
    scores[t] = fast_exp(scores[t] - top);
    sum += scores[t];
  }
  std::fill(out, out + size, 0.0f);
  for (int64_t t = 0; t < seen; ++t) {
    const float share = scores[t];
    const float* value = values + t * size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[i] += share * value[i];
  }
  const float scale_out = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] *= scale_out;
}

EACH_LEVEL void gate_row(const float* both, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = both[i] / (1.0f + fast_exp(-both[i])) * both[n + i];
}

}  // namespace

// y = x / sqrt(mean(x^2) + eps) * weight, for `rows` rows of n.
EXPORT void secateur_norm(const float* x, const float* weight, float* y, int64_t rows, int64_t n, float eps) {
  for (int64_t r = 0; r < rows; ++r) norm_row(x + r * n, weight, y + r * n, n, eps);
}

// y [rows, n] = silu(first half) * second half of both [rows, 2 n].
EXPORT void secateur_gate(const float* both, float* y, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) gate_row(both + 2 * r * n, y + r * n, n);
}

// The new token's attention in one layer. sizes = {batch, queries, groups, size, room, at}: heads of queries and of
// keys/values, entries of a head, positions the cache has room for, and the position of the new token.
//   qkv  [batch, queries + 2 groups, size], overwritten (heads are turned in place)
//   cosine, sine [size]: the angles of position `at`
//   query_norm, key_norm [size] or null: RMS norms of each head before it is turned
//   keys, values [batch, groups, room, size]: position `at` is written, positions up to it are read
//   out  [batch, queries * size]
EXPORT void secateur_attend(float* qkv, const float* cosine, const float* sine, const float* query_norm,
           const float* key_norm, float* keys, float* values, float* out, const int64_t* sizes, float scale,
           float eps, int threads) {
  const int64_t batch = sizes[0], queries = sizes[1], groups = sizes[2], size = sizes[3], room = sizes[4];
  const int64_t at = sizes[5], heads = queries + 2 * groups, seen = at + 1;
  for (int64_t b = 0; b < batch; ++b) {
    float* row = qkv + b * heads * size;
    for (int64_t h = 0; h < queries + groups; ++h) {
      float* head = row + h * size;
      const float* weight = h < queries ? query_norm : key_norm;
      if (weight != nullptr) norm_row(head, weight, head, size, eps);
      turn(head, cosine, sine, size);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t place = ((b * groups + g) * room + at) * size;
      std::memcpy(keys + place, row + (queries + g) * size, sizeof(float) * size);
      std::memcpy(values + place, row + (queries + groups + g) * size, sizeof(float) * size);
    }
  }
  const int64_t tasks = batch * queries, share = queries / groups;
  const bool parallel = threads > 1 && tasks * seen * size > kParallelFrom;
  (void)parallel;
#pragma omp parallel num_threads(threads) if (parallel)
  {
    std::vector<float> scores(static_cast<size_t>(seen));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t b = task / queries, h = task % queries;
      const int64_t cache = (b * groups + h / share) * room * size;
      attend_head(qkv + (b * heads + h) * size, keys + cache, values + cache, out + task * size, scores.data(),
            seen, size, scale);
    }
  }
}

