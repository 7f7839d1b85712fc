/*
FP8 tiles, the operand format of gemm_sm90.cu: the values of an MXFP4 matrix for tensor cores that
have no FP4. They are exact but for blocks far smaller than their neighbours (see below).

Layout. A matrix [M, K] becomes [ceil(M/128), ceil(K/128)] tiles of 128 rows x 128 bytes, a byte a
value. A row is eight chunks of 16 bytes, and chunk c of row r is stored at position c ^ (r % 8).
This is the "128-byte swizzle" in which Hopper's tensor cores read shared memory: without it, the
same chunk of eight rows would lie in the same memory banks, and they would be read one after the
other. Since a tile is stored as it will be read, one plain copy of 16 KB, without a tensor map,
brings it into shared memory. Values beyond M and K are zero.

Values. An MXFP4 block is 2^e * E2M1, and its scale 2^e moves into the exponents of its values. That
is exact. E2M1 has one mantissa bit, E4M3 has three and E5M2 has two, so that 2^s * E2M1 is an FP8
number as long as .5 * 2^s is not below the smallest subnormal number (2^-9 in E4M3, 2^-16 in E5M2)
and 6 * 2^s is not above the largest number (448 and 57344). Neighbouring blocks share a float32
scale, a power of two as well, which takes the rest of the exponent: e = s + log2(scale). It is
chosen so that the block with the largest e gets the largest s. A block so much smaller that its s
falls out of the window is rounded to FP8 (fp4/window.py counts them). Blocks of zeros do not count,
since their exponent says nothing. The shared scale is at least 2^-118 on the left and 2^-125 on the
right, so that it is a normal number; a left block at 2^-127 therefore rounds even if it is the
largest, which no training run comes near.

             FP8     window of s    one scale for            scales
    left     E4M3    -8 .. 6        1 row x 128 values       [ceil(M/128), ceil(K/128), 128]
    right    E5M2    -15 .. 13      32 rows x 128 values     [ceil(M/128), ceil(K/128), 4]

Threads. Each row r of a tile has four blocks of 32, which belong to the neighbouring threads 4r ..
4r + 3. So four threads share a left operand's scale and write a row together, and 128 threads (four
warps) share a right operand's scale.
*/
#pragma once
#include "block_io.cuh"

constexpr int TILE_SIDE = 128;                  // rows, and bytes a row
constexpr int TILE_THREADS = 4 * TILE_SIDE;     // one for each block of 32 in a tile
constexpr int CHUNKS_PER_ROW = TILE_SIDE / 16;
constexpr int TILE_CHUNKS = TILE_SIDE * CHUNKS_PER_ROW;

constexpr int E4M3_TOP = 6;                     // the largest s
constexpr int E5M2_TOP = 13;
constexpr int NO_EXPONENT = -1000;              // of a block that does not count
constexpr int MIN_EXPONENT = -112;              // the scale, 2^(e - s), must be a normal number
constexpr int MIN_S = -60;                      // here, as at any smaller s, all values become 0

// Waits only for the threads of the same 128. Barrier 0 belongs to __syncthreads().
__device__ inline void sync_128_threads() {
#ifdef __CUDA_ARCH__
  asm volatile("bar.sync %0, 128;" :: "r"(1 + threadIdx.x / 128) : "memory");
#else
  __syncthreads();
#endif
}

// Returns the exponent of the scale that this thread's block, 2^e * E2M1, shares with others. All
// threads that share it must call this function. warp_max is shared memory, an int a warp, which
// only a right operand needs.
template <bool right>
__device__ int shared_scale_exponent(int e, int* warp_max) {
  if (right) {
    const int warp = threadIdx.x / 32;
    for (int i = 16; i; i /= 2)
      e = max(e, __shfl_xor_sync(~0u, e, i));
    if (threadIdx.x % 32 == 0)
      warp_max[warp] = e;
    sync_128_threads();
    for (int i = 0; i < 4; i++)
      e = max(e, warp_max[warp / 4 * 4 + i]);
  } else {
    for (int i = 1; i < 4; i *= 2)
      e = max(e, __shfl_xor_sync(~0u, e, i));
  }
  return max(e, MIN_EXPONENT) - (right ? E5M2_TOP : E4M3_TOP);
}

// Lets two neighbouring threads exchange halves of their 32 bytes, so that the first one (odd = 0)
// has chunk 0 of both and the second one (odd = 1) has chunk 1 of both.
__device__ inline void exchange_chunks(uint32_t (&words)[8], int odd) {
  UNROLL for (int j = 0; j < 4; j++) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? words[j] : words[4 + j], 1);
    if (odd)
      words[j] = received;
    else
      words[4 + j] = received;
  }
}

// Stores 32 bytes of FP8, a quarter (0 .. 3) of row tile_row (0 .. 127) of a tile, and the scale.
// A thread stores its two chunks of 16 bytes one after the other, but memory is written in sectors
// of 32 bytes. With `exchange`, neighbouring threads swap chunks first, so that each store of the
// two threads together fills a sector, instead of half of two sectors. The swap costs instructions,
// and does not pay where these bound a kernel.
template <bool right, bool exchange>
__device__ void store_tile_row(
    uint32_t (&words)[8],
    int tile_row,
    int quarter,
    int scale_exponent,
    int64_t tile,                   // its number in the matrix
    uint4* values,                  // [tiles, TILE_CHUNKS]
    float* scales) {                // left: [tiles, 128], right: [tiles, 4]
  const int odd = exchange ? quarter & 1 : 0;
  if (exchange)
    exchange_chunks(words, odd);
  for (int i = 0; i < 2; i++) {
    const int chunk = exchange ? 2 * (quarter - odd + i) + odd : 2 * quarter + i;
    const int swizzled = chunk ^ (tile_row & 7);
    values[tile * TILE_CHUNKS + tile_row * CHUNKS_PER_ROW + swizzled] =
        make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
  }
  if (quarter == 0 && !right)
    scales[tile * TILE_SIDE + tile_row] = pow2(scale_exponent);
  if (quarter == 0 && right && tile_row % 32 == 0)
    scales[tile * 4 + tile_row / 32] = pow2(scale_exponent);
}

// Converts 32 codes into 32 bytes of FP8, 2^s * E2M1, through a table of the eight magnitudes
// (block_io.cuh); into NaN unless finite.
template <bool e5m2>
__device__ void e2m1_to_fp8(const uint4& codes, int s, bool finite, uint32_t (&words)[8]) {
  const float unit = pow2(max(s, MIN_S));
  const uint32_t small = fp8x4<e5m2>(0, .5f * unit, unit, 1.5f * unit);
  const uint32_t large = fp8x4<e5m2>(2 * unit, 3 * unit, 4 * unit, 6 * unit);
  uint32_t eight_codes[4];
  memcpy(eight_codes, &codes, 16);
  UNROLL for (int i = 0; i < 8; i++) {
    const uint32_t four_codes = eight_codes[i / 2] >> (16 * (i % 2));
    words[i] = look_up_signed(four_codes, small, large);
    if (!finite)
      words[i] = 0x7F7F7F7Fu;       // NaN in E4M3 and in E5M2
  }
}

__device__ inline bool all_zero(const uint4& codes) {
  const uint32_t any = codes.x | codes.y | codes.z | codes.w;
  return (any & 0x77777777u) == 0;
}

// Converts a packed block, 2^e * codes or NaN unless finite, and stores it in its place in a tile.
template <bool right>
__device__ void packed_to_fp8_block(
    const uint4& codes,
    int e,
    bool finite,
    int tile_row,                   // 0 .. 127; the block's quarter of it is threadIdx.x % 4
    int64_t tile,
    uint4* values,                  // [tiles, TILE_CHUNKS]
    float* scales,                  // left: [tiles, 128], right: [tiles, 4]
    int* warp_max) {                // shared memory, an int a warp; nullptr for a left operand
  const int counted_e = finite && !all_zero(codes) ? e : NO_EXPONENT;
  const int scale = shared_scale_exponent<right>(counted_e, warp_max);
  uint32_t words[8];
  e2m1_to_fp8<right>(codes, e - scale, finite, words);
  store_tile_row<right, true>(words, tile_row, threadIdx.x % 4, scale, tile, values, scales);
}
