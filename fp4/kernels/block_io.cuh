/*
A block of 32 values on its way between memory and the registers of the one thread that owns it, and
the conversions of formats that happen on the way. "Block" means these 32 values, which share one
MXFP4 scale and are rotated together; a group of threads is called a "CUDA block".
*/
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include "mxfp4.cuh"

using namespace mxfp4;
using Block32 = Block<1>;               // value i is v[i][0]; mxfp4.cuh works on W blocks at a time

// ---- memory <-> registers, 16 bytes at a time
// load() can change signs on the way. flips[i] is a mask for value i: bit 31 of it negates the
// value, and its other bits must be 0.

struct NoFlips {
  __device__ uint32_t operator[](int) const { return 0; }
};

__device__ inline float xor_sign(float x, uint32_t sign) { return float_of(bits_of(x) ^ sign); }

// A BF16 value is the upper half of a float, and it lies in one half of a 32-bit word.
// For the lower half one integer multiply-add both shifts the value up and flips its sign: adding
// bit 31 to a word inverts that bit, since the carry is lost.
__device__ inline float lower_bf16(uint32_t pair, uint32_t sign) {
  return float_of(pair * 65536u + sign);
}

__device__ inline float upper_bf16(uint32_t pair, uint32_t sign) {
  return float_of((pair & 0xFFFF0000u) ^ sign);
}

template <class Flips = NoFlips>
__device__ void load(const bfloat16* x, Block32& v, Flips flips = {}) {
  UNROLL for (int i = 0; i < 4; i++) {
    const uint4 chunk = reinterpret_cast<const uint4*>(x)[i];
    uint32_t pairs[4];
    memcpy(pairs, &chunk, 16);
    UNROLL for (int j = 0; j < 4; j++) {
      const int n = 8 * i + 2 * j;
      v[n][0] = lower_bf16(pairs[j], flips[n]);
      v[n + 1][0] = upper_bf16(pairs[j], flips[n + 1]);
    }
  }
}

template <class Flips = NoFlips>
__device__ void load(const float* x, Block32& v, Flips flips = {}) {
  UNROLL for (int i = 0; i < 8; i++) {
    const float4 chunk = reinterpret_cast<const float4*>(x)[i];
    v[4 * i][0] = xor_sign(chunk.x, flips[4 * i]);
    v[4 * i + 1][0] = xor_sign(chunk.y, flips[4 * i + 1]);
    v[4 * i + 2][0] = xor_sign(chunk.z, flips[4 * i + 2]);
    v[4 * i + 3][0] = xor_sign(chunk.w, flips[4 * i + 3]);
  }
}

__device__ inline uint32_t pack_bf16x2(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

__device__ inline void store(float* x, const Block32& v) {
  UNROLL for (int i = 0; i < 8; i++) {
    const float4 chunk =
        make_float4(v[4 * i][0], v[4 * i + 1][0], v[4 * i + 2][0], v[4 * i + 3][0]);
    reinterpret_cast<float4*>(x)[i] = chunk;
  }
}

__device__ inline void store(bfloat16* x, const Block32& v) {
  UNROLL for (int i = 0; i < 4; i++) {
    uint32_t pairs[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const int n = 8 * i + 2 * j;
      pairs[j] = pack_bf16x2(v[n][0], v[n + 1][0]);
    }
    reinterpret_cast<uint4*>(x)[i] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// ---- E2M1 codes -> wider formats, by looking bytes up
// __byte_perm(a, b, s) puts four bytes together, of the eight in a and b: hex digit n of s says
// which of them (0 .. 3 in a, 4 .. 7 in b) becomes byte n. The three magnitude bits of a code are
// such a digit. So a table of the eight magnitudes fits in two registers, and one instruction looks
// four packed codes up.

constexpr uint32_t MAGNITUDES = 0x7777u;        // of four codes; the sign is bit 3 of each

// Looks up four codes, in the lower half of a word, in a table of eight bytes, and sets bit 7 of
// each byte that it finds to the sign of its code.
__device__ inline uint32_t look_up_signed(
    uint32_t four_codes, uint32_t table_0_3, uint32_t table_4_7) {
  const uint32_t signs = __byte_perm(four_codes, 0, 0x1100);        // each byte twice
  const uint32_t bytes = __byte_perm(table_0_3, table_4_7, four_codes & MAGNITUDES);
  return bytes | ((signs << 4) & 0x00800080u) | (signs & 0x80008000u);
}

// Converts four codes, in the lower half of a word, into BF16: two words of two values.
// In BF16 the magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6 are 0000 3F00 3F80 3FC0 4000 4040 4080 40C0. One
// table has their low bytes, the other one their high bytes.
__device__ inline uint2 e2m1_to_bf16x4(uint32_t four_codes) {
  const uint32_t low_bytes = __byte_perm(0xC0800000u, 0xC0804000u, four_codes & MAGNITUDES);
  const uint32_t high_bytes = look_up_signed(four_codes, 0x3F3F3F00u, 0x40404040u);
  const uint32_t first_two = __byte_perm(low_bytes, high_bytes, 0x5140);
  const uint32_t last_two = __byte_perm(low_bytes, high_bytes, 0x7362);
  return make_uint2(first_two, last_two);
}

// Rounds four values to FP8, E4M3 or E5M2: one word, the first value in its lowest byte.
template <bool e5m2>
__device__ uint32_t fp8x4(float a, float b, float c, float d) {
  constexpr __nv_fp8_interpretation_t format = e5m2 ? __NV_E5M2 : __NV_E4M3;
  const uint32_t ab = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, format);
  const uint32_t cd = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, format);
  return ab | (cd << 16);
}

// ---- the gradient of the forward quantiser

// Computes alpha * (v * mask) H, with H the Hadamard matrix: a gradient leaves the rotated basis.
// An element that was clipped when it was quantised (bit i of mask is 0) passes no gradient. It is
// multiplied by 0, not replaced by 0, so that NaN stays NaN.
__device__ inline void unrotate(Block32& v, uint32_t mask, float alpha = 1) {
  UNROLL for (int i = 0; i < 32; i++)
    if (!((mask >> i) & 1))
      v[i][0] *= 0;
  hadamard(v, alpha * HADAMARD_NORM);
}

// ---- the current GPU

inline int device_attribute(cudaDeviceAttr attribute) {
  int device;
  int value;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

inline int shared_memory_per_multiprocessor() {          // in bytes
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
}
