/*
Rounding to E2M1, to nearest and stochastically, in as few instructions as a GPU can do it, and the
conversion of 32 rounded values into 16 bytes of codes or 32 bytes of FP8.

The definition (reference.py) rounds an element at a time and makes an integer code of it. Here an
element costs a few float instructions instead: values are rounded as floats, then converted into
FP16, where the code of an E2M1 number can be read off as three bits in a row.
*/
#pragma once
#include <cuda_fp16.h>
#include "block_io.cuh"

// ---- one value, to nearest

// Returns the larger of the magnitudes |w| and bound, with the sign of w.
__device__ inline float at_least_in_magnitude(float w, float bound) {
#if __CUDA_ARCH__ >= 860
  asm("max.xorsign.abs.f32 %0, %0, %1;" : "+f"(w) : "f"(bound));
  return w;
#else
  return copysignf(fmaxf(fabsf(w), bound), w);
#endif
}

__device__ inline float clip(float w, float bound) {
#if __CUDA_ARCH__ >= 860
  asm("min.xorsign.abs.f32 %0, %0, %1;" : "+f"(w) : "f"(bound));
  return w;
#else
  return fminf(fmaxf(w, -bound), bound);
#endif
}

// Rounds w to the nearest value of unit * E2M1, ties to the even code. unit is a power of two, and
// |w| must be at most 6 units. A w that rounds to zero loses its sign.
//
// E2M1 has one mantissa bit. With p the largest power of two that is not above |w|, but at least
// one unit, the grid's values around w are p/2 apart. A float has 23 mantissa bits, so that the
// floats between 2^22 p and 2^23 p are p/2 apart as well. Adding 2^22 p to w would therefore round
// w to the grid, and subtracting it again would leave the rounded w.
//
// Finding p would cost instructions, but z = w, with its sign, does as well as p. The code
// subtracts instead: r = 2^22 z - w is rounded, and 2^22 z - r is the rounded w.
//   - 2^22 w is a multiple of p/2, and an even one where w is a tie, so that ties still go to the
//     even code.
//   - 2^22 w - w lies where floats are p/2 apart. (If w is hardly more than p it lies just below
//     2^22 p, where floats are p/4 apart: then w rounds to p in any case.)
// Below 1.5 units p is one unit, whatever w is, and z = 1.5 units does for it.
// For all of the 2^32 floats w, clipped to 6 units, the result has been compared with the
// definition's.
__device__ inline float round_to_grid(float w, float unit) {
  const float z = at_least_in_magnitude(w, 1.5f * unit);
  return __fmaf_rn(z, 0x1p22f, -__fmaf_rn(z, 0x1p22f, -w));
}

// Gives a rounded value the sign of w, which zero has lost.
__device__ inline float with_sign_of(float w, float rounded) {
  return float_of(bits_of(rounded) | (bits_of(w) & 0x80000000u));
}

// ---- 32 values as 16 pairs of FP16
// FP16_UNIT is 2^-14, the smallest normal FP16 number, and FP16_UNIT * E2M1 has the shape of E2M1:
//
//     E2M1                0     .5    1     1.5   2     3     4     6
//     code                0     1     2     3     4     5     6     7
//     FP16_UNIT * it      0000  0200  0400  0600  0800  0A00  0C00  0E00
//
// In both formats .5 is subnormal and 1 is the smallest normal number, and the mantissa bit stands
// next to the lowest exponent bit. So the code is in bits 9 to 11, the sign is in bit 15, and all
// other bits are 0.
//
// Of four neighbours, elements 0 and 2 share a word, and so do 1 and 3: pair i has element
// first_of_pair(i) in its lower half, and the element two further on in its upper half. This order
// suits the noise, because bytes 0 and 2 of a word can be masked out together, and bytes 1 and 3 as
// well. It also suits the codes, two of which make a byte, because even and odd elements are in
// different words.

constexpr float FP16_UNIT = 0x1p-14f;
using Fp16Pairs = uint32_t[16];

__device__ inline constexpr int first_of_pair(int i) { return i / 2 * 4 + i % 2; }

__device__ inline uint32_t pack_fp16x2(float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

__device__ inline void round_to_fp16(const Block32& v, Fp16Pairs& pairs) {
  UNROLL for (int i = 0; i < 16; i++)
    pairs[i] = pack_fp16x2(v[first_of_pair(i)][0], v[first_of_pair(i) + 2][0]);
}

// Converts a and b into FP16, rounding towards zero.
__device__ inline uint32_t truncate_to_fp16x2(float a, float b) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(b), "f"(a));
#else
  __half pair[2];
  pair[0] = __float2half_rz(a);
  pair[1] = __float2half_rz(b);
  memcpy(&bits, pair, 4);
#endif
  return bits;
}

// Rounds v * factor stochastically to FP16_UNIT * E2M1; factor contains FP16_UNIT, and noise has a
// byte for each value: byte n % 4 of word n / 4.
//
// When a value has been truncated to FP16, bits 9 to 11 are the code below it. The 9 bits below
// these say which part of the step to the next code the value has gone beyond it, in units of 2^-9.
// The definition takes the next code if this part and (noise + 1/2) / 256 are together at least 1;
// the noise is a byte. In units of 2^-9 the second summand is 2 noise + 1, an integer. So it is
// added, a carry makes the next code, even where that has another exponent, and the 9 bits are
// cleared. The conversion to FP16 has cut off less than one unit, which could not have made the sum
// reach 2^9.
__device__ inline void round_stochastically(
    const Block32& v, float factor, const uint32_t (&noise)[8][1], Fp16Pairs& pairs) {
  UNROLL for (int i = 0; i < 16; i++) {
    const uint32_t word = noise[i / 2][0];
    const uint32_t twice_noise = (i % 2 ? word >> 7 : word << 1) & 0x01FE01FEu;
    const int first = first_of_pair(i);
    const float a = v[first][0] * factor;
    const float b = v[first + 2][0] * factor;
    pairs[i] = (truncate_to_fp16x2(a, b) + (twice_noise | 0x00010001u)) & 0xFE00FE00u;
  }
}

// The same; `block` is the number of these 32 values in their tensor, which determines their noise.
__device__ inline void round_stochastically(
    const Block32& v, float factor, uint64_t seed, int64_t block, Fp16Pairs& pairs) {
  uint32_t noise[8][1];
  UNROLL for (int half = 0; half < 2; half++) {
    uint32_t words[4];
    philox(seed, 2 * block + half, words);
    UNROLL for (int j = 0; j < 4; j++)
      noise[4 * half + j][0] = words[j];
  }
  round_stochastically(v, factor, noise, pairs);
}

// FP16_UNIT * E2M1 -> E2M1, as floats
__device__ inline void from_fp16(const Fp16Pairs& pairs, Block32& v) {
  UNROLL for (int i = 0; i < 16; i++) {
    __half2 pair;
    memcpy(&pair, &pairs[i], 4);
    const float2 elements = __half22float2(pair);
    v[first_of_pair(i)][0] = elements.x / FP16_UNIT;
    v[first_of_pair(i) + 2][0] = elements.y / FP16_UNIT;
  }
}

// ---- pairs of FP16 -> 16 bytes of codes

// Takes the bits of mask from a, the others from b.
__device__ inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}

// Two codes make a byte, the even element in the low nibble. The upper byte of an FP16 value is
// S000MMM0, with S its sign and MMM its magnitude code. The upper bytes of eight elements are
// collected in two words, elements 0, 2, 4, 6 in one and 1, 3, 5, 7 in the other. Then four of them
// at a time are brought into place: the even ones as 0000SMMM, the odd ones as SMMM0000.
__device__ inline uint4 fp16_to_codes(const Fp16Pairs& pairs) {
  uint32_t words[4];
  UNROLL for (int j = 0; j < 4; j++) {
    const uint32_t even = __byte_perm(pairs[4 * j], pairs[4 * j + 2], 0x7531);
    const uint32_t odd = __byte_perm(pairs[4 * j + 1], pairs[4 * j + 3], 0x7531);
    const uint32_t low = select_bits(0x07070707u, even >> 1, even >> 4);
    const uint32_t high = select_bits(0x70707070u, odd << 3, odd);
    words[j] = select_bits(0x0F0F0F0Fu, low, high);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// ---- 32 values, to nearest -> 16 bytes of codes
// nearest_codes() rounds v * factor to NEAREST_UNIT * E2M1; factor contains NEAREST_UNIT. With
// `clips`, values above 6 units become 6; without it there must be none.
// Blackwell (the targets with an 'a') has an instruction that rounds, saturates and packs.
// test_blackwell.py compares it with the definition for every BF16 value.

#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH__ >= 1000
constexpr float NEAREST_UNIT = 1;

template <bool clips>
__device__ uint4 nearest_codes(const Block32& v, float factor) {
  uint32_t words[4];
  UNROLL for (int j = 0; j < 4; j++) {
    float w[8];
    UNROLL for (int i = 0; i < 8; i++)
      w[i] = v[8 * j + i][0] * factor;
    asm("{ .reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d}; }"
        : "=r"(words[j])
        : "f"(w[0]), "f"(w[1]), "f"(w[2]), "f"(w[3]),
          "f"(w[4]), "f"(w[5]), "f"(w[6]), "f"(w[7]));
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}
#else
constexpr float NEAREST_UNIT = FP16_UNIT;

template <bool clips>
__device__ uint4 nearest_codes(const Block32& v, float factor) {
  Block32 rounded;
  UNROLL for (int i = 0; i < 32; i++) {
    const float w = v[i][0] * factor;
    const float clipped = clips ? clip(w, 6 * FP16_UNIT) : w;
    rounded[i][0] = with_sign_of(w, round_to_grid(clipped, FP16_UNIT));
  }
  Fp16Pairs pairs;
  round_to_fp16(rounded, pairs);
  return fp16_to_codes(pairs);
}
#endif

// ---- pairs of FP16 -> FP8

// Converts two neighbouring pairs, FP16_UNIT * E2M1, into four bytes of unit * E2M1 in E4M3 or
// E5M2, in the order of the elements. It multiplies twice, since 2^14 * unit may not be an FP16
// number.
template <bool e5m2>
__device__ uint32_t fp16_to_fp8x4(uint32_t pair_02, uint32_t pair_13, float unit) {
  constexpr __nv_fp8_interpretation_t format = e5m2 ? __NV_E5M2 : __NV_E4M3;
  const __half2 to_e2m1 = __float2half2_rn(0x1p14f);
  const __half2 to_unit = __float2half2_rn(unit);
  __half2 h02;
  __half2 h13;
  memcpy(&h02, &pair_02, 4);
  memcpy(&h13, &pair_13, 4);
  h02 = __hmul2(__hmul2(h02, to_e2m1), to_unit);
  h13 = __hmul2(__hmul2(h13, to_e2m1), to_unit);
  const uint32_t bytes_02 = __nv_cvt_halfraw2_to_fp8x2(h02, __NV_SATFINITE, format);
  const uint32_t bytes_13 = __nv_cvt_halfraw2_to_fp8x2(h13, __NV_SATFINITE, format);
  return __byte_perm(bytes_02 | (bytes_13 << 16), 0, 0x3120);
}
