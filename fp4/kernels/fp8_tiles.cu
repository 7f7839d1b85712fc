/*
Packed -> FP8 for a product, exactly: 2^s * E2M1 is FP8 without rounding over a window of s (tiles.cuh), so that a block's scale
moves into the values, all but the largest of its neighbours, which becomes their scale. A block that falls out of the window
rounds. All-zero blocks do not count: their scale byte says nothing.

    fold         for a library's product: E4M3 [M, K], a scale a row; alpha goes into it
    fold_tiles   for gemm_sm90.cu
*/
#include "ops.h"
#include "tiles.cuh"

namespace {

constexpr int THREADS = 128, TILE_THREADS = 4 * SIDE;

struct Codes { uint4 q; int e; bool ok; };

__device__ Codes read(const uint8_t* codes, const uint8_t* scales, int64_t block) {
  const int byte = scales[block];
  return {reinterpret_cast<const uint4*>(codes)[block], byte - 127, byte != 255};
}

// a CUDA block takes a row; a thread keeps its first block and reads the others, of a long row, again
__global__ void __launch_bounds__(THREADS) fold_kernel(const uint8_t* __restrict__ codes, const uint8_t* __restrict__ scales, int64_t blocks,
                                                       float alpha, uint4* __restrict__ fp8, float* __restrict__ row_scales) {
  __shared__ int tops[THREADS / 32];
  codes += blockIdx.x * blocks * 16, scales += blockIdx.x * blocks, fp8 += blockIdx.x * blocks * 2;
  Codes first = {};
  int top = -112;                                                          // a scale must be a normal number
  for (int64_t b = threadIdx.x; b < blocks; b += THREADS) {
    const Codes c = read(codes, scales, b);
    if (b < THREADS) first = c;
    if (c.ok && !all_zero(c.q)) top = max(top, c.e);
  }
  for (int i = 16; i; i /= 2) top = max(top, __shfl_xor_sync(~0u, top, i));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  const int scale = max(max(tops[0], tops[1]), max(tops[2], tops[3])) - E4M3_TOP;
  for (int64_t b = threadIdx.x; b < blocks; b += THREADS) {
    const Codes c = b < THREADS ? first : read(codes, scales, b);
    uint32_t word[8];
    expand<false>(c.q, c.e - scale, c.ok, word);
    for (int i = 0; i < 2; i++) fp8[2 * b + i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
  }
  if (threadIdx.x == 0) row_scales[blockIdx.x] = ldexpf(alpha, scale);
}

// a CUDA block takes a tile, a thread one of its 512 blocks of 32
template <bool right>
__global__ void __launch_bounds__(TILE_THREADS) fold_tiles_kernel(const uint8_t* __restrict__ codes, const uint8_t* __restrict__ scales,
                                                                  int64_t M, int64_t blocks, uint4* values, float* tile_scales) {
  __shared__ int tops[TILE_THREADS / 32];
  const int line = threadIdx.x / 4;
  const int64_t row = int64_t(blockIdx.x) * SIDE + line, at = int64_t(blockIdx.y) * 4 + threadIdx.x % 4;
  const Codes c = row < M && at < blocks ? read(codes, scales, row * blocks + at) : Codes{{}, 0, true};
  fold_block<right>(c.q, c.e, c.ok, line, int64_t(blockIdx.x) * gridDim.y + blockIdx.y, values, tile_scales, tops);
}

}  // namespace

void fold(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, float alpha, uint8_t* fp8, float* row_scales, void* stream) {
  if (M) fold_kernel<<<unsigned(M), THREADS, 0, (cudaStream_t)stream>>>(codes, scales, K / 32, alpha, (uint4*)fp8, row_scales);
}

void fold_tiles(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, bool right, void* values, float* tile_scales, void* stream) {
  if (!M || !K) return;
  const dim3 grid(unsigned(ceil_div(M, SIDE)), unsigned(ceil_div(K, SIDE)));
  (right ? fold_tiles_kernel<true> : fold_tiles_kernel<false>)<<<grid, TILE_THREADS, 0, (cudaStream_t)stream>>>(
      codes, scales, M, K / 32, (uint4*)values, tile_scales);
}
