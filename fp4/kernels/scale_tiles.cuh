/*
Where Blackwell's products look for the scale of row r, block c (its 32 values of K): in tiles of 128 rows x 4 blocks, 512
bytes each, a row of tiles after the other. In a tile, a line of 16 bytes holds rows i, i + 32, i + 64, i + 96, a word of 4
blocks each: a lane that reads line i of 32 gets what one instruction wants, and tensor memory has 32 lines of 4 words.

    line, 16 bytes      word 0            word 1             word 2             word 3
    0                   row 0, c = 0..3   row 32, c = 0..3   row 64, c = 0..3   row 96, c = 0..3
    1                   row 1             row 33             row 65             row 97
    ..
    31                  row 31            row 63             row 95             row 127

The quantisers write their scales so (quantize.cu); those of a weight, kept plain, are rearranged by swizzle.cu. Rows beyond M and
blocks beyond K / 32 only fill the last tiles: they are written, to some exponent, but no product depends on them.
*/
#pragma once
#include "mxfp4.cuh"

namespace mxfp4 {

FN int64_t tiled_bytes(int64_t rows, int64_t blocks) { return ceil_div(rows, 128) * ceil_div(blocks, 4) * 512; }

FN int64_t tiled(int64_t row, int64_t block, int64_t blocks) {             // the byte's place; blocks = K / 32
  return (row / 128 * ceil_div(blocks, 4) + block / 4) * 512 + row % 32 * 16 + row % 128 / 32 * 4 + block % 4;
}

}  // namespace mxfp4
