/*
The functions of quantize_columns.cu, with arguments that ctypes can pass. The macros COLUMN_... are
those of columns.cuh.
*/
#include "cuda_on_cpu.h"
#include "columns.h"

extern "C" {

// x_scales and scales are nullptr where x, or what is written, is not packed.
void quantize(void* x, bool is_bf16, uint8_t* x_scales, bool transposed, int64_t rows,
              int64_t columns, int64_t padded, const float* factor, bool factor_by_row,
              const int64_t* signs, const int64_t* seed, void* values, bool values_are_bf16,
              void* scales, int format, float* out_factor, int32_t* mask, float* scratch) {
  const COLUMN_NAME::PackedMatrix packed_x = {x_scales ? (uint8_t*)x : nullptr, x_scales};
  COLUMN_NAME::PackedMatrix packed = {};
  COLUMN_NAME::TileMatrix tiles = {};
  if (OperandFormat(format) != OperandFormat::packed)
    tiles = {values, (float*)scales, OperandFormat(format) == OperandFormat::fp8_right};
  else if (scales)
    packed = {(uint8_t*)values, (uint8_t*)scales};
  COLUMN_NAME::quantize_on_gpu(
      {{x, is_bf16}, packed_x, transposed, rows, columns, padded, factor, factor_by_row, signs,
       seed, {values, values_are_bf16}, packed, tiles, out_factor, mask, scratch, nullptr});
}

void unrotate(void* product, bool is_bf16, int64_t rows, int64_t columns, const float* left,
              bool left_by_row, const float* right, bool right_by_column, const int32_t* mask,
              const int64_t* signs, void* out, bool out_is_bf16) {
  COLUMN_NAME::unrotate_on_gpu(
      {{product, is_bf16}, rows, columns, left, left_by_row, right, right_by_column, mask, signs,
       {out, out_is_bf16}, nullptr});
}

}
