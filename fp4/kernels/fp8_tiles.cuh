/*
The operand format of gemm_sm90.cu: FP8 tiles. A matrix [M, K] becomes [ceil(M/128), ceil(K/128)] tiles of 128 x 128 bytes,
each in the order in which Hopper's tensor cores read shared memory (the 16-byte chunks of row r are permuted by r % 8: the
"128-byte swizzle"), so that one copy of 16 KB, without a descriptor, brings a tile in. What lies beyond M and K is zero.

A block's scale moves into the FP8 values, 2^s * E2M1 without rounding, all but what neighbours have in common: a float32 scale,
a power of two. The largest exponent of the neighbours gets the largest s; a block so much smaller that its s falls out of the
window rounds. All-zero blocks do not count.

             FP8     s                a scale for            scales
    left     E4M3    -8 .. 6          128 of a row           [ceil(M/128), ceil(K/128), 128]
    right    E5M2    -15 .. 13        128 of 32 rows         [ceil(M/128), ceil(K/128), 4]

Threads t .. t + 3 own a line's four blocks of 32, and 128 neighbouring threads own 32 lines.
*/
#pragma once
#include "cuda.cuh"

constexpr int SIDE = 128;                                     // rows, and bytes a row
constexpr int E4M3_TOP = 6, E5M2_TOP = 13;                    // the largest s
constexpr int NONE = -1000;                                   // the exponent of a block that does not count

// waits for the 128 neighbouring threads alone
__device__ inline void sync128() {
#ifdef __CUDA_ARCH__
  asm volatile("bar.sync %0, 128;" :: "r"(1 + threadIdx.x / 128) : "memory");
#else
  __syncthreads();
#endif
}

// e, the exponent of this thread's block -> that of the scale it shares. tops: shared memory, an int a warp, for a right operand
template <bool right> __device__ int shared_scale(int e, int* tops) {
  if (right) {
    const int warp = threadIdx.x / 32;
    for (int i = 16; i; i /= 2) e = max(e, __shfl_xor_sync(~0u, e, i));
    if (threadIdx.x % 32 == 0) tops[warp] = e;
    sync128();
    for (int i = 0; i < 4; i++) e = max(e, tops[warp / 4 * 4 + i]);
  } else {
    for (int i = 1; i < 4; i *= 2) e = max(e, __shfl_xor_sync(~0u, e, i));
  }
  return max(e, -112) - (right ? E5M2_TOP : E4M3_TOP);        // a scale must be a normal number
}

// 32 bytes of FP8 and the scale -> part 0 .. 3 of line 0 .. 127 of a tile. `together`: neighbouring threads exchange 16 bytes first, so
// that each store of the two fills a sector of memory, 32 bytes, instead of half of two. Where instructions bound a kernel it costs more
template <bool right, bool together>
__device__ void store_line(uint32_t (&word)[8], int line, int part, int scale, int64_t tile, uint4* values, float* scales) {
  const int odd = together ? part & 1 : 0;
  if (together) UNROLL for (int j = 0; j < 4; j++) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? word[j] : word[4 + j], 1);
    odd ? word[j] = other : word[4 + j] = other;
  }
  for (int i = 0; i < 2; i++) {                               // chunk c of row r lies at c ^ r % 8
    const int chunk = together ? 2 * (part - odd + i) + odd : 2 * part + i;
    values[tile * (SIDE * 8) + line * 8 + (chunk ^ (line & 7))] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
  }
  if (part == 0 && !right) scales[tile * SIDE + line] = pow2(scale);
  if (part == 0 && right && line % 32 == 0) scales[tile * 4 + line / 32] = pow2(scale);
}

// 32 codes -> 32 bytes of 2^s E2M1: the 8 magnitudes are a table in two registers, and a code's low 3 bits select from it
template <bool e5m2> __device__ void expand(const uint4& q, int s, bool ok, uint32_t (&word)[8]) {
  const float unit = pow2(max(s, -60));
  const uint32_t small = fp8x4<e5m2>(0, .5f * unit, unit, 1.5f * unit), large = fp8x4<e5m2>(2 * unit, 3 * unit, 4 * unit, 6 * unit);
  const uint32_t code[4] = {q.x, q.y, q.z, q.w};
  UNROLL for (int i = 0; i < 8; i++) {
    const uint32_t four = code[i / 2] >> 16 * (i % 2), signs = __byte_perm(four, 0, 0x1100);
    word[i] = __byte_perm(small, large, four & 0x7777u) | (signs << 4 & 0x00800080u) | (signs & 0x80008000u);
    if (!ok) word[i] = 0x7F7F7F7Fu;                           // NaN
  }
}

__device__ inline bool all_zero(const uint4& q) { return ((q.x | q.y | q.z | q.w) & 0x77777777u) == 0; }

// a packed block: codes q, 2^e; all NaN if not ok -> its part of a tile
template <bool right> __device__ void fold_block(const uint4& q, int e, bool ok, int line, int64_t tile, uint4* values, float* scales, int* tops) {
  const int scale = shared_scale<right>(ok && !all_zero(q) ? e : NONE, tops);
  uint32_t word[8];
  expand<right>(q, e - scale, ok, word);
  store_line<right, true>(word, line, threadIdx.x % 4, scale, tile, values, scales);
}
