/*
Rounding to E2M1, to nearest and stochastically, with as few instructions as a GPU does it, and the bytes of 32 results.
*/
#pragma once
#include <cuda_fp16.h>
#include "cuda.cuh"

// ---- to nearest: w -> the nearest unit * E2M1, unit a power of two, |w| <= 6 units. With p the power of two below |w|, at
// least the unit, the grid's neighbours of w are p/2 apart, and so are floats from 2^22 p on: one addition rounds, one takes
// 2^22 p away again
__device__ inline float at_least(float w, float bound) {                   // the larger magnitude, with the sign of w
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

__device__ inline float signed_as(float w, float r) { return float_of(bits_of(r) | (bits_of(w) & 0x80000000u)); }    // r = 0 has lost its sign

// z = w does for p: 2^22 w is a multiple of p/2, an even one where w is a tie, and 2^22 w - w lies where floats are p/2 apart, or
// p/4 if w is all but p. Below 1.5 units, where p is the unit, z is 1.5 units. The definition's result for each of the 2^32 w
__device__ inline float nearest(float w, float unit) {
  const float z = at_least(w, 1.5f * unit);
  return __fmaf_rn(z, 0x1p22f, -__fmaf_rn(z, 0x1p22f, -w));
}

// ---- 32 rounded values -> 16 pairs of FP16, i and i + 2 of each four -> 16 bytes of codes

constexpr float UNIT = 0x1p-14f;                                           // UNIT * E2M1 has the code in bits 9 to 11, the sign in 15
using Pairs = uint32_t[16];

__device__ inline uint32_t pair(float a, float b) { const __half2 h = __floats2half2_rn(a, b); uint32_t u; memcpy(&u, &h, 4); return u; }
__device__ inline uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

__device__ inline void pairs(const Vector& v, Pairs& h) {
  UNROLL for (int i = 0; i < 16; i++) h[i] = pair(v[i / 2 * 4 + i % 2][0], v[i / 2 * 4 + i % 2 + 2][0]);
}

// v * factor -> UNIT * E2M1, stochastically. The 9 bits below the code are a value's part of the step to the next code: add
// 2 noise + 1, cut them off. What the conversion has cut off could not have made the sum reach 2^9
__device__ inline void stochastic(const Vector& v, float factor, uint64_t seed, int64_t block, Pairs& h) {
  uint32_t noise[2][4];
  philox(seed, 2 * block, noise[0]), philox(seed, 2 * block + 1, noise[1]);
  UNROLL for (int i = 0; i < 16; i++) {
    const uint32_t word = noise[i / 8][i / 2 % 4], twice = (i % 2 ? word >> 7 : word << 1) & 0x01FE01FEu;
    const float a = v[i / 2 * 4 + i % 2][0] * factor, b = v[i / 2 * 4 + i % 2 + 2][0] * factor;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(h[i]) : "f"(b), "f"(a));
#else
    const __half truncated[2] = {__float2half_rz(a), __float2half_rz(b)};
    memcpy(&h[i], truncated, 4);
#endif
    h[i] = (h[i] + (twice | 0x00010001u)) & 0xFE00FE00u;
  }
}

__device__ inline uint4 nibbles(const Pairs& h) {
  uint32_t word[4];
  UNROLL for (int j = 0; j < 4; j++) {
    const uint32_t even = __byte_perm(h[4 * j], h[4 * j + 2], 0x7531), odd = __byte_perm(h[4 * j + 1], h[4 * j + 3], 0x7531);
    const uint32_t low = select(0x07070707u, even >> 1, even >> 4), high = select(0x70707070u, odd << 3, odd);
    word[j] = select(0x0F0F0F0Fu, low, high);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// v * factor, where ONE stands for 1, to nearest -> 16 bytes of codes. Blackwell (the 'a' targets) has an instruction that rounds,
// saturates and packs; test_blackwell.py compares it with the definition for every BF16
#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH__ >= 1000
constexpr float ONE = 1;
template <bool clips> __device__ uint4 nearest(const Vector& v, float factor) {
  uint32_t word[4];
  UNROLL for (int j = 0; j < 4; j++) {
    float w[8];
    UNROLL for (int i = 0; i < 8; i++) w[i] = v[8 * j + i][0] * factor;
    asm("{ .reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d}; }"
        : "=r"(word[j]) : "f"(w[0]), "f"(w[1]), "f"(w[2]), "f"(w[3]), "f"(w[4]), "f"(w[5]), "f"(w[6]), "f"(w[7]));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}
#else
constexpr float ONE = UNIT;
template <bool clips> __device__ uint4 nearest(const Vector& v, float factor) {
  Vector r;
  UNROLL for (int i = 0; i < 32; i++) {
    const float w = v[i][0] * factor;
    r[i][0] = signed_as(w, nearest(clips ? clip(w, 6 * UNIT) : w, UNIT));
  }
  Pairs h;
  pairs(r, h);
  return nibbles(h);
}
#endif

// UNIT * E2M1 as two pairs of FP16, UNIT = 2^-14 -> unit * E2M1 as E4M3 or E5M2; the product needs two steps, 2^14 unit may be no FP16
template <bool e5m2> __device__ uint32_t fp8x4(uint32_t ab, uint32_t cd, float unit) {
  constexpr __nv_fp8_interpretation_t kind = e5m2 ? __NV_E5M2 : __NV_E4M3;
  const __half2 one = __float2half2_rn(0x1p14f), two = __float2half2_rn(unit);
  __half2 h[2];
  memcpy(&h[0], &ab, 4), memcpy(&h[1], &cd, 4);
  h[0] = __hmul2(__hmul2(h[0], one), two), h[1] = __hmul2(__hmul2(h[1], one), two);
  return __nv_cvt_halfraw2_to_fp8x2(h[0], __NV_SATFINITE, kind) | uint32_t(__nv_cvt_halfraw2_to_fp8x2(h[1], __NV_SATFINITE, kind)) << 16;
}
