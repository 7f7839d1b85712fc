/*
Packed MXFP4 -> FP8 operands of a product, exactly (fp8_tiles.cuh explains why it is exact, and
which blocks are rounded).

    packed_to_fp8_rows      for a library's product: E4M3 [M, K] and a float32 scale a row, which
                            alpha is multiplied into
    packed_to_fp8_tiles     for gemm_sm90.cu
*/
#include "ops.h"
#include "fp8_tiles.cuh"

namespace {

constexpr int ROW_THREADS = 128;
constexpr int ROW_WARPS = ROW_THREADS / 32;

// One block of a packed matrix, as a thread holds it: 2^e * codes, or NaN unless finite.
struct PackedBlock {
  uint4 codes;
  int e;
  bool finite;
};

__device__ PackedBlock read_block(
    const uint8_t* codes,           // [blocks, 16]
    const uint8_t* scales,          // [blocks]
    int64_t block) {
  const int byte = scales[block];
  return {reinterpret_cast<const uint4*>(codes)[block], byte - 127, byte != 255};
}

// Returns the maximum of e over the CUDA block.
__device__ int max_over_row_threads(int e, int (&warp_max)[ROW_WARPS]) {
  for (int i = 16; i; i /= 2)
    e = max(e, __shfl_xor_sync(~0u, e, i));
  if (threadIdx.x % 32 == 0)
    warp_max[threadIdx.x / 32] = e;
  __syncthreads();
  return max(max(warp_max[0], warp_max[1]), max(warp_max[2], warp_max[3]));
}

// A CUDA block takes a row. It reads the row twice, first for the largest exponent; a thread keeps
// its first block in registers, and only reads the others, of a long row, again.
__global__ void __launch_bounds__(ROW_THREADS) rows_kernel(
    const uint8_t* __restrict__ codes,          // [M, 16 * blocks]
    const uint8_t* __restrict__ scales,         // [M, blocks]
    int64_t blocks,                             // of 32 in a row
    float alpha,
    uint4* __restrict__ fp8,                    // [M, 2 * blocks] of 16 bytes
    float* __restrict__ row_scales) {           // [M]
  __shared__ int warp_max[ROW_WARPS];
  codes += blockIdx.x * blocks * 16;
  scales += blockIdx.x * blocks;
  fp8 += blockIdx.x * blocks * 2;

  PackedBlock first = {};
  int largest_e = MIN_EXPONENT;
  for (int64_t b = threadIdx.x; b < blocks; b += ROW_THREADS) {
    const PackedBlock block = read_block(codes, scales, b);
    if (b < ROW_THREADS)
      first = block;
    if (block.finite && !all_zero(block.codes))
      largest_e = max(largest_e, block.e);
  }
  const int scale_exponent = max_over_row_threads(largest_e, warp_max) - E4M3_TOP;

  for (int64_t b = threadIdx.x; b < blocks; b += ROW_THREADS) {
    const PackedBlock block = b < ROW_THREADS ? first : read_block(codes, scales, b);
    uint32_t words[8];
    e2m1_to_fp8<false>(block.codes, block.e - scale_exponent, block.finite, words);
    for (int i = 0; i < 2; i++)
      fp8[2 * b + i] =
          make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
  if (threadIdx.x == 0)
    row_scales[blockIdx.x] = ldexpf(alpha, scale_exponent);
}

// A CUDA block takes a tile, and a thread takes one of its 512 blocks of 32.
template <bool right>
__global__ void __launch_bounds__(TILE_THREADS) tiles_kernel(
    const uint8_t* __restrict__ codes,          // [M, 16 * blocks]
    const uint8_t* __restrict__ scales,         // [M, blocks]
    int64_t M,
    int64_t blocks,                             // of 32 in a row
    uint4* values,                              // [ceil(M/128), ceil(K/128), TILE_CHUNKS]
    float* tile_scales) {                       // left: [.., .., 128], right: [.., .., 4]
  __shared__ int warp_max[TILE_THREADS / 32];
  const int tile_row = threadIdx.x / 4;
  const int64_t row = int64_t(blockIdx.x) * TILE_SIDE + tile_row;
  const int64_t column = int64_t(blockIdx.y) * 4 + threadIdx.x % 4;         // in blocks
  const int64_t tile = int64_t(blockIdx.x) * gridDim.y + blockIdx.y;
  const bool inside = row < M && column < blocks;
  const PackedBlock zeros = {{}, 0, true};
  const PackedBlock block = inside ? read_block(codes, scales, row * blocks + column) : zeros;
  packed_to_fp8_block<right>(
      block.codes, block.e, block.finite, tile_row, tile, values, tile_scales, warp_max);
}

}  // namespace

void packed_to_fp8_rows(
    const uint8_t* codes,           // [M, K/2]
    const uint8_t* scales,          // [M, K/32]
    int64_t M,
    int64_t K,
    float alpha,
    uint8_t* fp8,                   // [M, K]
    float* row_scales,              // [M]
    void* stream) {
  if (!M)
    return;
  rows_kernel<<<unsigned(M), ROW_THREADS, 0, (cudaStream_t)stream>>>(
      codes, scales, K / 32, alpha, (uint4*)fp8, row_scales);
}

void packed_to_fp8_tiles(
    const uint8_t* codes,           // [M, K/2]
    const uint8_t* scales,          // [M, K/32]
    int64_t M,
    int64_t K,
    bool right,                     // the right operand of a product, or the left one
    void* values,
    float* tile_scales,
    void* stream) {
  if (!M || !K)
    return;
  const dim3 grid(unsigned(ceil_div(M, TILE_SIDE)), unsigned(ceil_div(K, TILE_SIDE)));
  const auto kernel = right ? tiles_kernel<true> : tiles_kernel<false>;
  kernel<<<grid, TILE_THREADS, 0, (cudaStream_t)stream>>>(
      codes, scales, M, K / 32, (uint4*)values, tile_scales);
}
