// AVX2: the same formats without expanding loads. Eight bits of a mask pick a shuffle from a table that moves up to
// eight packed values to their lanes and zeros into the others. A vector F is two registers. Loads take whole
// registers, so the last words of a matrix are expanded from a copy (OVERREADS).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "matrix.h"

// Functions from here on are compiled for these instructions, whatever the compiler's own target is.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif

#include "kernels.h"

namespace secateur {
namespace {

// For each mask of eight lanes, where in the packed values each lane comes from; 0x80 for none. `halves` says the
// same in bytes of 16-bit values.
struct Shuffles {
  alignas(64) u8 bytes[256][8];
  alignas(64) u8 halves[256][16];
};

constexpr Shuffles shuffles() {
  Shuffles s{};
  for (int mask = 0; mask < 256; mask++)
    for (int lane = 0, next = 0; lane < 8; lane++) {
      const bool set = mask >> lane & 1;
      s.bytes[mask][lane] = set ? u8(next) : u8(0x80);
      s.halves[mask][2 * lane] = set ? u8(2 * next) : u8(0x80);
      s.halves[mask][2 * lane + 1] = set ? u8(2 * next + 1) : u8(0x80);
      next += set;
    }
  return s;
}

constexpr Shuffles SHUFFLES = shuffles();

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  static constexpr bool OVERREADS = true;

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
  static F add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
  static F loadf(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F f) { _mm256_storeu_ps(p, f.a), _mm256_storeu_ps(p + 8, f.b); }
  static float sum(F f) {
    const __m256 eight = _mm256_add_ps(f.a, f.b);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

  static __m128i load128(const void* p) { return _mm_loadu_si128((const __m128i*)p); }
  static __m128i load64(const void* p) { return _mm_loadl_epi64((const __m128i*)p); }
  static __m256 widen_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static __m256 widen_int8(__m128i b) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)); }

  template <i32 TYPE>
  static __m256 eight(const u8* p) {
    if constexpr (TYPE == FP32) return _mm256_loadu_ps((const float*)p);
    else if constexpr (TYPE == BF16) return widen_bf16(load128(p));
    else if constexpr (TYPE == FP16) return _mm256_cvtph_ps(load128(p));
    else return widen_int8(load64(p));
  }
  template <i32 TYPE>
  static F values(const u8* p) {
    return {eight<TYPE>(p), eight<TYPE>(p + 8 * size_of(TYPE))};
  }

  static __m128i spread16(u8 bits, const u8* p) { return _mm_shuffle_epi8(load128(p), load128(SHUFFLES.halves[bits])); }
  static __m128i spread8(u8 bits, const u8* p) { return _mm_shuffle_epi8(load64(p), load64(SHUFFLES.bytes[bits])); }
  template <i32 TYPE>
  static __m256 expand8(u8 bits, const u8* p) {
    if constexpr (TYPE == FP32) {  // the permutation reads three bits of an index; its sign says that none is wanted
      const __m256i index = _mm256_cvtepi8_epi32(load64(SHUFFLES.bytes[bits]));
      const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps((const float*)p), index);
      return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(index, 31)), moved);
    } else if constexpr (TYPE == BF16) return widen_bf16(spread16(bits, p));
    else if constexpr (TYPE == FP16) return _mm256_cvtph_ps(spread16(bits, p));
    else return widen_int8(spread8(bits, p));
  }
  template <i32 TYPE>
  static F expand(u16 bits, const u8* p) {
    return {expand8<TYPE>(u8(bits), p), expand8<TYPE>(u8(bits >> 8), p + __builtin_popcount(u8(bits)) * size_of(TYPE))};
  }

  // Halves of 32-bit lanes as floats.
  template <i32 TYPE, bool HIGH>
  static __m256 half_of(__m256i pairs) {
    if constexpr (TYPE == BF16 && HIGH) {
      return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
    } else if constexpr (TYPE == BF16) {
      return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    } else {
      const __m256i low = HIGH ? _mm256_srli_epi32(pairs, 16) : _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
      return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    }
  }
  template <i32 TYPE>
  static void columns(u64 bits, const u8* p, F* out) {
    if constexpr (TYPE == FP32) {
      for (int c = 0; c < 4; c++, bits >>= 16) {
        out[c] = expand<FP32>(u16(bits), p);
        p += __builtin_popcount(u16(bits)) * 4;
      }
    } else if constexpr (TYPE == INT8) {  // eight bits are two rows of four columns
      for (int part = 0; part < 2; part++) {
        __m128i rows[4];
        for (__m128i& two : rows) {
          two = spread8(u8(bits), p);
          p += __builtin_popcount(u8(bits)), bits >>= 8;
        }
        const __m256i quads = _mm256_set_m128i(_mm_unpacklo_epi64(rows[2], rows[3]), _mm_unpacklo_epi64(rows[0], rows[1]));
        const __m256 column[4] = {
            _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 24), 24)),
            _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 16), 24)),
            _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(quads, 8), 24)),
            _mm256_cvtepi32_ps(_mm256_srai_epi32(quads, 24)),
        };
        for (int c = 0; c < 4; c++) (part ? out[c].b : out[c].a) = column[c];
      }
    } else {  // eight bits are four rows of two columns
      for (int step = 0; step < 2; step++)
        for (int part = 0; part < 2; part++) {
          const __m128i low = spread16(u8(bits), p);
          p += __builtin_popcount(u8(bits)) * 2, bits >>= 8;
          const __m128i high = spread16(u8(bits), p);
          p += __builtin_popcount(u8(bits)) * 2, bits >>= 8;
          const __m256i pairs = _mm256_set_m128i(high, low);
          (part ? out[2 * step].b : out[2 * step].a) = half_of<TYPE, false>(pairs);
          (part ? out[2 * step + 1].b : out[2 * step + 1].a) = half_of<TYPE, true>(pairs);
        }
    }
  }
  static F gather(const float* x, const int16_t* index) {
    return {_mm256_i32gather_ps(x, _mm256_cvtepi16_epi32(load128(index)), 4),
            _mm256_i32gather_ps(x, _mm256_cvtepi16_epi32(load128(index + 8)), 4)};
  }
  static F gather(const float* x, const i32* index) {
    return {_mm256_i32gather_ps(x, _mm256_loadu_si256((const __m256i*)index), 4),
            _mm256_i32gather_ps(x, _mm256_loadu_si256((const __m256i*)(index + 8)), 4)};
  }
  template <class T>
  static void transpose(const float (*square)[16], T* to, i64 pitch) {
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 16; c++)
        to[r * pitch + c] = sizeof(T) == 2 ? T(to_bf16(square[c][r])) : T(square[c][r]);
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = Table<Avx2>::value;
  return &kernels;
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
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace secateur
#endif
