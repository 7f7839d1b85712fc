/*
The arithmetic of MXFP4 and of Quartet's quantisers. The CPU's kernels (cpu.cpp) and every GPU
kernel include this file, so that a value is rotated and scaled by the same code everywhere. The
GPU's quantisers round with fewer instructions (round.cuh), to the same codes.

The functions are those of reference.py, which is the definition, on W blocks of 32 values side by
side: v[i][w] is element i of block w. A CUDA thread owns one block, W = 1. On a CPU W is 16, so
that the loops over w, which are marked LANES, become vector instructions.

The bytes that result must be those of reference.py. So the operations are the same, in the same
order, and no compiler may fuse a multiplication with an addition, because a fused multiply-add
rounds once where the reference rounds twice: compile with -ffp-contract=off (g++) or -fmad=false
(nvcc).

This file calls neither CUDA nor torch.
*/
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define LANES  // A CUDA thread has one lane.
#else
#define HOST_DEVICE inline
#define UNROLL  // Unrolling makes g++ take a minute longer and gains nothing.
// Tells a CPU's compiler (-fopenmp-simd) that the passes of a loop do not depend on one another. By
// itself g++ cannot see that two rows of a block differ, and computes one of the 16 after another.
#define LANES _Pragma("omp simd")
#endif

namespace mxfp4 {

template <int W>
using Block = float[32][W];

HOST_DEVICE int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

// ---- the bits of a float
//
// A float32 is a sign bit, 8 bits of exponent and 23 bits of mantissa. Its value is
// +-1.mantissa * 2^(exponent - 127). Exponent 255 marks Inf and NaN; exponent 0 marks 0 and the
// subnormal numbers, whose mantissa has no leading 1.

constexpr uint32_t MAGNITUDE_BITS = 0x7FFFFFFFu;
constexpr uint32_t EXPONENT_BITS = 0x7F800000u;
constexpr uint32_t MANTISSA_BITS = 0x007FFFFFu;
constexpr uint32_t BITS_OF_1 = 0x3F800000u;
constexpr uint32_t BITS_OF_NAN = 0x7FC00000u;

HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// 2^e for e in [-127, 127]. The smallest of them, 2^-127, is subnormal.
HOST_DEVICE float pow2(int e) {
  const uint32_t bits = e > -127 ? uint32_t(e + 127) << 23 : 0x400000u;
  return float_of(bits);
}

// floor(log2 x) of a normal x > 0
HOST_DEVICE int exponent(float x) { return int((bits_of(x) >> 23) & 255) - 127; }

HOST_DEVICE bool is_finite(float x) { return ((bits_of(x) >> 23) & 255) != 255; }

// ---- loading and storing float32 and bfloat16

// The upper half of a float32. CUDA has a type of its own, which a CPU's compiler does not know.
struct bfloat16 {
  uint16_t bits;
};

HOST_DEVICE float to_float(float x) { return x; }

HOST_DEVICE float to_float(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }

HOST_DEVICE void store_float(float& to, float x) { to = x; }

// Rounds to nearest, ties to even: adding just under half of the last place that is kept carries
// into that place when the cut part is more than a half. In a tie it carries only if the place is
// odd.
HOST_DEVICE void store_float(bfloat16& to, float x) {
  const uint32_t bits = bits_of(x);
  const bool is_nan = x != x;
  to.bits = is_nan ? BITS_OF_NAN >> 16 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// ---- rotating a block
//
// A block is multiplied by the 32 x 32 Hadamard matrix, whose entries are all +-1 / sqrt(32).
// That spreads an outlier over the 32 values and makes them look Gaussian, which suits the few
// levels of E2M1. The matrix is symmetric and its own inverse.

// 32^-0.5: with this factor the rotation keeps the length of a vector.
constexpr float HADAMARD_NORM = 0.17677669529663687f;

// If bit i of `signs` is set, element i of each block is negated.
template <int W>
HOST_DEVICE void apply_signs(Block<W>& v, uint32_t signs) {
  UNROLL for (int i = 0; i < 32; i++) {
    const bool is_negated = (signs >> i) & 1;
    const float sign = is_negated ? -1 : 1;
    LANES for (int w = 0; w < W; w++)
      v[i][w] *= sign;
  }
}

// One stage of the butterfly. The product with a Hadamard matrix does not need 32 * 32
// multiplications: it factors into five stages, and each of them replaces 16 pairs (a, b) by
// (a + b, a - b). The two elements of a pair are 1 apart in stage 0, then 2, 4, 8, and 16 apart in
// stage 4.
template <int W>
HOST_DEVICE void butterfly_stage(Block<W>& v, int stage) {
  const int stride = 1 << stage;
  UNROLL for (int pair = 0; pair < 16; pair++) {
    // The pairs lie in groups of `stride`. A group takes up 2 * stride elements: first the left
    // partners of its pairs, then their right partners.
    const int group = pair >> stage;
    const int offset = pair & (stride - 1);
    const int left = (group << (stage + 1)) | offset;
    const int right = left + stride;
    LANES for (int w = 0; w < W; w++) {
      const float a = v[left][w];
      const float b = v[right][w];
      v[left][w] = a + b;
      v[right][w] = a - b;
    }
  }
}

// Rotates the blocks. Another `scale` than the norm multiplies them by a factor at no cost.
template <int W>
HOST_DEVICE void hadamard(Block<W>& v, float scale = HADAMARD_NORM) {
  UNROLL for (int stage = 0; stage < 5; stage++)
    butterfly_stage(v, stage);
  UNROLL for (int i = 0; i < 32; i++)
    LANES for (int w = 0; w < W; w++)
      v[i][w] *= scale;
}

// The largest magnitude of each block. Magnitudes are not negative, so that their bits can be
// compared as integers: there, NaN is larger than everything and is not lost.
template <int W>
HOST_DEVICE void max_magnitude(const Block<W>& v, float (&largest)[W]) {
  int32_t top[W] = {};
  UNROLL for (int i = 0; i < 32; i++)
    LANES for (int w = 0; w < W; w++) {
      const int32_t magnitude = bits_of(fabsf(v[i][w]));
      top[w] = magnitude > top[w] ? magnitude : top[w];
    }
  LANES for (int w = 0; w < W; w++)
    largest[w] = float_of(top[w]);
}

// Rotates the blocks and finds the largest magnitude of each of the results. The last stage makes a
// + b and a - b of a and b; the larger magnitude of the two is |a| + |b|, rounding included, so
// that 16 additions and 16 comparisons before that stage replace 32 comparisons after it. There
// they need not wait for its results.
template <int W>
HOST_DEVICE void hadamard(Block<W>& v, float (&largest)[W]) {
  UNROLL for (int stage = 0; stage < 4; stage++)
    butterfly_stage(v, stage);
  int32_t top[W] = {};
  UNROLL for (int i = 0; i < 16; i++)
    LANES for (int w = 0; w < W; w++) {
      const int32_t sum = bits_of(fabsf(v[i][w]) + fabsf(v[i + 16][w]));
      top[w] = sum > top[w] ? sum : top[w];
    }
  butterfly_stage(v, 4);
  UNROLL for (int i = 0; i < 32; i++)
    LANES for (int w = 0; w < W; w++)
      v[i][w] *= HADAMARD_NORM;
  LANES for (int w = 0; w < W; w++)
    largest[w] = float_of(top[w]) * HADAMARD_NORM;
}

// ---- the scale of a block, as an exponent of two

HOST_DEVICE int clamp_exponent(int e) {
  const int at_most_127 = e > 127 ? 127 : e;
  return at_most_127 < -127 ? -127 : at_most_127;
}

// Leaves the sum of each block in v[0] and destroys the rest. The sum is a tree with the strides
// of the butterfly, because the order of the additions decides how it is rounded.
template <int W>
HOST_DEVICE void sum_in_place(Block<W>& v) {
  UNROLL for (int stride = 1; stride < 32; stride *= 2)
    UNROLL for (int i = 0; i < 32; i += 2 * stride)
      LANES for (int w = 0; w < W; w++)
        v[i][w] += v[i + stride][w];
}

// The scale of QuEST (paper section 4.3), not yet rounded to a power of two. A rotated block is
// nearly Gaussian, and for a Gaussian the scale with the least squared error is a constant times
// the standard deviation. The constant is 2.92247856 / 6: the largest E2M1 value, 6, then stands
// for 2.92 standard deviations, and what lies beyond is clipped. The small addend keeps the scale
// of a zero block positive.
template <int W>
HOST_DEVICE void quest_scale(const Block<W>& v, float (&scale)[W]) {
  Block<W> sum;
  Block<W> sum_of_squares;
  UNROLL for (int i = 0; i < 32; i++)
    LANES for (int w = 0; w < W; w++) {
      sum[i][w] = v[i][w];
      sum_of_squares[i][w] = v[i][w] * v[i][w];
    }
  sum_in_place(sum);
  sum_in_place(sum_of_squares);
  LANES for (int w = 0; w < W; w++) {
    const float mean = sum[0][w] / 32;
    const float mean_square = sum_of_squares[0][w] / 32;
    float variance = mean_square - mean * mean;
    // Rounding can leave it a little below 0. fmaxf would turn NaN into 0, and NaN must stay.
    variance = variance < 0 ? 0 : variance;
    scale[w] = sqrtf(variance) * float(2.92247856 / 6) + 1e-8f;
  }
}

// The exponent of the power of two below the scale, or of the nearest one in the sense of log2:
// that is the next higher one if the mantissa is above sqrt(2).
HOST_DEVICE int quest_exponent(float scale, bool nearest) {
  const uint32_t mantissa_bits = bits_of(scale) & MANTISSA_BITS;
  const float mantissa = float_of(mantissa_bits | BITS_OF_1);  // in [1, 2)
  const int below = exponent(scale);
  const bool rounds_up = nearest && mantissa > 1.41421356f;
  return clamp_exponent(below + rounds_up);
}

// The exponent e of the backward quantiser: the largest magnitude divided by 2^e lies in [4, 8).
// After a factor of 3/4 it lies in [3, 6), within the range of E2M1, so that nothing clips. A
// block of zeros gets 0.
HOST_DEVICE int absmax_exponent(float largest) {
  return largest == 0 ? 0 : clamp_exponent(exponent(largest) - 2);
}

// ---- rounding u, a value divided by its scale, to a code of E2M1
//
// A code has 4 bits: bit 3 is the sign, and the others stand for 0, .5, 1, 1.5, 2, 3, 4 or 6.

// The sign of u, in the place where a code has it.
HOST_DEVICE int sign_bit(float u) { return (bits_of(u) >> 28) & 8; }

// What both ways of rounding need of u. They let the floating-point adder do the rounding.
//
// Let a be the magnitude of u, and p the power of two below a, or 1 if a is less than 1. The grid
// of E2M1 has its points p/2 apart there: 0, .5, 1, 1.5 for p = 1, then 2, 3 for p = 2, and 4, 6
// for p = 4. Float32 numbers have 23 bits of mantissa, so that those from 2^22 p on are p/2 apart
// as well. So the adder, when it rounds the sum a + 1.5 * 2^22 * p to a float32, rounds a to the
// grid of E2M1: to nearest, with ties to even. (The factor 1.5 puts the sum in the middle of an
// octave. The constant is an even number of steps, so that even stays even.) The bits of the sum
// minus the bits of the constant are then a, counted in steps of p/2.
//
// The code is that number plus 2 log2(p). For p = 1 there are 0 to 4 steps of .5, and the codes
// are 0 to 4. For p = 2 there are 2 to 4 steps of 1, and the codes are 4 to 6. For p = 4 there are
// 2 or 3 steps of 2, and the codes are 6 and 7.
struct Grid {
  float magnitude;  // a, at most 6: larger values saturate
  uint32_t p;       // the bits of the float p
  uint32_t magic;   // the bits of the float 1.5 * 2^22 * p
};

HOST_DEVICE Grid grid(float u) {
  const float unclipped = float_of(bits_of(u) & MAGNITUDE_BITS);
  const float magnitude = unclipped < 6 ? unclipped : 6;
  const uint32_t bits = bits_of(magnitude);
  const uint32_t at_least_1 = bits > BITS_OF_1 ? bits : BITS_OF_1;
  const uint32_t p = at_least_1 & EXPONENT_BITS;
  const uint32_t magic = p + 0x0B400000u;  // exponent + 22, mantissa 1.5
  return {magnitude, p, magic};
}

// The code of `sum` = magnitude + magic. p >> 22 is 2 (log2(p) + 127).
HOST_DEVICE int code_of_sum(const Grid& g, float sum) {
  const uint32_t steps = bits_of(sum) - g.magic;
  return int(steps + (g.p >> 22)) - 254;
}

// The nearest code, without its sign. Ties go to the even code, and what is beyond 6 becomes 6.
HOST_DEVICE int round_nearest(float u) {
  const Grid g = grid(u);
  const float sum = g.magnitude + float_of(g.magic);
  return code_of_sum(g, sum);
}

// One of the two codes around u, without its sign: the upper one with a probability equal to the
// distance from the lower one, in steps. `noise` is a random integer in [0, 256). The distance
// rounds up if it and (noise + 1/2) / 256 add up to 1 or more. Only the first sum rounds.
HOST_DEVICE int round_stochastic(float u, int noise) {
  const Grid g = grid(u);
  const float magic = float_of(g.magic);
  const float sum = g.magnitude + magic;
  const float nearest = sum - magic;
  const float rest = g.magnitude - nearest;  // within +-p/4
  const float step = .5f * float_of(g.p);
  const float threshold = step * ((255.5f - noise) / 256);
  // If rest >= 0, the nearest code is the lower one, and `rest` is the distance from it.
  // Otherwise it is the upper one, and the distance from the lower one is rest + step.
  const int code_below_nearest = code_of_sum(g, sum) - 1;
  const bool reaches_nearest = rest >= threshold - step;
  const bool passes_nearest = rest >= threshold;
  return code_below_nearest + reaches_nearest + passes_nearest;
}

// ---- from bytes back to values

// The value of a code: 0..15 -> -6..6
HOST_DEVICE float e2m1_value(int code) {
#ifdef __CUDA_ARCH__
  // E2M1 is a float32 with few bits, subnormal numbers included. So its bits are put where a
  // float32 has exponent and mantissa; the factor makes up for the exponents' biases, 127 and 1.
  const uint32_t magnitude = uint32_t(code & 7) << 22;
  const uint32_t sign = uint32_t(code & 8) << 28;
  return float_of(magnitude | sign) * 0x1p126f;
#else
  // A CPU computes the same from integers, because its subnormal numbers are slow.
  const int exponent_bits = (code >> 1) & 3;
  const int mantissa_bit = code & 1;
  const int is_normal = exponent_bits > 0;
  const int halves = (2 * is_normal + mantissa_bit) << (exponent_bits - is_normal);
  const float magnitude = .5f * halves;
  const uint32_t sign = uint32_t(code & 8) << 28;
  return float_of(bits_of(magnitude) | sign);
#endif
}

// The value of a scale byte. 255 stands for NaN.
HOST_DEVICE float e8m0_value(uint8_t byte) {
  const float nan = float_of(BITS_OF_NAN);
  return byte == 255 ? nan : pow2(byte - 127);
}

// ---- random bytes for stochastic rounding

// Call number i of Philox4x32-10 (Salmon et al., SC'11) under a seed: 4 random words. This
// generator has no state. It scrambles a counter, here i, under a key, here the seed, in ten
// rounds of multiplications, so that any thread can compute the noise of its elements alone, and
// a CPU finds the same as a GPU. Element n of a tensor gets byte n % 16 of call n / 16.
HOST_DEVICE void philox(uint64_t seed, uint64_t i, uint32_t (&words)[4]) {
  uint32_t key0 = uint32_t(seed);
  uint32_t key1 = uint32_t(seed >> 32);
  words[0] = uint32_t(i);
  words[1] = uint32_t(i >> 32);
  words[2] = 0;
  words[3] = 0;
  UNROLL for (int round = 0; round < 10; round++) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * words[0];
    const uint64_t product1 = uint64_t(0xCD9E8D57u) * words[2];
    words[0] = uint32_t(product1 >> 32) ^ words[1] ^ key0;
    words[1] = uint32_t(product1);
    words[2] = uint32_t(product0 >> 32) ^ words[3] ^ key1;
    words[3] = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace mxfp4
