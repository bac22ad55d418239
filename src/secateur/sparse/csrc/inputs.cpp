// Laying inputs out for the kernels, and choosing the kernel.
#include "inputs.h"

#include <cmath>
#include <cstring>

namespace secateur {
namespace {

// The two planes of a token's inputs: x = coarse a + fine b up to half a fine step, a and b whole and within 127.
struct Planes {
  float coarse, fine;

  static Planes of(const Activations& x, i64 token) {
    float most = 0;
    for (i64 c = 0; c < x.columns; c++) {
      const float size = std::fabs(x.at(token, c));
      if (!(size <= 3.4e38f)) return {NAN, NAN};  // inf or nan: so are the outputs
      most = size > most ? size : most;
    }
    const float coarse = most / 127;
    return {coarse, coarse / 254};
  }
  // Adding and taking away 1.5 x 2^23 rounds to the nearest whole number, ties to even, in any vector unit.
  static float nearest(float value) {
    const float whole = (value + 12582912.f) - 12582912.f;
    return whole > 127 ? 127.f : whole < -127 ? -127.f : whole;
  }
  // Splits n inputs; each byte is 128 above its value.
  void split(const float* x, i64 n, u8* a, u8* b) const {
    memset(a, 128, size_t(n)), memset(b, 128, size_t(n));
    if (!(fine > 1e-30f)) return;  // nothing but zeros, nothing finite, or too small to divide by
    const float by_coarse = 1 / coarse, by_fine = 1 / fine;
    for (i64 i = 0; i < n; i++) {
      const float whole = nearest(x[i] * by_coarse);
      a[i] = u8(i32(whole) + 128);
      b[i] = u8(i32(nearest((x[i] - whole * coarse) * by_fine)) + 128);
    }
  }
};

}  // namespace

const Kernels* kernels_of(i32 level) {
#if defined(__x86_64__)
  if (level == AVX512) {
    static const bool pairs = __builtin_cpu_supports("avx512bf16");
    return avx512_kernels(pairs);
  }
  if (level == AVX2) return avx2_kernels();
#endif
  return portable_kernels();
}

i64 lines_of(const Matrix& m) {
  return m.kind == BITMASK ? (m.rows + BLOCK - 1) / BLOCK
         : m.kind == TILE  ? (m.rows + m.tile_rows - 1) / m.tile_rows
                           : m.rows;
}

Form form_of(const Matrix& m, const Kernels& k, bool bf16, i64 tokens) {
  const bool planes = k.planes && m.type == INT8 && m.sums, pairs = k.pairs && m.type == BF16 && bf16;
  switch (m.kind) {
    case BITMASK: return planes ? QUADS : pairs ? PAIRS : FLOATS;
    case DENSE: return planes ? PLANES : pairs ? BF16S : ROWS;
    case CSR: return tokens == 1 ? ROWS : LANES;
    default: return ROWS;
  }
}

size_t bytes_of(Form form, i64 columns, i64 tokens) {
  const i64 padded = rounded(columns, 64) + SPARE;
  return size_t(padded) * size_t(form == LANES ? BLOCK : tokens) * (form == QUADS || form == PLANES ? 2 : 4);
}

void lay(const Activations& x, i64 first, i64 tokens, Form form, Input& in, void* memory) {
  const i64 width = form == LANES ? BLOCK : width_of(tokens), columns = x.columns;
  in.data = memory, in.form = form, in.tokens = tokens, in.stride = rounded(columns, 64) + SPARE;
  // An offset of 128 stands for zero in bytes, but weights are zero wherever no input is.
  memset(memory, 0, bytes_of(form, columns, width));
  for (i64 n = 0; n < tokens; n++) {
    const i64 token = first + n;
    if (form == QUADS || form == PLANES) {
      const Planes planes = Planes::of(x, token);
      in.coarse[n] = planes.coarse, in.fine[n] = planes.fine;
      u8* const bytes = (u8*)memory;
      for (i64 c = 0; c < columns; c += 64) {
        const i64 some = columns - c < 64 ? columns - c : 64;
        float inputs[64];
        u8 a[64] = {}, b[64] = {};
        for (i64 i = 0; i < some; i++) inputs[i] = x.at(token, c + i);
        planes.split(inputs, some, a, b);
        if (form == PLANES) {
          memcpy(bytes + 2 * n * in.stride + c, a, size_t(some)), memcpy(bytes + (2 * n + 1) * in.stride + c, b, size_t(some));
          continue;
        }
        for (i64 q = 0; q < (some + 3) / 4; q++) {
          u8* const quad = bytes + ((c / 4 + q) * 2 * width + 2 * n) * 4;
          memcpy(quad, a + 4 * q, 4), memcpy(quad + 4, b + 4 * q, 4);
        }
      }
    } else if (form == PAIRS || form == BF16S) {
      const u16* from = (const u16*)x.data + token * x.stride;
      u16* const to = (u16*)memory;
      if (form == BF16S || width == 1) memcpy(to + n * in.stride, from, size_t(columns) * 2);
      else
        for (i64 c = 0; c < columns; c++) to[(c / 2 * width + n) * 2 + c % 2] = from[c];
    } else {
      float* const to = (float*)memory;
      if (form == ROWS || width == 1) {
        if (!x.bf16) memcpy(to + n * in.stride, (const float*)x.data + token * x.stride, size_t(columns) * 4);
        else
          for (i64 c = 0; c < columns; c++) to[n * in.stride + c] = x.at(token, c);
      } else {
        for (i64 c = 0; c < columns; c++) to[c * width + n] = x.at(token, c);
      }
    }
  }
}

void multiply(const Kernels& k, const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end, void* compact) {
  switch (m.kind) {
    case BITMASK: return k.bitmask(m, in, out, begin, end);
    case CSR: return k.csr(m, in, out, begin, end);
    case DENSE: return k.dense(m, in, out, begin, end);
    default: return k.tile(m, in, out, begin, end, compact);
  }
}

}  // namespace secateur
