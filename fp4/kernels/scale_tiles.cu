/*
Plain scales [rows, blocks], a weight's -> the tiles of scale_tiles.cuh. A thread makes a word: 4 blocks of a row, 0 where there are none.
*/
#include "scale_tiles.cuh"

__global__ void swizzle_kernel(const uint8_t* scales, int64_t rows, int64_t blocks, int64_t words, uint8_t* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= words) return;
  const int64_t groups = mxfp4::ceil_div(blocks, 4), row = i / groups, block = i % groups * 4;
  uint32_t word = 0;
  for (int j = 0; j < 4; j++)
    if (row < rows && block + j < blocks) word |= uint32_t(scales[row * blocks + block + j]) << 8 * j;
  *reinterpret_cast<uint32_t*>(out + mxfp4::tiled(row, block, blocks)) = word;
}

void swizzle_scales(const uint8_t* scales, int64_t rows, int64_t blocks, uint8_t* out, void* stream) {
  const int64_t words = mxfp4::tiled_bytes(rows, blocks) / 4;
  if (words) swizzle_kernel<<<unsigned(mxfp4::ceil_div(words, 256)), 256, 0, (cudaStream_t)stream>>>(scales, rows, blocks, words, out);
}
