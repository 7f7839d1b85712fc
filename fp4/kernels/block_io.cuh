/*
A block of 32 on its way between memory and the registers of one thread.
*/
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include "mxfp4.cuh"

using namespace mxfp4;
using Vector = Block<1>;                                                   // v[i][0]

// ---- 32 values of memory <-> registers, 16 bytes at a time, with the sign of value i changed where bit 31 of flip[i], no other, is set

struct Same { __device__ uint32_t operator[](int) const { return 0; } };

__device__ inline float flipped(float x, uint32_t sign) { return float_of(bits_of(x) ^ sign); }

template <class Flip = Same> __device__ void load(const bfloat16* x, Vector& v, Flip flip = {}) {
  UNROLL for (int i = 0; i < 4; i++) {
    const uint4 q = reinterpret_cast<const uint4*>(x)[i];
    const uint32_t pair[4] = {q.x, q.y, q.z, q.w};
    UNROLL for (int j = 0; j < 4; j++) {
      const int n = 8 * i + 2 * j;
      v[n][0] = float_of(pair[j] * 65536u + flip[n]), v[n + 1][0] = float_of((pair[j] & 0xFFFF0000u) ^ flip[n + 1]);
    }
  }
}

template <class Flip = Same> __device__ void load(const float* x, Vector& v, Flip flip = {}) {
  UNROLL for (int i = 0; i < 8; i++) {
    const float4 q = reinterpret_cast<const float4*>(x)[i];
    v[4 * i][0] = flipped(q.x, flip[4 * i]), v[4 * i + 1][0] = flipped(q.y, flip[4 * i + 1]);
    v[4 * i + 2][0] = flipped(q.z, flip[4 * i + 2]), v[4 * i + 3][0] = flipped(q.w, flip[4 * i + 3]);
  }
}

// four codes, in the low half of `word`, -> E2M1 as two words of BF16. The bytes of BF16 come from a table: __byte_perm
__device__ inline uint2 bfloats(uint32_t word) {
  const uint32_t four = word & 0x7777u;
  const uint32_t signs = __byte_perm(word, 0, 0x1100), low = __byte_perm(0xC0800000u, 0xC0804000u, four);
  const uint32_t high = __byte_perm(0x3F3F3F00u, 0x40404040u, four) | (signs << 4 & 0x00800080u) | (signs & 0x80008000u);
  return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}

__device__ inline uint32_t bfloat2(float a, float b) { const __nv_bfloat162 h = __floats2bfloat162_rn(a, b); uint32_t u; memcpy(&u, &h, 4); return u; }
// four values -> E4M3 or E5M2
template <bool e5m2> __device__ uint32_t fp8x4(float a, float b, float c, float d) {
  constexpr __nv_fp8_interpretation_t kind = e5m2 ? __NV_E5M2 : __NV_E4M3;
  return __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, kind) |
         uint32_t(__nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, kind)) << 16;
}

__device__ inline void store(float* x, const Vector& v) {
  UNROLL for (int i = 0; i < 8; i++)
    reinterpret_cast<float4*>(x)[i] = make_float4(v[4 * i][0], v[4 * i + 1][0], v[4 * i + 2][0], v[4 * i + 3][0]);
}

__device__ inline void store(bfloat16* x, const Vector& v) {
  UNROLL for (int i = 0; i < 4; i++) {
    uint32_t q[4];
    UNROLL for (int j = 0; j < 4; j++) q[j] = bfloat2(v[8 * i + 2 * j][0], v[8 * i + 2 * j + 1][0]);
    reinterpret_cast<uint4*>(x)[i] = make_uint4(q[0], q[1], q[2], q[3]);
  }
}

// alpha times a gradient, back from the rotated basis: what clipped there gets none. A product, not a selection: NaN * 0 stays NaN
__device__ inline void unrotate(Vector& v, uint32_t inside, float alpha = 1) {
  UNROLL for (int i = 0; i < 32; i++)
    if (!(inside >> i & 1)) v[i][0] *= 0;
  hadamard(v, alpha * H);
}

// ---- the current GPU
inline int attribute(cudaDeviceAttr which) {
  int device, value;
  cudaGetDevice(&device), cudaDeviceGetAttribute(&value, which, device);
  return value;
}
inline int processors() { return attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }         // bytes a multiprocessor
