/*
Packed -> FP8 for a library's product, exactly: 2^s * E2M1 is E4M3 without rounding for s in [-8, 6], so that a block's scale
moves into the values, all but the row's largest, which becomes the row's scale. A block more than 14 octaves below the largest
of its row rounds. All-zero blocks do not count: their scale byte says nothing.
*/
#include "cuda.cuh"
#include "ops.h"
#include "tiles.cuh"

namespace {

constexpr int THREADS = 128;

struct Codes { uint4 q; int exponent; bool nan; };                         // exponent + 128; 0 for a block that does not count

__device__ Codes read(const uint8_t* codes, const uint8_t* scales, int64_t block) {
  const uint4 q = reinterpret_cast<const uint4*>(codes)[block];
  const int byte = scales[block];
  const bool zero = ((q.x | q.y | q.z | q.w) & 0x77777777u) == 0;
  return {q, zero || byte == 255 ? 0 : byte + 1, byte == 255};
}

// 32 codes -> 32 bytes of 2^s E2M1: the 8 magnitudes are a table in two registers, and a code's low 3 bits select from it
__device__ void expand(const Codes& block, int top, uint4* out) {
  const float s = pow2(max(block.exponent - top, -60) + LEFT);
  const uint32_t small = fp8x4<false>(0, .5f * s, s, 1.5f * s), large = fp8x4<false>(2 * s, 3 * s, 4 * s, 6 * s);
  const uint32_t code[4] = {block.q.x, block.q.y, block.q.z, block.q.w};
  uint32_t word[8];
  UNROLL for (int i = 0; i < 8; i++) {
    const uint32_t four = code[i / 2] >> 16 * (i % 2), signs = __byte_perm(four, 0, 0x1100);
    word[i] = __byte_perm(small, large, four & 0x7777u) | (signs << 4 & 0x00800080u) | (signs & 0x80008000u);
    if (block.nan) word[i] = 0x7F7F7F7Fu;
  }
  out[0] = make_uint4(word[0], word[1], word[2], word[3]), out[1] = make_uint4(word[4], word[5], word[6], word[7]);
}

// a CUDA block takes a row; a thread keeps its first block and reads the others, of a long row, again
__global__ void __launch_bounds__(THREADS) fold_kernel(const uint8_t* __restrict__ codes, const uint8_t* __restrict__ scales, int64_t blocks,
                                                       float alpha, uint8_t* __restrict__ fp8, float* __restrict__ row_scales) {
  __shared__ int tops[THREADS / 32];
  codes += blockIdx.x * blocks * 16, scales += blockIdx.x * blocks, fp8 += blockIdx.x * blocks * 32;
  Codes first = {};
  int top = 16;                                                            // 2^-112 at least: a scale must be a normal number
  for (int64_t b = threadIdx.x; b < blocks; b += THREADS) {
    const Codes block = read(codes, scales, b);
    if (b < THREADS) first = block;
    top = max(top, block.exponent);
  }
  for (int i = 16; i; i /= 2) top = max(top, __shfl_xor_sync(~0u, top, i));
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
  for (int64_t b = threadIdx.x; b < blocks; b += THREADS)
    expand(b < THREADS ? first : read(codes, scales, b), top, reinterpret_cast<uint4*>(fp8) + 2 * b);
  if (threadIdx.x == 0) row_scales[blockIdx.x] = ldexpf(alpha, top - 128 - LEFT);
}

}  // namespace

void fold(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, float alpha, uint8_t* fp8, float* row_scales, void* stream) {
  if (M) fold_kernel<<<unsigned(M), THREADS, 0, (cudaStream_t)stream>>>(codes, scales, K / 32, alpha, fp8, row_scales);
}
