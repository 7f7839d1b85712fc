/*
The arithmetic of reference.py on W blocks of 32 side by side: v[i][w] is element i of block w.
A CUDA thread owns one block (W = 1). On a CPU W = 16, and the innermost loops become vector
instructions. Same operations in the same order as reference.py, so that the bytes are equal:
compile with -ffp-contract=off (g++) or -fmad=false (nvcc), because a fused multiply-add rounds
once where the reference rounds twice. No CUDA calls, no torch.
*/
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FN __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#else
#define FN inline
#define UNROLL                                                             // g++ takes a minute longer, for nothing
#endif

namespace mxfp4 {

template <int W> using Block = float[32][W];
struct bfloat16 { uint16_t bits; };

FN uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
FN float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

FN int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }

FN float get(float x) { return x; }
FN float get(bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
FN void put(float& to, float x) { to = x; }
FN void put(bfloat16& to, float x) {                                       // to nearest, ties to even
  const uint32_t u = bits_of(x);
  to.bits = x != x ? 0x7FC0 : (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}

// 2^e for e in [-127, 127]; -127 is subnormal
FN float pow2(int e) { return float_of(e > -127 ? uint32_t(e + 127) << 23 : 0x400000u); }
FN int exponent(float x) { return int(bits_of(x) >> 23 & 255) - 127; }     // floor(log2 x) of a normal x > 0
FN bool finite(float x) { return (bits_of(x) >> 23 & 255) != 255; }
FN int clamp_exponent(int e) { return e < -127 ? -127 : e > 127 ? 127 : e; }

// ---- a block: rotate, spread, largest

template <int W> FN void flip(Block<W>& v, uint32_t signs) {               // bit i set: negate element i
  UNROLL for (int i = 0; i < 32; i++) {
    const float sign = signs >> i & 1 ? -1 : 1;
    for (int w = 0; w < W; w++) v[i][w] *= sign;
  }
}

template <int W> FN void butterflies(Block<W>& v, int k) {                 // stage k: strides 2^k
  UNROLL for (int j = 0; j < 16; j++) {
    const int h = 1 << k, i = j >> k << k + 1 | j & h - 1;                 // the 16 pairs (i, i + h)
    for (int w = 0; w < W; w++) {
      const float a = v[i][w], b = v[i + h][w];
      v[i][w] = a + b, v[i + h][w] = a - b;
    }
  }
}

constexpr float H = 0.17677669529663687f;                                  // 32^-0.5

template <int W> FN void hadamard(Block<W>& v, float scale = H) {
  UNROLL for (int k = 0; k < 5; k++) butterflies(v, k);
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) v[i][w] *= scale;
}

// m, the largest magnitude. These are not negative, so that they compare as integers, where NaN is larger than everything
template <int W> FN void largest(const Block<W>& v, float (&m)[W]) {
  int32_t top[W] = {};
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) {
      const int32_t size = bits_of(fabsf(v[i][w]));
      top[w] = size > top[w] ? size : top[w];
    }
  for (int w = 0; w < W; w++) m[w] = float_of(top[w]);
}

// both in one: the larger magnitude of a + b and a - b is |a| + |b|, rounding included
template <int W> FN void hadamard(Block<W>& v, float (&m)[W]) {
  int32_t top[W] = {};
  UNROLL for (int k = 0; k < 4; k++) butterflies(v, k);
  UNROLL for (int i = 0; i < 16; i++)
    for (int w = 0; w < W; w++) {
      const int32_t sum = bits_of(fabsf(v[i][w]) + fabsf(v[i + 16][w]));
      top[w] = sum > top[w] ? sum : top[w];
    }
  butterflies(v, 4);
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) v[i][w] *= H;
  for (int w = 0; w < W; w++) m[w] = float_of(top[w]) * H;
}

template <int W> FN void total(Block<W>& v) {                              // the sum ends in v[0]
  UNROLL for (int h = 1; h < 32; h *= 2)
    UNROLL for (int i = 0; i < 32; i += 2 * h)
      for (int w = 0; w < W; w++) v[i][w] += v[i + h][w];
}

// t = the QuEST scale before it is rounded to a power of two
template <int W> FN void quest(const Block<W>& v, float (&t)[W]) {
  Block<W> sum, square;
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) sum[i][w] = v[i][w], square[i][w] = v[i][w] * v[i][w];
  total(sum), total(square);
  for (int w = 0; w < W; w++) {
    const float mean = sum[0][w] / 32;
    float variance = square[0][w] / 32 - mean * mean;
    variance = variance < 0 ? 0 : variance;                                // not fmaxf: NaN must stay
    t[w] = sqrtf(variance) * float(2.92247856 / 6) + 1e-8f;
  }
}

FN int quest_exponent(float t, bool nearest) {
  const float mantissa = float_of((bits_of(t) & 0x7FFFFFu) | 0x3F800000u); // in [1, 2)
  return clamp_exponent(exponent(t) + (nearest && mantissa > 1.41421356f));
}

FN int absmax_exponent(float m) { return m == 0 ? 0 : clamp_exponent(exponent(m) - 2); }

// ---- an element: u = v / scale -> code, and back

FN int sign_bit(float u) { return bits_of(u) >> 28 & 8; }

// With p the power of two below a, at least 1, the grid's neighbours of a are p/2 apart. Adding 1.5 * 2^22 * p leaves
// a in units of p/2 in the sum's last bits, rounded to nearest with ties to even; the code is that plus 2 log2(p)
struct Grid { float a; uint32_t p, magic; };

FN Grid grid(float u) {
  const float magnitude = float_of(bits_of(u) & 0x7FFFFFFFu), a = magnitude < 6 ? magnitude : 6;           // saturates
  const uint32_t p = (bits_of(a) > 0x3F800000u ? bits_of(a) : 0x3F800000u) & 0x7F800000u;
  return {a, p, p + 0x0B400000u};
}

FN int round_nearest(float u) {
  const Grid g = grid(u);
  return int(bits_of(g.a + float_of(g.magic)) - g.magic + (g.p >> 22)) - 254;
}

FN float value(int code) {                                                 // 0..15 -> -6..6
#ifdef __CUDA_ARCH__
  return float_of(uint32_t(code & 7) << 22 | uint32_t(code & 8) << 28) * 0x1p126f;      // E2M1 is a subnormal's shape
#else
  const int e = code >> 1 & 3, m = code & 1, normal = e > 0;               // where subnormals are slow
  const float a = .5f * ((2 * normal + m) << (e - normal));
  return float_of(bits_of(a) | uint32_t(code & 8) << 28);
#endif
}

// up if what is left of a, in steps, and (noise + 1/2) / 256 make 1; noise in [0, 256). All is exact
FN int round_stochastic(float u, int noise) {
  const Grid g = grid(u);
  const float sum = g.a + float_of(g.magic), rest = g.a - (sum - float_of(g.magic));                       // in +-p/4
  const float step = .5f * float_of(g.p), threshold = step * ((255.5f - noise) / 256);
  return int(bits_of(sum) - g.magic + (g.p >> 22)) - 255 + (rest >= threshold) + (rest >= threshold - step);
}

FN float scale_of(uint8_t byte) { return byte == 255 ? float_of(0x7FC00000u) : pow2(byte - 127); }

// ---- noise: Philox4x32-10, key = seed, counter = i. Element n of a tensor gets byte n % 16 of call n / 16

FN void philox(uint64_t seed, uint64_t i, uint32_t (&c)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  c[0] = uint32_t(i), c[1] = uint32_t(i >> 32), c[2] = 0, c[3] = 0;
  UNROLL for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0, c[1] = uint32_t(p1);
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1, c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

}  // namespace mxfp4
