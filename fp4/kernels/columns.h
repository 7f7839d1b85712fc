/*
What lies between the ops of a GemmSpec, which columns_bind.cpp checks and allocates, and the
kernels: columns_cpu.cpp and quantize_columns.cu. All matrices are contiguous and row-major, and the
columns of those in memory are a multiple of 16. The macros are those of columns.cuh.
*/
#pragma once
#include "ops.h"

namespace COLUMN_NAME {     // so that the functions of two GemmSpecs are never mistaken

// A matrix of MXFP4, as fp4/reference.py packs it.
struct PackedMatrix {
  uint8_t* codes;           // nullptr: there is none
  uint8_t* scales;
};

// An operand in the FP8 tiles of fp8_tiles.cuh.
struct TileMatrix {
  void* values;             // nullptr: there is none
  float* scales;
  bool right;
};

struct Quantization {
  FloatMatrix x;            // in memory: [rows, columns], or [columns, rows] if transposed
  PackedMatrix packed_x;    // if it is there, it is read in place of x, and transposed
  bool transposed;
  int64_t rows;             // of the operand
  int64_t columns;
  int64_t padded;           // columns, with zeros up to whole blocks and rotations
  const float* factor;      // of all values, or of each row in memory; nullptr: none
  bool factor_by_row;
  const int64_t* signs;     // [2], or nullptr where there are none
  const int64_t* seed;      // [1], or nullptr where nothing is random
  FloatMatrix values;       // [rows, padded]
  PackedMatrix packed;      // if it is there, it is written in place of the values, if CAN_PACK
  TileMatrix tiles;         // likewise; on a GPU alone, and not a right one unless transposed
  float* out_factor;        // [1], or [rows] if HAS_ROW_FACTOR
  int32_t* mask;            // [rows, padded / 32] if HAS_MASK
  // What the passes leave one another. NVFP4: [1], the largest magnitude. HAS_ROW_FACTOR: [2, rows,
  // padded / 32], EDEN's two sums of each block.
  float* scratch;
  void* stream;
};

struct Unrotation {
  FloatMatrix product;      // [rows, columns], columns being whole blocks and rotations
  int64_t rows;
  int64_t columns;
  const float* left;        // a factor of all values, or of each row
  bool left_by_row;
  const float* right;       // a factor of all values, or of each column
  bool right_by_column;
  const int32_t* mask;      // [rows, columns / 32] if HAS_MASK
  const int64_t* signs;     // [2], or nullptr where there are none
  FloatMatrix out;          // [rows, columns]
  void* stream;
};

void quantize_on_cpu(const Quantization& op);
void quantize_on_gpu(const Quantization& op);
void unrotate_on_cpu(const Unrotation& op);
void unrotate_on_gpu(const Unrotation& op);

}  // namespace COLUMN_NAME
