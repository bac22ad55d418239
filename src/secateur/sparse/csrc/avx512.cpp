// AVX-512 with VBMI2: a masked expanding load puts packed non-zeros into their lanes in one instruction. Products of
// bf16 pairs (AVX512_BF16) and of bytes (AVX512_VNNI) have kernels of their own; the rest is kernels.h.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "matrix.h"

// Functions from here on are compiled for these instructions, whatever the compiler's own target is. Library headers
// come before, so that nothing which the linker may share is compiled for them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,avx512bf16,avx2,fma,f16c,popcnt,bmi,bmi2")
#endif

#include "kernels.h"

namespace secateur {
namespace {

// Zen 4 and 5 make a zero-masked expansion wait for the old value of its destination (LLVM issue 206849). Merging into
// a fresh zero that the compiler cannot see through has no such wait and is twice as fast.
inline __m512i fresh() {
  __m512i zero;
  asm volatile("vpxor %x0,%x0,%x0" : "=x"(zero));
  return zero;
}

struct Avx512 {
  using F = __m512;
  static constexpr bool OVERREADS = false;  // masked loads touch what they take and nothing else

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  static float sum(F f) { return _mm512_reduce_add_ps(f); }
  static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

  static F widen_bf16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
  static F widen_int8(__m128i b) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)); }

  template <i32 TYPE>
  static F values(const u8* p) {
    if constexpr (TYPE == FP32) return _mm512_loadu_ps(p);
    else if constexpr (TYPE == BF16) return widen_bf16(_mm256_loadu_si256((const __m256i*)p));
    else if constexpr (TYPE == FP16) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    else return widen_int8(_mm_loadu_si128((const __m128i*)p));
  }
  template <i32 TYPE>
  static F expand(u16 bits, const u8* p) {
    const __m512i z = fresh();
    if constexpr (TYPE == FP32) return _mm512_castsi512_ps(_mm512_mask_expandloadu_epi32(z, bits, p));
    else if constexpr (TYPE == INT8) return widen_int8(_mm_mask_expandloadu_epi8(_mm512_castsi512_si128(z), bits, p));
    else {
      const __m256i h = _mm256_mask_expandloadu_epi16(_mm512_castsi512_si256(z), bits, p);
      if constexpr (TYPE == BF16) return widen_bf16(h);
      else return _mm512_cvtph_ps(h);
    }
  }
  template <i32 TYPE>
  static void columns(u64 bits, const u8* p, F* out) {
    if constexpr (TYPE == FP32) {
      out[0] = expand<FP32>(u16(bits), p);
      out[1] = expand<FP32>(u16(bits >> 16), p + __builtin_popcountll(bits & 0xffff) * 4);
      out[2] = expand<FP32>(u16(bits >> 32), p + __builtin_popcountll(bits & 0xffffffff) * 4);
      out[3] = expand<FP32>(u16(bits >> 48), p + __builtin_popcountll(bits & 0xffffffffffff) * 4);
    } else if constexpr (TYPE == INT8) {  // each 32-bit lane holds one row's four columns
      const __m512i quads = _mm512_mask_expandloadu_epi8(fresh(), bits, p);
      out[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 24), 24));
      out[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 16), 24));
      out[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quads, 8), 24));
      out[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(quads, 24));
    } else {  // each 32-bit lane holds one row's pair of columns, the first in its low half
      for (int half = 0; half < 2; half++, p += __builtin_popcount(u32(bits)) * 2, bits >>= 32) {
        const __m512i pairs = _mm512_mask_expandloadu_epi16(fresh(), u32(bits), p);
        if constexpr (TYPE == BF16) {
          out[2 * half] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
          out[2 * half + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
        } else {
          out[2 * half] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
          out[2 * half + 1] = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
        }
      }
    }
  }
  static F gather(const float* x, const int16_t* index) {
    return _mm512_i32gather_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)index)), x, 4);
  }
  static F gather(const float* x, const i32* index) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), x, 4);
  }

  // 16 columns of 16 rows into 16 rows of 16 columns: pairs, fours, then quarters of registers change places.
  template <class T>
  static void transpose(const float (*square)[16], T* to, i64 pitch) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_load_ps(square[i]);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; j++) {
        const __m512d lo = _mm512_castps_pd(b[i + j]), hi = _mm512_castps_pd(b[i + 2 + j]);
        a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
        a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
      }
    for (int j = 0; j < 4; j++) {  // a[4 g + j] holds rows j, 4 + j, 8 + j, 12 + j of columns 4 g to 4 g + 3
      const __m512 low01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), high01 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
      const __m512 low23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
      const __m512 high23 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
      put(to + j * pitch, _mm512_shuffle_f32x4(low01, low23, 0x88));
      put(to + (j + 8) * pitch, _mm512_shuffle_f32x4(low01, low23, 0xdd));
      put(to + (j + 4) * pitch, _mm512_shuffle_f32x4(high01, high23, 0x88));
      put(to + (j + 12) * pitch, _mm512_shuffle_f32x4(high01, high23, 0xdd));
    }
  }
  static void put(float* to, F f) { _mm512_storeu_ps(to, f); }
  static void put(u16* to, F f) {  // to_bf16 of kernels.h, sixteen at once
    const __m512i bits = _mm512_castps_si512(f), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(64));
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(words));
  }
};

// ------------------------------------------------------------------------------------------------- bf16 x bf16

template <int N>
void bitmask_pairs(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  constexpr int TURN = N == 1 ? 2 : 1;  // words at once, each with sums of its own, so that no product waits for another
  const i64 words = (m.columns + 3) / 4;
  for (i64 block = begin; block < end; block++) {
    const u64* mask = m.mask + block * words;
    const u8* values = (const u8*)m.values + m.starts[block] * 2;
    const u32* x = (const u32*)in.data;
    __m512 acc[2 * TURN][N];
    for (auto& bank : acc)
      for (__m512& a : bank) a = _mm512_setzero_ps();
    const auto word = [&](i64 w, __m512* low, __m512* high) {
      const u64 bits = load<u64>(mask + w);
      Avx512::prefetch(values + AHEAD), Avx512::prefetch(values + AHEAD + 64);
      const __m512i first = _mm512_mask_expandloadu_epi16(fresh(), u32(bits), values);
      const u8* middle = values + __builtin_popcount(u32(bits)) * 2;
      const __m512i second = _mm512_mask_expandloadu_epi16(fresh(), u32(bits >> 32), middle);
      values += __builtin_popcountll(bits) * 2;
      for (int n = 0; n < N; n++) {
        low[n] = _mm512_dpbf16_ps(low[n], (__m512bh)first, (__m512bh)_mm512_set1_epi32(int(x[n])));
        high[n] = _mm512_dpbf16_ps(high[n], (__m512bh)second, (__m512bh)_mm512_set1_epi32(int(x[N + n])));
      }
      x += 2 * N;
    };
    i64 w = 0;
    for (; w + TURN <= words; w += TURN) {
      if (w % 8 == 0) Avx512::prefetch((const u8*)(mask + w) + AHEAD / 8);
      word(w, acc[0], acc[1]);
      if constexpr (TURN == 2) word(w + 1, acc[2], acc[3]);
    }
    for (; w < words; w++) word(w, acc[0], acc[1]);
    for (int n = 0; n < in.tokens; n++) {
      __m512 sum = _mm512_add_ps(acc[0][n], acc[1][n]);
      for (int bank = 2; bank < 2 * TURN; bank++) sum = _mm512_add_ps(sum, acc[bank][n]);
      float y[BLOCK];
      _mm512_storeu_ps(y, sum);
      emit(m, out, n, block * BLOCK, least(BLOCK, m.rows - block * BLOCK), y);
    }
  }
}

// One row of `width` bytes against P inputs of bytes, `stride` apart: dot(sum, weights, inputs) does 64 bytes.
template <int P, class A, class DOT>
inline void dense_dots(const u8* values, i64 width, const u8* x, i64 stride, A (&acc)[P], DOT dot) {
  constexpr int BANKS = P == 1 ? 4 : P == 2 ? 2 : 1;
  A more[BANKS][P] = {};
  i64 k = 0;
  for (; k + BANKS * 64 <= width; k += BANKS * 64)
    for (int b = 0; b < BANKS; b++) {
      const i64 at = k + b * 64;
      Avx512::prefetch(values + at + AHEAD);
      const __m512i w = _mm512_loadu_si512(values + at);
      for (int p = 0; p < P; p++) more[b][p] = dot(more[b][p], w, _mm512_loadu_si512(x + p * stride + at));
    }
  for (; k < width; k += 64) {
    const i64 left = width - k;
    const __m512i w = _mm512_maskz_loadu_epi8(left < 64 ? (__mmask64(1) << left) - 1 : ~__mmask64(0), values + k);
    for (int p = 0; p < P; p++) more[0][p] = dot(more[0][p], w, _mm512_loadu_si512(x + p * stride + k));
  }
  for (int p = 0; p < P; p++) {
    acc[p] = more[0][p];
    for (int b = 1; b < BANKS; b++) acc[p] += more[b][p];
  }
}

template <int N>
void dense_bf16(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  strip<N>(m, in, out, begin, end - begin, [&](i64 r, float* sums) {
    const u8* values = (const u8*)m.values + (begin + r) * m.columns * 2;
    __m512 acc[N];
    dense_dots(values, m.columns * 2, (const u8*)in.data, in.stride * 2, acc,
               [](__m512 a, __m512i w, __m512i x) { return _mm512_dpbf16_ps(a, (__m512bh)w, (__m512bh)x); });
    for (int n = 0; n < N; n++) sums[n] = _mm512_reduce_add_ps(acc[n]);
  });
}

// ------------------------------------------------------------------------------------------------- int8 x two planes

// Bytes of inputs are unsigned, 128 above their value; the sum of a row's codes takes the 128 back.
inline float planes(const Matrix& m, const Input& in, i64 token, i64 row, i32 coarse, i32 fine) {
  const i64 shift = i64(m.sums[row]) * 128;
  return float(coarse - shift) * in.coarse[token] + float(fine - shift) * in.fine[token];
}

template <int N>
void bitmask_quads(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  const i64 words = (m.columns + 3) / 4;
  for (i64 block = begin; block < end; block++) {
    const u64* mask = m.mask + block * words;
    const u8* values = (const u8*)m.values + m.starts[block];
    const u32* x = (const u32*)in.data;
    __m512i acc[2 * N];
    for (__m512i& a : acc) a = _mm512_setzero_si512();
    for (i64 w = 0; w < words; w++, x += 2 * N) {
      const u64 bits = load<u64>(mask + w);
      Avx512::prefetch(values + AHEAD);
      if (w % 8 == 0) Avx512::prefetch((const u8*)(mask + w) + AHEAD / 8);
      const __m512i quads = _mm512_mask_expandloadu_epi8(fresh(), bits, values);
      values += __builtin_popcountll(bits);
      for (int p = 0; p < 2 * N; p++) acc[p] = _mm512_dpbusd_epi32(acc[p], _mm512_set1_epi32(int(x[p])), quads);
    }
    const i64 count = least(BLOCK, m.rows - block * BLOCK);
    for (int n = 0; n < in.tokens; n++) {
      i32 coarse[BLOCK], fine[BLOCK];
      float y[BLOCK];
      _mm512_storeu_si512(coarse, acc[2 * n]), _mm512_storeu_si512(fine, acc[2 * n + 1]);
      for (i64 i = 0; i < count; i++) y[i] = planes(m, in, n, block * BLOCK + i, coarse[i], fine[i]);
      emit(m, out, n, block * BLOCK, count, y);
    }
  }
}

template <int N>
void dense_int8(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  strip<N>(m, in, out, begin, end - begin, [&](i64 r, float* sums) {
    struct Sums {  // sixteen 32-bit sums, added as such
      __m512i v;
      Sums& operator+=(const Sums& o) { return v = _mm512_add_epi32(v, o.v), *this; }
    } acc[2 * N];
    const u8* values = (const u8*)m.values + (begin + r) * m.columns;
    dense_dots(values, m.columns, (const u8*)in.data, in.stride, acc,
               [](Sums a, __m512i w, __m512i x) { return Sums{_mm512_dpbusd_epi32(a.v, x, w)}; });
    for (int n = 0; n < in.tokens; n++) {
      const i32 coarse = _mm512_reduce_add_epi32(acc[2 * n].v), fine = _mm512_reduce_add_epi32(acc[2 * n + 1].v);
      sums[n] = planes(m, in, n, begin + r, coarse, fine);
    }
    for (i64 n = in.tokens; n < N; n++) sums[n] = 0;
  });
}

// ------------------------------------------------------------------------------------------------- by form

void bitmask(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  if (in.form != PAIRS && in.form != QUADS) return Table<Avx512>::bitmask(m, in, out, begin, end);
  by_tokens(in.tokens, [&](auto n) {
    if (in.form == PAIRS) bitmask_pairs<decltype(n)::value>(m, in, out, begin, end);
    else bitmask_quads<decltype(n)::value>(m, in, out, begin, end);
  });
}

void dense(const Matrix& m, const Input& in, const Output& out, i64 begin, i64 end) {
  if (in.form != BF16S && in.form != PLANES) return Table<Avx512>::dense(m, in, out, begin, end);
  by_tokens(in.tokens, [&](auto n) {
    if (in.form == BF16S) dense_bf16<decltype(n)::value>(m, in, out, begin, end);
    else dense_int8<decltype(n)::value>(m, in, out, begin, end);
  });
}

constexpr Kernels with(bool pairs) {
  Kernels kernels = Table<Avx512>::value;
  kernels.bitmask = bitmask, kernels.dense = dense, kernels.pairs = pairs, kernels.planes = true;
  return kernels;
}

}  // namespace

const Kernels* avx512_kernels(bool pairs) {
  static constexpr Kernels all = with(true), most = with(false);
  return pairs ? &all : &most;
}

}  // namespace secateur
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
#include "matrix.h"
namespace secateur {
const Kernels* avx512_kernels(bool) { return nullptr; }
}  // namespace secateur
#endif
