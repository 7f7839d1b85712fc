/*
The operations on the CPU, byte for byte those of reference.py. bind.cpp has checked all arguments.

A block of MXFP4 is 32 neighbouring values with one scale. Here 16 blocks are worked on side by
side: v[i][w] is element i of block w. The loops marked LANES run over the 16 values of w, which do
not depend on one another, and the compiler makes vector instructions of them. So nearly all values
in such a loop are 32 bits wide: a vector holds fewer lanes of these than of bytes, and the loop
would take the lanes of the narrowest. A thread takes a range of such groups of blocks.
*/
#include <torch/csrc/stable/ops.h>  // parallel_for, which runs on torch's own threads
#include <algorithm>
#include <array>
#include <vector>
#include "mxfp4.cuh"
#include "ops.h"

using namespace mxfp4;

namespace {

constexpr int W = 16;

// Threads are not worth their start for fewer groups, or for fewer values, than these.
constexpr int64_t MIN_GROUPS_PER_THREAD = 32;
constexpr int64_t MIN_VALUES_PER_THREAD = 1 << 14;

// ---- groups of blocks

// Calls f(first, n) for every group of the blocks begin .. end - 1: the group is the n blocks from
// number `first` on. n is W, but in the last group it may be less.
template <class F>
void for_groups(int64_t begin, int64_t end, F f) {
  for (int64_t first = begin; first < end; first += W) {
    const int64_t left = end - first;
    f(first, left < W ? int(left) : W);
  }
}

// The same for all blocks of a row-major matrix, by several threads.
template <class F>
void for_all_groups(int64_t blocks, F f) {
  const auto run = [&](int64_t begin, int64_t end) {
    const int64_t last = end * W < blocks ? end * W : blocks;
    for_groups(begin * W, last, f);
  };
  torch::stable::parallel_for(0, ceil_div(blocks, W), MIN_GROUPS_PER_THREAD, run);
}

// Interleaves the two halves of a block's values, as a riffle does with the halves of a deck of
// cards. Write the place of a value as a binary number: a riffle rotates its bits to the left by
// one, because the highest bit says which half it comes from, and becomes the lowest. So a few
// riffles transpose a matrix whose sides are powers of two, and the compiler makes vector
// instructions of each, which it does not of a loop that transposes.
void riffle(const Block<W>& from_block, Block<W>& to_block) {
  const float* __restrict from = from_block[0];
  float* __restrict to = to_block[0];
  constexpr int HALF = 16 * W;
  for (int j = 0; j < HALF; j++) {
    to[2 * j] = from[j];
    to[2 * j + 1] = from[HALF + j];
  }
}

// Transposes W blocks that follow one another to v[i][w], with four riffles: a place has four bits
// for w, which are the highest before and the lowest after.
void transpose(Block<W>& v) {
  Block<W> other;
  for (int i = 0; i < 2; i++) {
    riffle(v, other);
    riffle(other, v);
  }
}

// Reads n blocks that follow one another; the other W - n are filled with zeros.
template <class T>
void load(const T* x, int n, Block<W>& v) {
  float* values = v[0];
  for (int i = 0; i < 32 * n; i++)
    values[i] = to_float(x[i]);
  for (int i = 32 * n; i < 32 * W; i++)
    values[i] = 0;
  transpose(v);
}

// Writes n blocks that follow one another, and destroys v. Five more riffles make nine of them, as
// many as a place has bits, so that every value is back where it was before `transpose`.
template <class T>
void store(Block<W>& v, int n, T* x) {
  Block<W> other;
  transpose(v);
  riffle(v, other);
  const float* values = other[0];
  for (int i = 0; i < 32 * n; i++)
    store_float(x[i], values[i]);
}

// The place of a group in a packed matrix: block w of the group is block first + w * stride there.
struct PackedGroup {
  uint8_t* codes;   // of the whole matrix
  uint8_t* scales;  // of the whole matrix
  int64_t first;
  int64_t stride;
  int n;  // how many of the W blocks exist
};

// A group that is quantised but not yet written. A word has 8 neighbouring codes of 4 bits, the
// first in the lowest bits.
struct QuantizedGroup {
  uint32_t codes[4][W];
  uint32_t codes_mask[W];  // all ones, or 0 for a block whose codes shall all be zero
  uint32_t scale[W];       // the byte of the exponent; 255 stands for NaN
};

// Multiplies each block of a group by its factor, and rounds: round(u, i, w) returns the code of u,
// element i of block w, without its sign.
template <class Round>
void round_group(const Block<W>& v, const float (&factor)[W], QuantizedGroup& q, Round round) {
  for (int j = 0; j < 4; j++)
    LANES for (int w = 0; w < W; w++) {
      uint32_t word = 0;
      for (int i = 0; i < 8; i++) {
        const float u = v[8 * j + i][w] * factor[w];
        const uint32_t code = round(u, 8 * j + i, w) | sign_bit(u);
        word |= code << (4 * i);
      }
      q.codes[j][w] = word;
    }
}

// Writes a group, of each word the lowest byte first.
void pack(const QuantizedGroup& q, const PackedGroup& to) {
  for (int w = 0; w < to.n; w++) {
    const int64_t block = to.first + w * to.stride;
    for (int j = 0; j < 16; j++) {
      const uint32_t word = q.codes[j / 4][w] & q.codes_mask[w];
      to.codes[16 * block + j] = word >> (8 * (j % 4));
    }
    to.scales[block] = q.scale[w];
  }
}

// Unpacks 8 codes that follow one another.
template <class T>
void unpack(const uint8_t* codes, float scale, T* x) {
  uint32_t word = 0;
  for (int j = 0; j < 4; j++)
    word |= uint32_t(codes[j]) << (8 * j);
  LANES for (int i = 0; i < 8; i++)
    store_float(x[i], e2m1_value((word >> (4 * i)) & 15) * scale);
}

// Unpacks a block of a packed matrix.
template <class T>
void unpack_block(const uint8_t* codes, const uint8_t* scales, int64_t block, T* x) {
  const float scale = e8m0_value(scales[block]);
  for (int i = 0; i < 32; i += 8)
    unpack(codes + 16 * block + i / 2, scale, x + i);
}

// ---- the forward quantiser

// Rotates a group, quantises it with QuEST's scale, and writes one mask word a block. If a block
// has a NaN or Inf, its scale says NaN, its codes are zero, and its mask is empty.
void quantize_forward_group(Block<W>& v, bool nearest, const PackedGroup& to, int32_t* mask) {
  float unrounded_scale[W];
  float inverse_scale[W];
  QuantizedGroup q;
  hadamard(v);
  quest_scale(v, unrounded_scale);
  LANES for (int w = 0; w < W; w++) {
    const int e = quest_exponent(unrounded_scale[w], nearest);
    const bool finite = is_finite(unrounded_scale[w]);
    inverse_scale[w] = pow2(-e);
    q.scale[w] = finite ? e + 127 : 255;
    q.codes_mask[w] = finite ? ~0u : 0;
  }

  round_group(v, inverse_scale, q, [](float u, int, int) { return round_nearest(u); });
  uint32_t not_clipped[W];
  LANES for (int w = 0; w < W; w++) {
    uint32_t word = 0;
    for (int i = 0; i < 32; i++)
      word |= uint32_t(fabsf(v[i][w] * inverse_scale[w]) < 6) << i;
    not_clipped[w] = word;
  }
  pack(q, to);
  for (int w = 0; w < to.n; w++)
    mask[to.first + w] = not_clipped[w] & q.codes_mask[w];
}

void quantize_forward(
    FloatMatrix x,
    int64_t M,
    int64_t K,
    bool nearest,
    uint8_t* codes,
    uint8_t* scales,
    int32_t* mask,
    void*) {
  with_dtype(x, [=](auto* x) {
    for_all_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(x + 32 * first, n, v);
      quantize_forward_group(v, nearest, {codes, scales, first, 1, n}, mask);
    });
  });
}

// ---- the backward quantiser

// Multiplies a group by random signs and rotates it, in the order that is asked for, and finds the
// largest magnitude of each block.
void rotate_randomly(Block<W>& v, uint32_t signs, SignOrder order, float (&largest)[W]) {
  if (order == SignOrder::before)
    apply_signs(v, signs);
  if (order == SignOrder::none)
    max_magnitude(v, largest);
  else
    hadamard(v, largest);
  if (order == SignOrder::after)
    apply_signs(v, signs);
}

// Rounds with the noise of the places that the blocks have in their matrix. A call of Philox makes
// 4 words, 16 random bytes, so that two calls make one byte for each of the 32 elements of a block.
void round_group_stochastic(
    const Block<W>& v,
    const float (&factor)[W],
    uint64_t seed,
    const PackedGroup& to,
    QuantizedGroup& q) {
  uint32_t noise[8][W];
  for (int half = 0; half < 2; half++)
    LANES for (int w = 0; w < W; w++) {
      const int64_t block = to.first + w * to.stride;
      uint32_t words[4];
      philox(seed, 2 * block + half, words);
      for (int j = 0; j < 4; j++)
        noise[4 * half + j][w] = words[j];
    }
  int byte[32][W];
  for (int i = 0; i < 32; i++)
    LANES for (int w = 0; w < W; w++)
      byte[i][w] = (noise[i / 4][w] >> (8 * (i % 4))) & 255;
  round_group(v, factor, q, [&](float u, int i, int w) { return round_stochastic(u, byte[i][w]); });
}

// Rotates a group and quantises it with a scale that leaves room for its largest magnitude. After
// the factor of 3/4 the magnitudes are less than 6, so that nothing clips; the product of two
// operands is multiplied by 16/9 to make up for it.
void quantize_backward_group(
    Block<W>& v,
    const BackwardParams& params,
    SignOrder order,
    uint64_t seed,
    const PackedGroup& to) {
  float largest[W];
  float factor[W];
  QuantizedGroup q;
  rotate_randomly(v, uint32_t(*params.signs), order, largest);
  LANES for (int w = 0; w < W; w++) {
    const int e = absmax_exponent(largest[w]);
    const bool finite = is_finite(largest[w]);
    factor[w] = .75f * pow2(-e);
    q.scale[w] = finite ? e + 127 : 255;
    q.codes_mask[w] = (finite && largest[w] > 0) ? ~0u : 0;
  }
  if (params.stochastic)
    round_group_stochastic(v, factor, seed, to, q);
  else
    round_group(v, factor, q, [](float u, int, int) { return round_nearest(u); });
  pack(q, to);
}

// Calls f(strip) for every strip of 32 rows of a matrix [M, K], by several threads. A column of a
// strip is a block of the transposed matrix.
template <class F>
void for_strips(int64_t M, int64_t K, F f) {
  const int64_t min_strips = 1 + MIN_GROUPS_PER_THREAD * W / (K + 1);  // K may be 0
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; strip++)
      f(strip);
  };
  torch::stable::parallel_for(0, ceil_div(M, 32), min_strips, run);
}

// Quantises the columns of a strip of x [M, K]. A group is W neighbouring columns, read row by row:
// read_row(row, k, v) puts x[row, k .. k + W - 1] into v[0 .. W - 1]. Rows beyond M are zeros.
template <class F>
void quantize_columns(
    int64_t strip,
    int64_t M,
    int64_t K,
    const BackwardParams& params,
    uint64_t seed,
    uint8_t* codes,   // [K, Mp/2]
    uint8_t* scales,  // [K, Mp/32]
    F read_row) {
  const int64_t strips = ceil_div(M, 32);
  const int64_t row = 32 * strip;
  for (int64_t k = 0; k < K; k += W) {
    Block<W> v = {};
    for (int i = 0; i < 32 && row + i < M; i++)
      read_row(row + i, k, v[i]);
    const PackedGroup to = {codes, scales, k * strips + strip, strips, W};
    quantize_backward_group(v, params, params.column_order, seed, to);
  }
}

// Quantises the rows of a strip, and then its columns, while its values are in the cache.
void quantize_backward(
    FloatMatrix x,
    int64_t M,
    int64_t K,
    BackwardParams params,
    const int64_t* seeds,
    void* codes,
    void* scales,
    void* codes_t,
    void* scales_t,
    void*) {
  with_dtype(x, [=](auto* x) {
    const auto read_row = [=](int64_t row, int64_t k, float* v) {
      LANES for (int w = 0; w < W; w++)
        v[w] = to_float(x[row * K + k + w]);
    };
    const int64_t blocks = M * K / 32;
    for_strips(M, K, [=](int64_t strip) {
      const int64_t next = strip * K + K;  // A strip of 32 rows has K blocks.
      for_groups(strip * K, next < blocks ? next : blocks, [=](int64_t first, int n) {
        Block<W> v;
        load(x + 32 * first, n, v);
        const PackedGroup to = {(uint8_t*)codes, (uint8_t*)scales, first, 1, n};
        quantize_backward_group(v, params, params.row_order, seeds[0], to);
      });
      quantize_columns(
          strip, M, K, params, seeds[1], (uint8_t*)codes_t, (uint8_t*)scales_t, read_row);
    });
  });
}

void requantize_transposed(
    const uint8_t* codes,
    const uint8_t* scales,
    int64_t M,
    int64_t K,
    BackwardParams params,
    const int64_t* seed,
    void* codes_t,
    void* scales_t,
    void*) {
  const auto read_row = [=](int64_t row, int64_t k, float* v) {
    const int64_t index = row * K + k;
    const float scale = e8m0_value(scales[index / 32]);  // W neighbours never cross a block
    for (int w = 0; w < W; w += 8)
      unpack(codes + (index + w) / 2, scale, v + w);
  };
  for_strips(M, K, [=](int64_t strip) {
    quantize_columns(
        strip, M, K, params, seed[0], (uint8_t*)codes_t, (uint8_t*)scales_t, read_row);
  });
}

// ---- from packed to values, and from the rotated basis back

void dequantize(
    const uint8_t* codes,
    const uint8_t* scales,
    int64_t M,
    int64_t K,
    FloatMatrix x,
    void*) {
  with_dtype(x, [=](auto* x) {
    for_all_groups(M * K / 32, [=](int64_t first, int n) {
      for (int64_t block = first; block < first + n; block++)
        unpack_block(codes, scales, block, x + 32 * block);
    });
  });
}

// The mask is a factor and does not select, because NaN * 0 is NaN and has to stay visible.
void apply_mask(const int32_t* mask, int n, float alpha, Block<W>& v) {
  int32_t words[W] = {};
  memcpy(words, mask, 4 * n);
  for (int i = 0; i < 32; i++)
    LANES for (int w = 0; w < W; w++)
      v[i][w] = alpha * v[i][w] * float((words[w] >> i) & 1);
}

void unrotate(
    FloatMatrix d,
    const int32_t* mask,
    int64_t M,
    int64_t K,
    FloatMatrix x,
    void*) {
  unrotate_product(d, 1, mask, M, K, x);
}

// ---- the product for a few rows of x

constexpr int64_t MIN_BLOCKS_PER_THREAD = 1 << 10;

// The sum of the 32 products of two blocks of E2M1 values without their scales. They are multiples
// of 1/4, so that the sum is exact in any order.
float dot(const float* x, const float* w) {
  float products[16] = {};
  for (int i = 0; i < 32; i += 16)
    LANES for (int j = 0; j < 16; j++)
      products[j] += x[i + j] * w[i + j];
  for (int n = 8; n > 0; n /= 2)
    LANES for (int j = 0; j < n; j++)
      products[j] += products[j + n];
  return products[0];
}

// Sum number i of the 32 is that of the blocks i, i + 32, i + 64, ... Their total is a tree with
// neighbours first, as of the threads of a warp.
float total(std::array<float, 32>& sums) {
  for (int stride = 1; stride < 32; stride *= 2)
    for (int i = 0; i < 32; i += 2 * stride)
      sums[i] += sums[i + stride];
  return sums[0];
}

void matvec(
    const uint8_t* x,
    const uint8_t* x_scales,
    const uint8_t* w,
    const uint8_t* w_scales,
    int64_t M,
    int64_t N,
    int64_t K,
    FloatMatrix y,
    void*) {
  const int64_t blocks = K / 32;
  std::vector<float> x_values(M * K);  // without their scales
  for (int64_t i = 0; i < M * K; i += 8)
    unpack(x + i / 2, 1, &x_values[i]);
  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<std::array<float, 32>> sums(M);
    for (int64_t n = begin; n < end; n++) {
      std::fill(sums.begin(), sums.end(), std::array<float, 32>{});
      for (int64_t block = 0; block < blocks; block++) {
        float w_values[32];
        for (int i = 0; i < 32; i += 8)
          unpack(w + 16 * (n * blocks + block) + i / 2, 1, w_values + i);
        const float w_scale = e8m0_value(w_scales[n * blocks + block]);
        for (int64_t m = 0; m < M; m++) {
          const float term = dot(&x_values[m * K + 32 * block], w_values);
          const float x_scale = e8m0_value(x_scales[m * blocks + block]);
          sums[m][block % 32] += term * x_scale * w_scale;
        }
      }
      with_dtype(y, [&](auto* y) {
        for (int64_t m = 0; m < M; m++)
          store_float(y[m * N + n], total(sums[m]));
      });
    }
  };
  const int64_t rows_per_thread = ceil_div(MIN_BLOCKS_PER_THREAD, blocks + 1);
  torch::stable::parallel_for(0, N, rows_per_thread, run);
}

}  // namespace

const OpTable cpu_ops = {
    quantize_forward,
    quantize_backward,
    requantize_transposed,
    dequantize,
    unrotate,
    matvec,
};

void dequantize_tile(
    const uint8_t* codes,
    const uint8_t* scales,
    int64_t K,
    int64_t first_row,
    int64_t first_column,
    int64_t rows,
    int64_t columns,
    float* x) {
  for (int64_t row = 0; row < rows; row++) {
    const int64_t first = ((first_row + row) * K + first_column) / 32;
    for (int64_t i = 0; i < columns / 32; i++)
      unpack_block(codes, scales, first + i, x + row * columns + 32 * i);
  }
}

void unrotate_product(
    FloatMatrix d,
    float alpha,
    const int32_t* mask,
    int64_t M,
    int64_t K,
    FloatMatrix x) {
  const auto run = [=](auto* d, auto* x) {
    for_all_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(d + 32 * first, n, v);
      apply_mask(mask + first, n, alpha, v);
      hadamard(v);
      store(v, n, x + 32 * first);
    });
  };
  with_dtype(d, [=](auto* d) {
    with_dtype(x, [=](auto* x) { run(d, x); });
  });
}

void scale_values(const float* c, int64_t n, float alpha, FloatMatrix out) {
  with_dtype(out, [=](auto* out) {
    const auto run = [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        store_float(out[i], alpha * c[i]);
    };
    torch::stable::parallel_for(0, n, MIN_VALUES_PER_THREAD, run);
  });
}
