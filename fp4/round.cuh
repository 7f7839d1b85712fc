/*
Rounding to E2M1: an element, a block of 32 in registers, and its 16 bytes of codes. Blackwell has an instruction for it
(the 'a' targets: compute capability 10 and 12), which test_blackwell.py compares with the definition for every BF16.
*/
#pragma once
#include <cuda_fp16.h>
#include "cuda.cuh"

#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH__ >= 1000
constexpr bool CONVERTS = true;                                            // nibbles() rounds
#else
constexpr bool CONVERTS = false;
#endif
constexpr float UNIT = CONVERTS ? 1 : 0x1p-14f;                            // what is 1 in E2M1 when the codes are made

// ---- an element: w -> the nearest unit * E2M1, unit a power of two, |w| <= 6 units. With p the power of two below |w|, at
// least the unit, the grid's neighbours of w are p/2 apart, and so are floats at 2^22 p: one addition rounds, one takes
// 2^22 p away again. To round stochastically, add a random part of p/2 and round towards zero

__device__ inline float power(float w, float unit) {                       // p, with the sign of w
  float p;
#if __CUDA_ARCH__ >= 860
  asm("max.xorsign.abs.f32 %0, %1, %2;" : "=f"(p) : "f"(w), "f"(unit));
#else
  p = copysignf(fmaxf(fabsf(w), unit), w);
#endif
  return float_of(bits_of(p) & 0xFF800000u);
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

__device__ inline float nearest(float w, float unit) {
  const float p = power(w, unit);
  return __fmaf_rn(p, -0x1p22f, __fmaf_rn(p, 0x1p22f, w));
}

__device__ inline float stochastic(float w, float unit, uint32_t noise, int byte) {
  const float one = float_of(__byte_perm(noise, 0x3F800000u, 0x7604 | byte << 4));       // 1 + noise / 2^15
  const float part = __fmaf_rn(one, 64, -64 + 0x1p-10f);                                 // (noise + 1/2) / 512
  const float p = power(w, unit);
  return __fmaf_rn(p, -0x1p22f, __fmaf_rz(p, 0x1p22f, __fmaf_rz(p, part, w)));
}

// v * factor, rounded; a 0 has the right sign if it is to be a code, not if it is to be multiplied
template <bool codes, bool random> __device__ void round_block(Vector& v, float factor, float unit, uint64_t seed, int64_t block) {
  uint32_t noise[2][4];
  if (random) philox(seed, 2 * block, noise[0]), philox(seed, 2 * block + 1, noise[1]);
  UNROLL for (int i = 0; i < 32; i++) {
    const float w = v[i][0] * factor;
    if (CONVERTS && codes && !random) { v[i][0] = w; continue; }
    const float r = random ? stochastic(w, unit, noise[i / 16][i / 4 % 4], i % 4) : nearest(w, unit);
    v[i][0] = codes ? signed_as(w, r) : r;
  }
}

// ---- 32 values -> 16 bytes of codes

#if defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH__ >= 1000

__device__ inline uint4 nibbles(const Vector& r) {                         // rounds, to nearest, ties to even; |r| > 6 is 6
  uint32_t word[4];
  UNROLL for (int j = 0; j < 4; j++) {
    const float(*v)[1] = r + 8 * j;
    asm("{ .reg .b8 a, b, c, d;\n"
        "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
        "mov.b32 %0, {a, b, c, d}; }"
        : "=r"(word[j]) : "f"(v[0][0]), "f"(v[1][0]), "f"(v[2][0]), "f"(v[3][0]), "f"(v[4][0]), "f"(v[5][0]), "f"(v[6][0]), "f"(v[7][0]));
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

#else                                                                      // of rounded values. UNIT * E2M1 as FP16 has the code
                                                                           // in bits 9 to 11, the sign in 15: the upper byte
__device__ inline uint32_t halves(float a, float b) { const __half2 h = __floats2half2_rn(a, b); uint32_t u; memcpy(&u, &h, 4); return u; }
__device__ inline uint32_t select(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

__device__ inline uint4 nibbles(const Vector& r) {
  uint32_t word[4];
  UNROLL for (int j = 0; j < 4; j++) {
    const float(*v)[1] = r + 8 * j;
    const uint32_t even = __byte_perm(halves(v[0][0], v[2][0]), halves(v[4][0], v[6][0]), 0x7531);
    const uint32_t odd = __byte_perm(halves(v[1][0], v[3][0]), halves(v[5][0], v[7][0]), 0x7531);
    const uint32_t low = select(0x07070707u, even >> 1, even >> 4), high = select(0x70707070u, odd << 3, odd);
    word[j] = select(0x0F0F0F0Fu, low, high);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

#endif
