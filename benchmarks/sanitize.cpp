// Random products of every kind, type, level and thread count, on buffers of exactly the size they must have, so that
// AddressSanitizer sees a single byte too many; sums are compared with double precision. Built by sanitize.sh.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../src/secateur/sparse/csrc/matrix.h"

using namespace secateur;

extern "C" {
i32 secateur_has(i32 level);
i64 secateur_product(const Matrix*, const void*, i32, i64, void*, const float*, i32, i32);
void secateur_unpack(const Matrix*, void*, i32, i64, i64, i32, i32);
void secateur_pack(const void*, i64, i64, i64, void*, void*, void*, i32);
void secateur_decode(const void*, const void*, const void*, i64, i64, i64, void*, i32);
}

namespace {

std::mt19937_64 draw(1);
i64 below(i64 n) { return i64(draw() % u64(n)); }

// A copy that ends where its memory ends.
template <class T>
T* exact(const std::vector<T>& v) {
  T* p = (T*)malloc(v.size() * sizeof(T) + (v.empty() ? 1 : 0));
  if (!v.empty()) memcpy(p, v.data(), v.size() * sizeof(T));
  return p;
}

double as_double(i32 type, const u8* p) {
  if (type == INT8) return double((int8_t)*p);
  if (type == FP32) {
    float f;
    memcpy(&f, p, 4);
    return double(f);
  }
  u16 h;
  memcpy(&h, p, 2);
  if (type == FP16) {
    const double sign = h & 0x8000 ? -1 : 1, fraction = h & 0x3ff;
    const int exponent = h >> 10 & 31;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
  }
  const u32 bits = u32(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return double(f);
}

// A value that is finite and not zero, as its type stores it.
void random_value(i32 type, u8* to) {
  u32 bits = u32(draw());
  if (type == FP32) bits = (bits & 0x807fffff) | 0x3f000000;
  if (type == BF16) bits = (bits & 0x807f) | 0x3f00;
  if (type == FP16) bits = (bits & 0x83ff) | (below(4) ? 0x3800 : 0) | 1;
  if (type == INT8) bits = bits & 0xff ? bits & 0xff : 1, bits = bits == 0x80 ? 0x81 : bits;
  memcpy(to, &bits, size_t(size_of(type)));
}

int once() {
  const i32 kind = i32(below(5)), type = i32(below(4));
  const i64 rows = 1 + below(70), columns = 1 + below(150), size = size_of(type), tokens = 1 + below(20);
  const i64 r = kind == TILE ? 1 + below(20) : 1, c = kind == TILE ? 1 + below(20) : 1;
  const i64 lines = (rows + r - 1) / r, across = (columns + c - 1) / c, density = below(101);
  std::vector<u8> dense(size_t(rows * columns * size), 0), tiles(size_t(lines * across));
  for (u8& t : tiles) t = below(100) < density;
  for (i64 i = 0; i < rows * columns; i++) {
    const bool kept = kind == TILE ? tiles[size_t(i / columns / r * across + i % columns / c)] : below(100) < density;
    if (kept) random_value(type, &dense[size_t(i * size)]);
  }
  const auto nonzero = [&](i64 i) {
    for (i64 b = 0; b < size; b++)
      if (dense[size_t(i * size + b)]) return true;
    return false;
  };
  std::vector<u8> values;
  std::vector<i64> starts{0}, crow{0};
  std::vector<u64> mask;
  std::vector<i32> col;
  const auto take = [&](i64 i) { values.insert(values.end(), &dense[size_t(i * size)], &dense[size_t(i * size)] + size); };
  if (kind == DENSE) values = dense;
  if (kind == CSR || kind == TILE)
    for (i64 line = 0; line < lines; line++) {
      const i64 first = i64(col.size());
      for (i64 t = 0; t < across; t++)
        if (kind == TILE ? bool(tiles[size_t(line * across + t)]) : nonzero(line * columns + t)) col.push_back(i32(t));
      for (i64 row = line * r; row < rows && row < (line + 1) * r; row++)
        for (size_t t = size_t(first); t < col.size(); t++)
          for (i64 x = col[t] * c; x < columns && x < (col[t] + 1) * c; x++) take(row * columns + x);
      crow.push_back(i64(col.size())), starts.push_back(i64(values.size()) / size);
    }
  if (kind == COLUMNS)
    for (i64 x = 0; x < columns; x++) {
      for (i64 word = 0; word < (rows + 63) / 64; word++) {
        mask.push_back(0);
        for (i64 row = word * 64; row < rows && row < word * 64 + 64; row++)
          if (nonzero(row * columns + x)) mask.back() |= u64(1) << (row % 64), take(row * columns + x);
      }
      starts.push_back(i64(values.size()) / size);
    }
  u8* matrix = exact(dense);
  if (kind == BITMASK) {
    const i64 blocks = (rows + 15) / 16;
    mask.resize(size_t(blocks * ((columns + 3) / 4))), starts.resize(size_t(blocks + 1));
    secateur_pack(matrix, size, rows, columns, mask.data(), starts.data(), nullptr, 2);
    values.resize(size_t(starts.back() * size));
    u8* packed = (u8*)malloc(values.size() + 1);
    secateur_pack(matrix, size, rows, columns, mask.data(), starts.data(), packed, 2);
    if (!values.empty()) memcpy(values.data(), packed, values.size());
    free(packed);
  }
  std::vector<float> scales(size_t(rows), 1.0f), bias(size_t(rows), 0.5f), x(size_t(tokens * columns));
  for (float& f : scales) f = 0.5f + float(below(100)) / 100;
  for (float& f : x) f = below(4) ? float(below(2001) - 1000) / 500 : 0;
  std::vector<i32> sums(size_t(rows), 0);
  if (type == INT8)
    for (i64 i = 0; i < rows * columns; i++) sums[size_t(i / columns)] += i32(as_double(type, &dense[size_t(i)]));
  std::vector<int16_t> narrow(col.begin(), col.end());
  const bool wide = below(2);
  const u8* v = exact(values);
  const u64* m = exact(mask);
  const i64 *s = exact(starts), *cr = exact(crow);
  const i32 *wide_col = exact(col), *row_sums = exact(sums);
  const int16_t* narrow_col = exact(narrow);
  const float *sc = exact(scales), *b = exact(bias), *in = exact(x);
  const Matrix packed{kind, type, rows, columns, r, c, i64(values.size()) / size, v, m, s, cr,
                      wide ? (const void*)wide_col : narrow_col, wide ? 4 : 2, type == INT8 ? sc : nullptr,
                      type == INT8 && below(4) ? row_sums : nullptr};
  int wrong = 0;
  for (i32 level = PORTABLE; level <= AVX512; level++) {
    if (!secateur_has(level)) continue;
    float* y = (float*)malloc(size_t(tokens * rows) * 4);
    if (secateur_product(&packed, in, 0, tokens, y, b, level, i32(1 + below(3))) < 0) wrong++;
    for (i64 t = 0; t < tokens; t++)
      for (i64 row = 0; row < rows; row++) {
        double sum = 0, scale = 0, most = 0;
        for (i64 k = 0; k < columns; k++) {
          const double w = as_double(type, &dense[size_t((row * columns + k) * size)]), a = double(x[size_t(t * columns + k)]);
          sum += w * a, scale += std::fabs(w), most = std::max(most, std::fabs(a));
        }
        const double by = type == INT8 ? double(scales[size_t(row)]) : 1.0;
        const double error = std::fabs(double(y[t * rows + row]) - (sum * by + 0.5));
        if (error > 1.6e-5 * scale * most * by + 1e-5) wrong++;
      }
    free(y);
    float* panel = (float*)malloc(size_t(rows * columns) * 4);
    u16* half = (u16*)malloc(size_t(rows * columns) * 2);
    const i64 all = kind == BITMASK ? (rows + 15) / 16 : lines;
    secateur_unpack(&packed, panel, 0, 0, all, level, 2), secateur_unpack(&packed, half, 1, 0, all, level, 1);
    for (i64 i = 0; i < rows * columns; i++)
      if (double(panel[i]) != as_double(type, &dense[size_t(i * size)])) wrong++;
    free(panel), free(half);
  }
  if (kind == BITMASK) {
    u8* back = (u8*)malloc(dense.size());
    secateur_decode(m, s, v, size, rows, columns, back, 2);
    if (memcmp(back, dense.data(), dense.size()) != 0) wrong++;
    free(back);
  }
  for (const void* p : {(const void*)matrix, (const void*)v, (const void*)m, (const void*)s, (const void*)cr, (const void*)wide_col,
                        (const void*)row_sums, (const void*)narrow_col, (const void*)sc, (const void*)b, (const void*)in})
    free((void*)p);
  if (wrong) printf("kind %d type %d [%ld, %ld] tokens %ld: %d wrong\n", kind, type, long(rows), long(columns), long(tokens), wrong);
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? atoi(argv[1]) : 2000;
  int wrong = 0;
  for (int i = 0; i < cases; i++) wrong += once();
  printf("%d cases, %d wrong\n", cases, wrong);
  return wrong != 0;
}
