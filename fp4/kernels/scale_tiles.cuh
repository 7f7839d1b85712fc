/*
The layout in which Blackwell's products want the block scales of an operand.

The scales of a packed matrix form a matrix [rows, blocks] of bytes, with blocks = K / 32. The
products read them in tiles of 128 rows x 4 blocks. A tile has 512 bytes, and the tiles of a row
of tiles follow one another. Within a tile, a line of 16 bytes holds the rows i, i + 32, i + 64
and i + 96, with one word of 4 blocks for each. The reason is that a lane of a warp which reads
line i of the 32 lines gets what one instruction wants, and that tensor memory has 32 lines of 4
words, too.

    line, 16 bytes      word 0            word 1             word 2             word 3
    0                   row 0, c = 0..3   row 32, c = 0..3   row 64, c = 0..3   row 96, c = 0..3
    1                   row 1             row 33             row 65             row 97
    ..
    31                  row 31            row 63             row 95             row 127

where c is the block of the row within the tile.

The quantisers write their scales in this layout (quantize.cu). A weight keeps its scales plain,
and scale_tiles.cu rearranges them. Rows beyond the matrix and blocks beyond K / 32 only fill up
the last tiles: they are written with some exponent, but no product depends on them.
*/
#pragma once
#include "mxfp4.cuh"

namespace mxfp4 {

constexpr int SCALE_TILE_ROWS = 128;
constexpr int SCALE_TILE_BLOCKS = 4;
constexpr int SCALE_TILE_BYTES = SCALE_TILE_ROWS * SCALE_TILE_BLOCKS;

// The size of the scales of a matrix in this layout.
HOST_DEVICE int64_t scale_tiles_bytes(int64_t rows, int64_t blocks) {
  const int64_t tile_rows = ceil_div(rows, SCALE_TILE_ROWS);
  const int64_t tile_columns = ceil_div(blocks, SCALE_TILE_BLOCKS);
  return tile_rows * tile_columns * SCALE_TILE_BYTES;
}

// The position of a scale, in bytes from the first tile.
HOST_DEVICE int64_t scale_tile_index(
    int64_t row,
    int64_t block,     // within the row
    int64_t blocks) {  // in a row: K / 32
  const int64_t tiles_above = row / SCALE_TILE_ROWS * ceil_div(blocks, SCALE_TILE_BLOCKS);
  const int64_t tile = tiles_above + block / SCALE_TILE_BLOCKS;
  const int64_t line = tile * SCALE_TILE_BYTES + row % 32 * 16;
  const int64_t word = line + row % SCALE_TILE_ROWS / 32 * 4;
  return word + block % SCALE_TILE_BLOCKS;
}

}  // namespace mxfp4
