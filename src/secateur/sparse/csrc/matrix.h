// What the C interface, the dispatcher and the kernels agree on: plain structures, no library types.
//
// The packed formats are specified in docs/packed-format.md. Everything here was verified by the caller: the kernels
// trust offsets, indices and lengths.
#pragma once
#include <cstddef>
#include <cstdint>

namespace secateur {

using i32 = int32_t;
using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

enum Kind : i32 { BITMASK = 0, CSR = 1, TILE = 2, COLUMNS = 3, DENSE = 4 };
enum Type : i32 { FP32 = 0, BF16 = 1, FP16 = 2, INT8 = 3 };
enum Level : i32 { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

constexpr i64 BLOCK = 16;   // rows of a block, and lanes of every vector below
constexpr i64 GROUP = 8;    // most tokens that share one pass over the weights
constexpr i64 AHEAD = 8192; // bytes by which loads are announced; measured: at 1,536 the packed product waits for memory
constexpr i64 SPARE = 64;   // floats beyond the last input that kernels may read; they are zeros

constexpr i64 size_of(i32 type) { return type == FP32 ? 4 : type == INT8 ? 1 : 2; }

// One packed matrix [rows, columns]. Pointers that a kind does not use are null.
struct Matrix {
  i32 kind, type;
  i64 rows, columns;
  i64 tile_rows, tile_columns;  // 1, 1 for csr
  i64 count;                    // of values
  const void* values;
  const u64* mask;              // bitmask: [row blocks][words of 16 x 4]; columns: [columns][words of 64 rows]
  const i64* starts;            // first value of each row block, column, row or row of tiles
  const i64* crow;              // csr, tile: first index of each row (of tiles)
  const void* col;              // csr, tile: i16 or i32 column (of tiles)
  i64 col_bytes;                // 2 or 4
  const float* scales;          // int8: [rows]
  const i32* sums;              // int8: the sum of each row's codes, or null: then inputs stay floats
};

// Inputs of one group of tokens, as the kernel of that form wants them.
enum Form : i32 {
  FLOATS = 0,  // float [columns][tokens]: one input of all tokens side by side
  ROWS = 1,    // float [tokens][stride]
  PAIRS = 2,   // bf16 pairs, u32 [columns / 2][tokens]
  BF16S = 3,   // u16 [tokens][stride]
  QUADS = 4,   // two u8 planes of quads, u32 [columns / 4][2 tokens]
  PLANES = 5,  // u8 [2 tokens][stride]
  LANES = 6,   // float [columns][16]: one input of up to 16 tokens, zeros beyond the last
};

struct Input {
  const void* data;
  Form form;
  i64 tokens, stride;                // tokens: how many are real; the rest up to 1, 2, 4 or 8 are zeros
  float coarse[GROUP], fine[GROUP];  // steps of the two planes of int8 inputs
};

// Outputs y [tokens][rows], float or bf16, each with its bias (or none).
struct Output {
  void* data;
  bool bf16;
  i64 rows;
  const float* bias;
};

// What one level of instructions offers. Every function does units [begin, end): row blocks, rows, rows of tiles.
struct Kernels {
  void (*bitmask)(const Matrix&, const Input&, const Output&, i64 begin, i64 end);
  void (*csr)(const Matrix&, const Input&, const Output&, i64 begin, i64 end);
  void (*tile)(const Matrix&, const Input&, const Output&, i64 begin, i64 end, void* scratch);
  void (*dense)(const Matrix&, const Input&, const Output&, i64 begin, i64 end);
  // Adds the columns listed in active, each times its input, to y [rows padded to 64], in floats and without scales.
  void (*columns)(const Matrix&, const i32* active, const float* inputs, i64 count, float* y);
  // Writes row blocks to a row-major panel of floats or bf16, without scales.
  void (*unpack)(const Matrix&, void* panel, bool bf16, i64 begin, i64 end);
  bool pairs;   // has a product of bf16 pairs
  bool planes;  // has a product of bytes
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the compiler cannot make them
const Kernels* avx512_kernels(bool pairs);  // pairs: whether the CPU multiplies bf16 pairs

}  // namespace secateur
