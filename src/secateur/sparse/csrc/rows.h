// Operations on single rows of floats: what lies between the products of a decoding step.
#pragma once
#include "matrix.h"

namespace secateur {

enum Act : i32 { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
void norm_row(const float* x, const float* weight, float* y, i64 n, float eps);

// x += y.
void add_row(float* x, const float* y, i64 n);

// Turns one head in place by its position's angles: pairs (i, i + size / 2).
void turn(float* head, const float* cosine, const float* sine, i64 size);

// y = act(both[0, n)) * both[n, 2 n).
void gate_row(Act act, const float* both, float* y, i64 n);

// The keys and values [before, size] of one group, and those of the new token, which lie elsewhere.
struct Past {
  const float *keys, *values, *new_key, *new_value;
  i64 before, size;
};

// One query's attention over them, scores multiplied by scale; scores is scratch of before + 1 floats.
void attend_head(const float* query, const Past& past, float* out, float* scores, float scale);

}  // namespace secateur
