/*
The operand format of gemm_sm90.cu, which quantize.cu writes: FP8 tiles. A matrix [M, K] becomes [ceil(M/128), ceil(K/128)] tiles of 128 x 128 bytes,
each in the order in which Hopper's tensor cores read shared memory (the 16-byte chunks of row r are permuted by r % 8: the
"128-byte swizzle"), so that one copy of 16 KB, without a descriptor, brings a tile in. What lies beyond M and K is zero.

A block's scale moves into the FP8 values, 2^s * E2M1 without rounding, all but what blocks have in common: a float32 scale,
a power of two, for neighbours. Blocks out of the window of s round.

             FP8     s                a scale for                                                    scales
    left     E4M3    -8 .. 6          128 of a row: its 4 blocks' largest exponent at s = 6          [ceil(M/128), ceil(K/128), 128]
    right    E5M2    -15 .. 13        a row, from an upper bound known before: that at s = 13        [ceil(M/128), 1, 128]
*/
#pragma once

constexpr int SIDE = 128;                                     // rows, and bytes a row
constexpr int LEFT = 6, RIGHT = 13;                           // s of the largest block

// the offset of 16-byte chunk c of row r in its tile
__device__ inline int swizzle(int r, int c) { return r * SIDE + ((c ^ (r & 7)) << 4); }
