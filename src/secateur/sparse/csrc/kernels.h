// The kernels, written once for every level of instructions.
//
// A level is a structure `Arch` with a vector `F` of 16 floats and a few operations on it; portable.cpp, avx2.cpp and
// avx512.cpp define theirs and instantiate `Table<Arch>`. Everything lives in an unnamed namespace: each file compiles
// its own copy with its own instruction set, and the linker can never mix them.
//
// In the bitmask format the lanes of a vector are 16 rows of the matrix, so one input is broadcast to all of them and
// nothing is summed across lanes at the end. Dense and tile rows run along the inputs and are summed once a row.
#include <cstring>

#include "matrix.h"

namespace secateur {
namespace {

template <class T>
inline T load(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline float from_bits(u32 bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline u16 to_bf16(float value) {  // rounds to nearest even; a NaN stays one
  u32 bits;
  memcpy(&bits, &value, sizeof bits);
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return u16((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : rounded);
}

inline float from_fp16(u16 half) {
  const u32 sign = u32(half & 0x8000) << 16, body = half & 0x7fff;
  if (body >= 0x7c00) return from_bits(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // Shifting puts exponent and fraction in place; the factor mends the bias and is exact for subnormals too.
  const float magnitude = from_bits(body << 13) * 0x1p112f;
  return sign ? -magnitude : magnitude;
}

template <i32 TYPE>
inline float value_at(const void* values, i64 i) {
  if (TYPE == FP32) return ((const float*)values)[i];
  if (TYPE == BF16) return from_bits(u32(((const u16*)values)[i]) << 16);
  if (TYPE == FP16) return from_fp16(((const u16*)values)[i]);
  return ((const int8_t*)values)[i];
}

inline i64 column_at(const Matrix& m, i64 i) {
  return m.col_bytes == 2 ? ((const int16_t*)m.col)[i] : ((const i32*)m.col)[i];
}

// memcpy that may be given nothing from nowhere: a matrix without values has no address for them.
inline void copy_bytes(void* to, const void* from, i64 n) {
  if (n) memcpy(to, from, size_t(n));
}

inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

template <int V>
struct Constant {
  static constexpr int value = V;
};

// Writes up to 16 finished rows of one token.
inline void emit(const Matrix& m, const Output& out, i64 token, i64 row, i64 count, const float* sums) {
  float y[BLOCK];
  for (i64 i = 0; i < count; i++) {
    y[i] = sums[i];
    if (m.scales) y[i] *= m.scales[row + i];
    if (out.bias) y[i] += out.bias[row + i];
  }
  const i64 at = token * out.rows + row;
  if (out.bf16) {
    for (i64 i = 0; i < count; i++) ((u16*)out.data)[at + i] = to_bf16(y[i]);
  } else {
    memcpy((float*)out.data + at, y, size_t(count) * sizeof(float));
  }
}

// ------------------------------------------------------------------------------------------------- bitmask

// One block of 16 rows for N tokens: sums[n] are its 16 results. `careful` where reading a whole vector could leave
// the values.
template <class Arch, i32 TYPE, int N>
inline void bitmask_block(const Matrix& m, const float* x, i64 block, typename Arch::F* sums) {
  using F = typename Arch::F;
  constexpr int BANKS = N == 1 ? 4 : N == 2 ? 2 : 1;  // independent chains hide the latency of the multiply-add
  constexpr i64 SIZE = size_of(TYPE);
  const i64 words = (m.columns + 3) / 4;
  const u64* mask = m.mask + block * words;
  const u8* values = (const u8*)m.values + m.starts[block] * SIZE;
  const u8* const end = (const u8*)m.values + m.count * SIZE;
  F acc[BANKS][N];
  for (auto& bank : acc)
    for (F& a : bank) a = Arch::zero();
  for (i64 w = 0; w < words; w++, x += 4 * N) {
    const u64 bits = load<u64>(mask + w);
    const i64 step = __builtin_popcountll(bits) * SIZE;
    F column[4];
    if (Arch::OVERREADS && end - values < 64 * SIZE + 32) {
      u8 copy[64 * SIZE + 32];
      copy_bytes(copy, values, step);
      Arch::template columns<TYPE>(bits, copy, column);
    } else {
      for (i64 ahead = 0; ahead < 32 * SIZE; ahead += 64) Arch::prefetch(values + AHEAD + ahead);  // half full words
      if (w % 8 == 0) Arch::prefetch((const u8*)(mask + w) + AHEAD / 8);
      Arch::template columns<TYPE>(bits, values, column);
    }
    values += step;
    for (int c = 0; c < 4; c++)
      for (int n = 0; n < N; n++)
        acc[c % BANKS][n] = Arch::fma(column[c], Arch::broadcast(x[c * N + n]), acc[c % BANKS][n]);
  }
  for (int n = 0; n < N; n++) {
    sums[n] = acc[0][n];
    for (int b = 1; b < BANKS; b++) sums[n] = Arch::add(sums[n], acc[b][n]);
  }
}

template <class Arch, i32 TYPE, int N>
void bitmask_blocks(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  for (i64 block = begin; block < end; block++) {
    typename Arch::F sums[N];
    bitmask_block<Arch, TYPE, N>(m, (const float*)in.data, block, sums);
    for (int n = 0; n < in.tokens; n++) {
      float y[BLOCK];
      Arch::store(y, sums[n]);
      emit(m, out, n, block * BLOCK, least(BLOCK, m.rows - block * BLOCK), y);
    }
  }
}

// ------------------------------------------------------------------------------------------------- csr

template <class Arch, i32 TYPE>
void csr_rows(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  using F = typename Arch::F;
  const float* x = (const float*)in.data;
  for (i64 row = begin; row < end; row++) {
    const i64 first = m.crow[row], last = m.crow[row + 1];
    if (in.form == ROWS) {
      F even = Arch::zero(), odd = Arch::zero();
      const auto term = [&](i64 i, F sum) {
        const F inputs = m.col_bytes == 2 ? Arch::gather(x, (const int16_t*)m.col + i)
                                          : Arch::gather(x, (const i32*)m.col + i);
        return Arch::fma(Arch::template values<TYPE>((const u8*)m.values + i * size_of(TYPE)), inputs, sum);
      };
      i64 i = first;
      for (; i + 2 * BLOCK <= last; i += 2 * BLOCK) {
        Arch::prefetch((const u8*)m.values + i * size_of(TYPE) + AHEAD);
        Arch::prefetch((const u8*)m.col + i * m.col_bytes + AHEAD);
        even = term(i, even), odd = term(i + BLOCK, odd);
      }
      if (i + BLOCK <= last) even = term(i, even), i += BLOCK;
      float y = Arch::sum(Arch::add(even, odd));
      for (; i < last; i++) y += value_at<TYPE>(m.values, i) * x[column_at(m, i)];
      emit(m, out, 0, row, 1, &y);
    } else {  // the lanes are tokens
      F acc[4] = {Arch::zero(), Arch::zero(), Arch::zero(), Arch::zero()};
      const auto term = [&](i64 i, F sum) {
        return Arch::fma(Arch::broadcast(value_at<TYPE>(m.values, i)), Arch::loadf(x + column_at(m, i) * BLOCK), sum);
      };
      i64 i = first;
      for (; i + 4 <= last; i += 4)
        for (int bank = 0; bank < 4; bank++) acc[bank] = term(i + bank, acc[bank]);
      for (; i < last; i++) acc[0] = term(i, acc[0]);
      float y[BLOCK];
      Arch::store(y, Arch::add(Arch::add(acc[0], acc[1]), Arch::add(acc[2], acc[3])));
      for (i64 n = 0; n < in.tokens; n++) emit(m, out, n, row, 1, y + n);
    }
  }
}

// ------------------------------------------------------------------------------------------------- dense, tile

// One row of `width` values times N inputs, `stride` floats apart with zeros beyond their end. A row at a time keeps
// the values one stream, which memory serves fastest.
template <class Arch, i32 TYPE, int N>
inline void dense_row(const u8* values, i64 width, const float* x, i64 stride, float* sums) {
  using F = typename Arch::F;
  constexpr i64 SIZE = size_of(TYPE);
  constexpr int BANKS = N == 1 ? 4 : N == 2 ? 2 : 1;
  F acc[BANKS][N];
  for (auto& bank : acc)
    for (F& a : bank) a = Arch::zero();
  i64 k = 0;
  for (; k + BANKS * BLOCK <= width; k += BANKS * BLOCK) {
    for (i64 ahead = 0; ahead < BANKS * BLOCK * SIZE; ahead += 64) Arch::prefetch(values + k * SIZE + AHEAD + ahead);
    for (int b = 0; b < BANKS; b++) {
      const F w = Arch::template values<TYPE>(values + (k + b * BLOCK) * SIZE);
      for (int n = 0; n < N; n++) acc[b][n] = Arch::fma(w, Arch::loadf(x + n * stride + k + b * BLOCK), acc[b][n]);
    }
  }
  for (; k < width; k += BLOCK) {
    alignas(64) u8 copy[BLOCK * SIZE] = {};
    memcpy(copy, values + k * SIZE, size_t(least(BLOCK, width - k) * SIZE));
    const F w = Arch::template values<TYPE>(copy);
    for (int n = 0; n < N; n++) acc[0][n] = Arch::fma(w, Arch::loadf(x + n * stride + k), acc[0][n]);
  }
  for (int n = 0; n < N; n++) {
    for (int b = 1; b < BANKS; b++) acc[0][n] = Arch::add(acc[0][n], acc[b][n]);
    sums[n] = Arch::sum(acc[0][n]);
  }
}

// Rows [row, row + count) by row_of(row, sums of all tokens), written out 16 at a time.
template <int N, class F>
inline void strip(const Matrix& m, const Input& in, const Output& out, i64 row, i64 count, F&& row_of) {
  for (i64 r = 0; r < count; r += BLOCK) {
    const i64 some = least(BLOCK, count - r);
    float y[N][BLOCK];
    for (i64 i = 0; i < some; i++) {
      float sums[N];
      row_of(r + i, sums);
      for (int n = 0; n < N; n++) y[n][i] = sums[n];
    }
    for (int n = 0; n < in.tokens; n++) emit(m, out, n, row + r, some, y[n]);
  }
}

template <class Arch, i32 TYPE, int N>
void dense_strip(const Matrix& m, const Input& in, const Output& out, const u8* values, i64 row, i64 count, i64 width,
                 const float* x) {
  strip<N>(m, in, out, row, count, [&](i64 r, float* sums) {
    dense_row<Arch, TYPE, N>(values + r * width * size_of(TYPE), width, x, in.stride, sums);
  });
}

template <class Arch, i32 TYPE, int N>
void dense_all(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  const u8* values = (const u8*)m.values + begin * m.columns * size_of(TYPE);
  dense_strip<Arch, TYPE, N>(m, in, out, values, begin, end - begin, m.columns, (const float*)in.data);
}

// Copies the inputs of the kept tiles of one row of tiles side by side and returns how many there are.
template <class T>
i64 gather_tiles(const Matrix& m, i64 line, const T* x, T* compact) {
  i64 width = 0;
  for (i64 i = m.crow[line]; i < m.crow[line + 1]; i++) {
    const i64 from = column_at(m, i) * m.tile_columns, count = least(m.tile_columns, m.columns - from);
    memcpy(compact + width, x + from, size_t(count) * sizeof(T));
    width += count;
  }
  memset(compact + width, 0, size_t(SPARE) * sizeof(T));
  return width;
}

// A row of tiles is a dense strip over the inputs of its kept tiles.
template <class Arch, i32 TYPE, int N>
void tile_lines(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end, void* scratch) {
  float* compact = (float*)scratch;
  for (i64 line = begin; line < end; line++) {
    i64 width = 0;
    for (int n = 0; n < N; n++)
      width = gather_tiles(m, line, (const float*)in.data + n * in.stride, compact + n * in.stride);
    const i64 row = line * m.tile_rows, count = least(m.tile_rows, m.rows - row);
    const u8* values = (const u8*)m.values + m.starts[line] * size_of(TYPE);
    dense_strip<Arch, TYPE, N>(m, in, out, values, row, count, width, compact);
  }
}

// ------------------------------------------------------------------------------------------------- columns

// C columns at once, so that y is read and written once for C of them.
template <class Arch, i32 TYPE, int C>
inline void add_columns(const Matrix& m, const i32* active, const float* inputs, float* y) {
  using F = typename Arch::F;
  constexpr i64 SIZE = size_of(TYPE);
  const i64 words = (m.rows + 63) / 64;
  const u8* const end = (const u8*)m.values + m.count * SIZE;
  const u8* values[C];
  const u64* mask[C];
  F x[C];
  for (int c = 0; c < C; c++) {
    values[c] = (const u8*)m.values + m.starts[active[c]] * SIZE;
    mask[c] = m.mask + active[c] * words;
    x[c] = Arch::broadcast(inputs[c]);
  }
  for (i64 w = 0; w < words; w++, y += 64) {
    F acc[4];
    for (int q = 0; q < 4; q++) acc[q] = Arch::loadf(y + q * BLOCK);
    for (int c = 0; c < C; c++) {
      u64 bits = load<u64>(mask[c] + w);
      u8 copy[64 * SIZE + 32];
      const u8* from = values[c];
      if (Arch::OVERREADS && end - from < 64 * SIZE + 32) {
        copy_bytes(copy, from, __builtin_popcountll(bits) * SIZE);
        from = copy;
      }
      Arch::prefetch(values[c] + 512);
      values[c] += __builtin_popcountll(bits) * SIZE;
      for (int q = 0; q < 4; q++, bits >>= BLOCK) {
        acc[q] = Arch::fma(Arch::template expand<TYPE>(u16(bits), from), x[c], acc[q]);
        from += __builtin_popcount(u16(bits)) * SIZE;
      }
    }
    for (int q = 0; q < 4; q++) Arch::store(y + q * BLOCK, acc[q]);
  }
}

template <class Arch, i32 TYPE>
void columns_all(const Matrix& m, const i32* active, const float* inputs, i64 count, float* y) {
  i64 i = 0;
  for (; i + 4 <= count; i += 4) add_columns<Arch, TYPE, 4>(m, active + i, inputs + i, y);
  for (; i < count; i++) add_columns<Arch, TYPE, 1>(m, active + i, inputs + i, y);
}

// ------------------------------------------------------------------------------------------------- unpack

template <class Arch, i32 TYPE, class T>
void unpack_blocks(const Matrix& m, T* panel, i64 begin, i64 end) {
  constexpr i64 SIZE = size_of(TYPE);
  const i64 words = (m.columns + 3) / 4;
  const u8* const last = (const u8*)m.values + m.count * SIZE;
  for (i64 block = begin; block < end; block++) {
    const u8* values = (const u8*)m.values + m.starts[block] * SIZE;
    const i64 rows = least(BLOCK, m.rows - block * BLOCK);
    T* const top = panel + (block - begin) * BLOCK * m.columns;
    for (i64 w = 0; w < words; w += 4) {
      alignas(64) float square[16][BLOCK] = {};  // [column][row]
      for (i64 i = w; i < least(words, w + 4); i++) {
        const u64 bits = load<u64>(m.mask + block * words + i);
        const i64 step = __builtin_popcountll(bits) * SIZE;
        typename Arch::F column[4];
        u8 copy[64 * SIZE + 32];
        const u8* from = values;
        if (Arch::OVERREADS && last - values < 64 * SIZE + 32) {
          copy_bytes(copy, values, step);
          from = copy;
        }
        Arch::template columns<TYPE>(bits, from, column);
        for (int c = 0; c < 4; c++) Arch::store(square[(i - w) * 4 + c], column[c]);
        values += step;
      }
      const i64 width = least(16, m.columns - 4 * w);
      if (rows == BLOCK && width == 16) {
        Arch::transpose(square, top + 4 * w, m.columns);
      } else {
        for (i64 r = 0; r < rows; r++)
          for (i64 c = 0; c < width; c++) {
            if (sizeof(T) == 2) top[r * m.columns + 4 * w + c] = T(to_bf16(square[c][r]));
            else top[r * m.columns + 4 * w + c] = T(square[c][r]);
          }
      }
    }
  }
}

// Any kind but bitmask, line by line: rows, rows of tiles, or all rows at once for columns.
template <i32 TYPE, class T>
void unpack_lines(const Matrix& m, T* panel, i64 begin, i64 end) {
  const auto as = [](float value) { return sizeof(T) == 2 ? T(to_bf16(value)) : T(value); };
  if (m.kind == COLUMNS) {
    const i64 words = (m.rows + 63) / 64;
    memset(panel, 0, size_t(m.rows * m.columns) * sizeof(T));
    for (i64 c = 0; c < m.columns; c++) {
      i64 i = m.starts[c];
      for (i64 w = 0; w < words; w++)
        for (u64 bits = load<u64>(m.mask + c * words + w); bits; bits &= bits - 1)
          panel[(w * 64 + __builtin_ctzll(bits)) * m.columns + c] = as(value_at<TYPE>(m.values, i++));
    }
    return;
  }
  if (m.kind == DENSE) {
    for (i64 i = begin * m.columns; i < end * m.columns; i++)
      panel[i - begin * m.columns] = as(value_at<TYPE>(m.values, i));
    return;
  }
  const i64 top = begin * m.tile_rows, bottom = least(end * m.tile_rows, m.rows);
  memset(panel, 0, size_t((bottom - top) * m.columns) * sizeof(T));
  for (i64 line = begin; line < end; line++) {
    i64 i = m.starts[line];
    for (i64 row = line * m.tile_rows; row < least((line + 1) * m.tile_rows, m.rows); row++) {
      T* const to = panel + (row - top) * m.columns;
      for (i64 t = m.crow[line]; t < m.crow[line + 1]; t++) {
        const i64 from = column_at(m, t) * m.tile_columns, count = least(m.tile_columns, m.columns - from);
        for (i64 c = 0; c < count; c++) to[from + c] = as(value_at<TYPE>(m.values, i++));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- the table

// Calls f with the type, or with the least width that holds the tokens, as a constant.
template <class F>
inline void by_type(i32 type, F&& f) {
  switch (type) {
    case FP32: f(Constant<FP32>{}); break;
    case BF16: f(Constant<BF16>{}); break;
    case FP16: f(Constant<FP16>{}); break;
    default: f(Constant<INT8>{});
  }
}

template <class F>
inline void by_tokens(i64 tokens, F&& f) {
  if (tokens == 1) f(Constant<1>{});
  else if (tokens == 2) f(Constant<2>{});
  else if (tokens <= 4) f(Constant<4>{});
  else f(Constant<8>{});
}

template <class Arch>
struct Table {
  static void bitmask(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
    by_type(m.type, [&](auto type) {
      by_tokens(in.tokens, [&](auto tokens) {
        bitmask_blocks<Arch, decltype(type)::value, decltype(tokens)::value>(m, in, out, begin, end);
      });
    });
  }
  static void csr(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
    by_type(m.type, [&](auto type) { csr_rows<Arch, decltype(type)::value>(m, in, out, begin, end); });
  }
  static void tile(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end, void* scratch) {
    by_type(m.type, [&](auto type) {
      by_tokens(in.tokens, [&](auto tokens) {
        tile_lines<Arch, decltype(type)::value, decltype(tokens)::value>(m, in, out, begin, end, scratch);
      });
    });
  }
  static void dense(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
    by_type(m.type, [&](auto type) {
      by_tokens(in.tokens, [&](auto tokens) {
        dense_all<Arch, decltype(type)::value, decltype(tokens)::value>(m, in, out, begin, end);
      });
    });
  }
  static void columns(const Matrix& m, const i32* active, const float* inputs, i64 count, float* y) {
    by_type(m.type, [&](auto type) { columns_all<Arch, decltype(type)::value>(m, active, inputs, count, y); });
  }
  static void unpack(const Matrix& m, void* panel, bool bf16, i64 begin, i64 end) {
    by_type(m.type, [&](auto type) {
      constexpr i32 TYPE = decltype(type)::value;
      if (m.kind == BITMASK && bf16) unpack_blocks<Arch, TYPE>(m, (u16*)panel, begin, end);
      else if (m.kind == BITMASK) unpack_blocks<Arch, TYPE>(m, (float*)panel, begin, end);
      else if (bf16) unpack_lines<TYPE>(m, (u16*)panel, begin, end);
      else unpack_lines<TYPE>(m, (float*)panel, begin, end);
    });
  }
  static constexpr Kernels value{bitmask, csr, tile, dense, columns, unpack, false, false};
};

}  // namespace
}  // namespace secateur
