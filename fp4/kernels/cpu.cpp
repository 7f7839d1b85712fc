/*
The ops on the CPU, byte for byte those of reference.py. 16 blocks of 32 are worked on side by side, so that
the loops over w become vector instructions; a thread takes a range of such groups. No checks: see bind.cpp.
*/
#include <torch/csrc/stable/ops.h>                            // parallel_for, on torch's own threads
#include "mxfp4.cuh"
#include "ops.h"

using namespace mxfp4;

namespace {

constexpr int W = 16;

// f(first, n): the n <= 16 blocks from `first` on, for all blocks of a row-major matrix
template <class F> void for_groups(int64_t blocks, F f) {
  torch::stable::parallel_for(0, ceil_div(blocks, W), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < end * W && i < blocks; i += W) f(i, blocks - i < W ? int(blocks - i) : W);
  });
}

template <class T> void load(const T* x, int n, Block<W>& v) {
  for (int w = 0; w < W; w++)
    for (int i = 0; i < 32; i++) v[i][w] = w < n ? get(x[32 * w + i]) : 0;
}

// where a group of n blocks goes in a packed tensor: block w of the group is its block first + w * stride
struct Packed { uint8_t *codes, *scales; int64_t first, stride; int n; };

// block w gets scale byte scale[w] and its codes, or zeros where keep[w] is 0
void pack(const uint8_t (&code)[32][W], const uint8_t (&scale)[W], const uint8_t (&keep)[W], const Packed& to) {
  uint8_t byte[16][W];
  for (int i = 0; i < 16; i++)
    for (int w = 0; w < W; w++) byte[i][w] = (code[2 * i][w] | code[2 * i + 1][w] << 4) & keep[w];
  for (int w = 0; w < to.n; w++) {
    const int64_t block = to.first + w * to.stride;
    for (int i = 0; i < 16; i++) to.codes[16 * block + i] = byte[i][w];
    to.scales[block] = scale[w];
  }
}

void quest_blocks(Block<W>& v, bool nearest, const Packed& to, int32_t* mask) {
  float t[W], inverse[W];
  uint8_t code[32][W], scale[W], keep[W];
  uint32_t inside[W] = {};
  hadamard(v);
  quest(v, t);
  for (int w = 0; w < W; w++) {
    const int e = quest_exponent(t[w], nearest);
    inverse[w] = pow2(-e), keep[w] = finite(t[w]) ? 255 : 0, scale[w] = finite(t[w]) ? e + 127 : 255;
  }
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) {
      const float u = v[i][w] * inverse[w];
      code[i][w] = round_nearest(u) | sign_bit(u);
      inside[w] |= uint32_t(fabsf(u) < 6) << i;
    }
  pack(code, scale, keep, to);
  for (int w = 0; w < to.n; w++) mask[to.first + w] = keep[w] ? inside[w] : 0;
}

void absmax_blocks(Block<W>& v, Backward how, Turn turn, uint64_t seed, const Packed& to) {
  float m[W], factor[W];
  uint8_t code[32][W], scale[W], keep[W];
  if (turn == Turn::before) flip(v, uint32_t(*how.signs));
  turn == Turn::none ? largest(v, m) : hadamard(v, m);
  if (turn == Turn::after) flip(v, uint32_t(*how.signs));
  for (int w = 0; w < W; w++) {
    const int e = absmax_exponent(m[w]);
    factor[w] = .75f * pow2(-e), keep[w] = m[w] > 0 && finite(m[w]) ? 255 : 0, scale[w] = finite(m[w]) ? e + 127 : 255;
  }
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) v[i][w] *= factor[w];
  if (how.stochastic) {
    uint32_t word[2][4][W];                                   // two Philox calls make the 32 bytes of a block
    for (int half = 0; half < 2; half++)
      for (int w = 0; w < W; w++) {
        uint32_t c[4];
        philox(seed, 2 * (to.first + w * to.stride) + half, c);
        for (int j = 0; j < 4; j++) word[half][j][w] = c[j];
      }
    for (int i = 0; i < 32; i++)
      for (int w = 0; w < W; w++)
        code[i][w] = round_stochastic(v[i][w], word[i / 16][i / 4 % 4][w] >> 8 * (i % 4) & 255) | sign_bit(v[i][w]);
  } else {
    for (int i = 0; i < 32; i++)
      for (int w = 0; w < W; w++) code[i][w] = round_nearest(v[i][w]) | sign_bit(v[i][w]);
  }
  pack(code, scale, keep, to);
}

// all blocks of x.T, x [M, K]: fill(row, k, v[i]) reads x[row, k .. k + 15]; rows beyond M are 0
template <class F>
void absmax_columns(int64_t M, int64_t K, Backward how, uint64_t seed, uint8_t* codes, uint8_t* scales, F fill) {
  const int64_t across = K / W, down = ceil_div(M, 32);
  torch::stable::parallel_for(0, across * down, 8, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; g++) {
      const int64_t k = g % across * W, row = g / across * 32;
      Block<W> v = {};
      for (int i = 0; i < 32 && row + i < M; i++) fill(row + i, k, v[i]);
      absmax_blocks(v, how, how.columns, seed, {codes, scales, k * down + row / 32, down, W});
    }
  });
}

void quantize_forward(Values x, int64_t M, int64_t K, bool nearest, uint8_t* codes, uint8_t* scales, int32_t* mask, void*) {
  typed(x, [=](auto* x) {
    for_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(x + 32 * first, n, v);
      quest_blocks(v, nearest, {codes, scales, first, 1, n}, mask);
    });
  });
}

void quantize_backward(Values x, int64_t M, int64_t K, Backward how, const int64_t* seeds,
                       void* codes, void* scales, void* codes_t, void* scales_t, void*) {
  typed(x, [=](auto* x) {
    for_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(x + 32 * first, n, v);
      absmax_blocks(v, how, how.rows, seeds[0], {(uint8_t*)codes, (uint8_t*)scales, first, 1, n});
    });
    absmax_columns(M, K, how, seeds[1], (uint8_t*)codes_t, (uint8_t*)scales_t, [=](int64_t row, int64_t k, float* v) {
      for (int w = 0; w < W; w++) v[w] = get(x[row * K + k + w]);
    });
  });
}

void requantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how, const int64_t* seed,
                void* codes_t, void* scales_t, void*) {
  absmax_columns(M, K, how, seed[0], (uint8_t*)codes_t, (uint8_t*)scales_t, [=](int64_t row, int64_t k, float* v) {
    const int64_t at = row * K + k;                           // 16 values never cross a block
    const float s = scale_of(scales[at / 32]);
    for (int w = 0; w < W; w++) v[w] = value(codes[at / 2 + w / 2] >> 4 * (w % 2) & 15) * s;
  });
}

void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x, void*) {
  typed(x, [=](auto* x) {
    for_groups(M * K / 32, [=](int64_t first, int n) {
      for (int64_t b = first; b < first + n; b++) {
        const float s = scale_of(scales[b]);
        int code[32];
        for (int i = 0; i < 16; i++) code[2 * i] = codes[16 * b + i] & 15, code[2 * i + 1] = codes[16 * b + i] >> 4;
        for (int i = 0; i < 32; i++) put(x[32 * b + i], value(code[i]) * s);
      }
    });
  });
}

void unrotate(Values d, const int32_t* mask, int64_t M, int64_t K, Values x, void*) {
  typed(d, [=](auto* d) { typed(x, [=](auto* x) {
    for_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(d + 32 * first, n, v);
      for (int w = 0; w < n; w++)
        for (int i = 0; i < 32; i++) v[i][w] *= float(mask[first + w] >> i & 1);
      hadamard(v);
      for (int w = 0; w < n; w++)
        for (int i = 0; i < 32; i++) put(x[32 * (first + w) + i], v[i][w]);
    });
  }); });
}

}  // namespace

const Ops cpu = {quantize_forward, quantize_backward, requantize, dequantize, unrotate};

void scale(const float* c, int64_t n, float alpha, Values out) {
  typed(out, [=](auto* out) {
    torch::stable::parallel_for(0, n, 1 << 14, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) put(out[i], alpha * c[i]);
    });
  });
}
