// The level that every CPU has: plain C++, which compilers turn into whatever vectors the platform guarantees.
#include "kernels.h"

namespace secateur {
namespace {

struct Portable {
  struct F {
    float v[16];
  };
  static constexpr bool OVERREADS = false;

  static F zero() { return F{}; }
  static F broadcast(float x) {
    F f;
    for (float& v : f.v) v = x;
    return f;
  }
  static F fma(const F& a, const F& b, F c) {
    for (int i = 0; i < 16; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static F add(F a, const F& b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
  }
  static F loadf(const float* p) { return load<F>(p); }
  static void store(float* p, const F& f) { memcpy(p, f.v, sizeof f.v); }
  static float sum(const F& f) {
    float total = 0;
    for (float v : f.v) total += v;
    return total;
  }
  static void prefetch(const void*) {}

  template <i32 TYPE>
  static F values(const u8* p) {
    F f;
    for (int i = 0; i < 16; i++) f.v[i] = value_at<TYPE>(p, i);
    return f;
  }
  template <i32 TYPE>
  static F expand(u16 bits, const u8* p) {
    F f{};
    for (i64 i = 0; bits; bits = u16(bits & (bits - 1))) f.v[__builtin_ctz(bits)] = value_at<TYPE>(p, i++);
    return f;
  }
  template <i32 TYPE>
  static void columns(u64 bits, const u8* p, F* out) {
    for (int c = 0; c < 4; c++) out[c] = zero();
    for (i64 i = 0; bits; bits &= bits - 1, i++) {
      const int b = __builtin_ctzll(bits);
      const float value = value_at<TYPE>(p, i);
      if (TYPE == FP32) out[b / 16].v[b % 16] = value;
      else if (TYPE == INT8) out[b % 4].v[b / 4] = value;
      else out[b / 32 * 2 + b % 2].v[b / 2 % 16] = value;
    }
  }
  template <class I>
  static F gather(const float* x, const I* index) {
    F f;
    for (int i = 0; i < 16; i++) f.v[i] = x[index[i]];
    return f;
  }
  template <class T>
  static void transpose(const float (*square)[16], T* to, i64 pitch) {
    for (int r = 0; r < 16; r++)
      for (int c = 0; c < 16; c++)
        to[r * pitch + c] = sizeof(T) == 2 ? T(to_bf16(square[c][r])) : T(square[c][r]);
  }
};

}  // namespace

const Kernels* portable_kernels() {
  static const Kernels kernels = Table<Portable>::value;
  return &kernels;
}

}  // namespace secateur
