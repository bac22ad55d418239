// The C interface: which instructions there are, products of packed matrices, panels, packing.
//
// A product splits its tokens into groups of up to eight, lays each group's inputs out as the kernel reads them, and
// splits rows over threads. Threads are OpenMP's, so in a process with PyTorch they are PyTorch's own.
#include <cstdlib>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "inputs.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace secateur {
namespace {

constexpr i32 ABI = 2;

bool has(i32 level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == AVX2) return avx2 && avx2_kernels();
  if (level == AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") && avx512_kernels(false);
#endif
  return level == PORTABLE;
}

// Calls f(begin, end) on as many threads as asked, each with its share of n units.
template <class F>
void split(i64 n, i32 threads, F&& f) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
#pragma omp parallel num_threads(threads)
    {
      const i64 t = omp_get_thread_num(), of = omp_get_num_threads();
      f(n * t / of, n * (t + 1) / of, t);
    }
    return;
  }
#endif
  (void)threads;
  f(0, n, 0);
}

// Memory of one call, aligned to a cache line and kept by the thread for the next.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
  void* take(size_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + 4095) / 4096 * 4096;
      memory = aligned_alloc(64, size);
      if (!memory) size = 0;
    }
    return memory;
  }
};

thread_local Scratch INPUTS, LINES;

// y = W x for one token by columns, skipping inputs that are zero; returns how many products that took, or -1.
i64 product_of_columns(const Matrix& m, const Activations& x, i64 token, const Kernels& k, const Output& out,
                       i32 threads) {
  const i64 rows = rounded(m.rows, 64), lanes = rounded(m.columns, 16);
  char* memory = (char*)INPUTS.take(size_t(lanes * 8 + threads * rows * 4));
  if (!memory) return -1;
  float* const inputs = (float*)memory;
  i32* const active = (i32*)(inputs + lanes);
  float* const partial = (float*)(active + lanes);
  i64 count = 0, macs = 0;
  for (i64 c = 0; c < m.columns; c++) {
    const float value = x.at(token, c);
    if (value == 0) continue;
    inputs[count] = value, active[count++] = i32(c);
    macs += m.starts[c + 1] - m.starts[c];
  }
  memset(partial, 0, size_t(threads * rows) * 4);
  split(count, threads, [&](i64 begin, i64 end, i64 t) {
    k.columns(m, active + begin, inputs + begin, end - begin, partial + t * rows);
  });
  for (i64 row = 0; row < m.rows; row++) {
    float y = partial[row];
    for (i64 t = 1; t < threads; t++) y += partial[t * rows + row];
    if (m.scales) y *= m.scales[row];
    if (out.bias) y += out.bias[row];
    if (!out.bf16) {
      ((float*)out.data)[token * m.rows + row] = y;
      continue;
    }
    u32 bits;
    memcpy(&bits, &y, sizeof bits);
    const u32 even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ((u16*)out.data)[token * m.rows + row] = u16(y != y ? (bits >> 16) | 64 : even);
  }
  return macs;
}

}  // namespace
}  // namespace secateur

using namespace secateur;

EXPORT i32 secateur_abi() { return ABI; }

EXPORT i32 secateur_has(i32 level) { return has(level); }

// y [tokens][rows] = x [tokens][columns] W^T + bias, both contiguous and in the same dtype.
// Returns the number of products for columns, 0 for the other kinds, -1 without memory.
EXPORT i64 secateur_product(const Matrix* matrix, const void* x, i32 bf16, i64 tokens, void* y, const float* bias,
                            i32 level, i32 threads) {
  const Matrix& m = *matrix;
  const Kernels& k = *kernels_of(level);
  const Activations inputs{x, bf16 != 0, m.columns, m.columns};
  i64 macs = 0;
  for (i64 first = 0; first < tokens;) {
    const i64 most = m.kind == COLUMNS ? 1 : m.kind == CSR ? BLOCK : GROUP;
    const i64 count = tokens - first < most ? tokens - first : most;
    const i64 at = first * m.rows * (bf16 ? 2 : 4);
    const Output out{(char*)y + (m.kind == COLUMNS ? 0 : at), bf16 != 0, m.rows, bias};
    if (m.kind == COLUMNS) {
      const i64 did = product_of_columns(m, inputs, first, k, out, threads);
      if (did < 0) return -1;
      macs += did;
    } else {
      const Form form = form_of(m, k, bf16 != 0, tokens);
      const i64 width = form == LANES ? BLOCK : width_of(count);
      void* memory = INPUTS.take(bytes_of(form, m.columns, width));
      if (!memory) return -1;
      Input in;
      lay(inputs, first, count, form, in, memory);
      bool lost = false;
      split(lines_of(m), threads, [&](i64 begin, i64 end, i64) {
        void* lines = m.kind == TILE ? LINES.take(bytes_of(ROWS, m.columns, width)) : nullptr;
        if (m.kind == TILE && !lines) lost = true;
        else multiply(k, m, in, out, begin, end, lines);
      });
      if (lost) return -1;
    }
    first += count;
  }
  return macs;
}

// Lines [begin, end) (row blocks, rows of tiles, rows; all for columns) as a row-major panel, without int8's scales.
EXPORT void secateur_unpack(const Matrix* matrix, void* panel, i32 bf16, i64 begin, i64 end, i32 level, i32 threads) {
  const Matrix& m = *matrix;
  const Kernels& k = *kernels_of(level);
  const i64 height = m.kind == BITMASK ? BLOCK : m.tile_rows;
  if (m.kind == COLUMNS) return k.unpack(m, panel, bf16 != 0, 0, m.rows);
  split(end - begin, threads, [&](i64 from, i64 to, i64) {
    char* const top = (char*)panel + from * height * m.columns * (bf16 ? 2 : 4);
    if (from < to) k.unpack(m, top, bf16 != 0, begin + from, begin + to);
  });
}

// Visits the bits of a bitmask's words in order: f(bit, place in the matrix), only those inside it.
template <class T, class F>
static inline void each_bit(i64 rows, i64 columns, i64 block, i64 word, F&& f) {
  constexpr i64 PER = 4 / i64(sizeof(T));
  for (i64 step = 0; step < 4 / PER; step++)
    for (i64 row = 0; row < BLOCK; row++)
      for (i64 c = 0; c < PER; c++) {
        const i64 y = block * BLOCK + row, x = 4 * word + step * PER + c;
        if (y < rows && x < columns) f((step * BLOCK + row) * PER + c, y * columns + x);
      }
}

template <class T>
static void pack_blocks(const T* matrix, i64 rows, i64 columns, u64* mask, i64* offsets, T* values, i32 threads) {
  const i64 blocks = (rows + BLOCK - 1) / BLOCK, words = (columns + 3) / 4;
  split(blocks, threads, [&](i64 begin, i64 end, i64) {
    for (i64 block = begin; block < end; block++) {
      i64 count = values ? offsets[block] : 0;
      for (i64 w = 0; w < words; w++) {
        u64 word = 0;
        each_bit<T>(rows, columns, block, w, [&](i64 bit, i64 at) {
          const T value = matrix[at];
          if (!value) return;
          word |= u64(1) << bit;
          if (values) values[count] = value;
          count++;
        });
        mask[block * words + w] = word;
      }
      if (!values) offsets[block + 1] = count;
    }
  });
  if (values) return;
  offsets[0] = 0;
  for (i64 block = 0; block < blocks; block++) offsets[block + 1] += offsets[block];
}

template <class T>
static void decode_blocks(const u64* mask, const i64* offsets, const T* values, i64 rows, i64 columns, T* matrix,
                          i32 threads) {
  const i64 blocks = (rows + BLOCK - 1) / BLOCK, words = (columns + 3) / 4;
  split(blocks, threads, [&](i64 begin, i64 end, i64) {
    for (i64 block = begin; block < end; block++) {
      const T* next = values + offsets[block];
      for (i64 w = 0; w < words; w++) {
        const u64 word = mask[block * words + w];
        each_bit<T>(rows, columns, block, w, [&](i64 bit, i64 at) { matrix[at] = word >> bit & 1 ? *next++ : T(0); });
      }
    }
  });
}

// The bitmask of a row-major matrix of values of 4, 2 or 1 bytes in which a zero is all bits zero. The first pass
// (without values) fills the words and counts offsets [row blocks + 1]; the second fills the values.
EXPORT void secateur_pack(const void* matrix, i64 bytes, i64 rows, i64 columns, void* mask, void* offsets,
                          void* values, i32 threads) {
  if (bytes == 4) pack_blocks((const u32*)matrix, rows, columns, (u64*)mask, (i64*)offsets, (u32*)values, threads);
  if (bytes == 2) pack_blocks((const u16*)matrix, rows, columns, (u64*)mask, (i64*)offsets, (u16*)values, threads);
  if (bytes == 1) pack_blocks((const u8*)matrix, rows, columns, (u64*)mask, (i64*)offsets, (u8*)values, threads);
}

// The row-major matrix of a bitmask, bit for bit.
EXPORT void secateur_decode(const void* mask, const void* offsets, const void* values, i64 bytes, i64 rows, i64 columns,
                            void* matrix, i32 threads) {
  const u64* m = (const u64*)mask;
  const i64* o = (const i64*)offsets;
  if (bytes == 4) decode_blocks(m, o, (const u32*)values, rows, columns, (u32*)matrix, threads);
  if (bytes == 2) decode_blocks(m, o, (const u16*)values, rows, columns, (u16*)matrix, threads);
  if (bytes == 1) decode_blocks(m, o, (const u8*)values, rows, columns, (u8*)matrix, threads);
}
