// Inputs as the kernels read them: which form a product takes, how many bytes that is, and the laying out.
#pragma once
#include <cstring>

#include "matrix.h"

namespace secateur {

// Inputs of tokens as the caller has them, fp32 or bf16.
struct Activations {
  const void* data;
  bool bf16;
  i64 columns, stride;  // stride: elements from one token to the next

  float at(i64 token, i64 column) const {
    const i64 i = token * stride + column;
    if (!bf16) return ((const float*)data)[i];
    const u32 bits = u32(((const u16*)data)[i]) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

inline i64 rounded(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Tokens that a kernel computes for so many.
inline i64 width_of(i64 tokens) { return tokens <= 2 ? tokens : tokens <= 4 ? 4 : GROUP; }

// The kernels of a level that `has` said is there.
const Kernels* kernels_of(i32 level);

// What threads share out: row blocks, rows of tiles, rows.
i64 lines_of(const Matrix& m);

Form form_of(const Matrix& m, const Kernels& k, bool bf16, i64 tokens);

size_t bytes_of(Form form, i64 columns, i64 tokens);

// Lays `tokens` tokens from `first` on out in the form, zeros up to `width` tokens and past the last column.
void lay(const Activations& x, i64 first, i64 tokens, Form form, Input& in, void* memory);

// Lines [begin, end) of a product of any kind but columns; `compact`: for tiles, as many bytes as ROWS takes.
void multiply(const Kernels& k, const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end, void* compact);

}  // namespace secateur
