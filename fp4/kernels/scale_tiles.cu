/*
Rearranges plain scales, those of a weight, into the tiles of scale_tiles.cuh for Blackwell's
products.
*/
#include "scale_tiles.cuh"

namespace {

constexpr int THREADS = 256;

// A thread makes one word: the scales of 4 neighbouring blocks of a row. Where the matrix has no
// such row or block, the scale is 0.
__global__ void swizzle_kernel(
    const uint8_t* scales,  // [rows, blocks]
    int64_t rows,
    int64_t blocks,
    int64_t words,   // in all tiles
    uint8_t* out) {  // [4 * words]
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= words)
    return;
  const int64_t words_per_row = mxfp4::ceil_div(blocks, 4);
  const int64_t row = i / words_per_row;
  const int64_t first_block = i % words_per_row * 4;
  uint32_t word = 0;
  for (int j = 0; j < 4; j++) {
    const int64_t block = first_block + j;
    if (row < rows && block < blocks)
      word |= uint32_t(scales[row * blocks + block]) << (8 * j);
  }
  const int64_t index = mxfp4::scale_tile_index(row, first_block, blocks);
  *reinterpret_cast<uint32_t*>(out + index) = word;
}

}  // namespace

void swizzle_scales(
    const uint8_t* scales,
    int64_t rows,
    int64_t blocks,
    uint8_t* out,
    void* stream) {
  const int64_t words = mxfp4::scale_tiles_bytes(rows, blocks) / 4;
  if (words == 0)
    return;
  const unsigned groups = unsigned(mxfp4::ceil_div(words, THREADS));
  swizzle_kernel<<<groups, THREADS, 0, (cudaStream_t)stream>>>(scales, rows, blocks, words, out);
}
