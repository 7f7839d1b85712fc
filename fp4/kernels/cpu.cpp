/*
The operations on the CPU, byte for byte those of reference.py. bind.cpp has checked all arguments.

A block of MXFP4 is 32 neighbouring values with one scale. Here 16 blocks are worked on side by
side: v[i][w] is element i of block w. The innermost loop of all arithmetic that costs time runs
over the 16 values of w, which do not depend on one another, and the compiler makes vector
instructions of it. A thread takes a range of such groups of blocks.
*/
#include <torch/csrc/stable/ops.h>  // parallel_for, which runs on torch's own threads
#include "mxfp4.cuh"
#include "ops.h"

using namespace mxfp4;

namespace {

constexpr int W = 16;

// Threads are not worth their start for fewer groups, or for fewer values, than these.
constexpr int64_t MIN_GROUPS_PER_THREAD = 8;
constexpr int64_t MIN_VALUES_PER_THREAD = 1 << 14;

// ---- groups of blocks

// Calls f(first, n) for every group of a row-major matrix that has `blocks` blocks: the group is
// the n blocks from number `first` on. n is W, but in the last group it may be less.
template <class F>
void for_groups(int64_t blocks, F f) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = group * W;
      const int64_t left = blocks - first;
      f(first, left < W ? int(left) : W);
    }
  };
  torch::stable::parallel_for(0, ceil_div(blocks, W), MIN_GROUPS_PER_THREAD, run);
}

// Reads n blocks that follow one another; the other W - n are filled with zeros.
template <class T>
void load(const T* x, int n, Block<W>& v) {
  for (int w = 0; w < W; w++)
    for (int i = 0; i < 32; i++)
      v[i][w] = w < n ? to_float(x[32 * w + i]) : 0;
}

// Writes n blocks that follow one another.
template <class T>
void store(const Block<W>& v, int n, T* x) {
  for (int w = 0; w < n; w++)
    for (int i = 0; i < 32; i++)
      store_float(x[32 * w + i], v[i][w]);
}

// The place of a group in a packed matrix: block w of the group is block first + w * stride there.
struct PackedGroup {
  uint8_t* codes;   // of the whole matrix
  uint8_t* scales;  // of the whole matrix
  int64_t first;
  int64_t stride;
  int n;  // how many of the W blocks exist
};

// A group that is quantised but not yet packed.
struct QuantizedGroup {
  uint8_t code[32][W];   // 4 bits each
  uint8_t scale[W];      // the byte of the exponent; 255 stands for NaN
  uint8_t code_mask[W];  // 255, or 0 for a block whose codes shall all be zero
};

// Puts two codes into a byte, the even element into the low nibble, and writes the group.
void pack(const QuantizedGroup& q, const PackedGroup& to) {
  uint8_t byte[16][W];
  for (int i = 0; i < 16; i++)
    for (int w = 0; w < W; w++) {
      const int low = q.code[2 * i][w];
      const int high = q.code[2 * i + 1][w];
      byte[i][w] = (low | (high << 4)) & q.code_mask[w];
    }
  for (int w = 0; w < to.n; w++) {
    const int64_t block = to.first + w * to.stride;
    for (int i = 0; i < 16; i++)
      to.codes[16 * block + i] = byte[i][w];
    to.scales[block] = q.scale[w];
  }
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
  for (int w = 0; w < W; w++) {
    const int e = quest_exponent(unrounded_scale[w], nearest);
    const bool finite = is_finite(unrounded_scale[w]);
    inverse_scale[w] = pow2(-e);
    q.scale[w] = finite ? e + 127 : 255;
    q.code_mask[w] = finite ? 255 : 0;
  }

  uint32_t not_clipped[W] = {};
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) {
      const float u = v[i][w] * inverse_scale[w];
      q.code[i][w] = round_nearest(u) | sign_bit(u);
      not_clipped[w] |= uint32_t(fabsf(u) < 6) << i;
    }
  pack(q, to);
  for (int w = 0; w < to.n; w++)
    mask[to.first + w] = q.code_mask[w] ? not_clipped[w] : 0;
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
    for_groups(M * K / 32, [=](int64_t first, int n) {
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

void round_group_nearest(const Block<W>& v, QuantizedGroup& q) {
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++)
      q.code[i][w] = round_nearest(v[i][w]) | sign_bit(v[i][w]);
}

// Rounds with the noise of the places that the blocks have in their matrix. A call of Philox makes
// 4 words, 16 random bytes, so that two calls make one byte for each of the 32 elements of a block.
void round_group_stochastic(
    const Block<W>& v,
    uint64_t seed,
    const PackedGroup& to,
    QuantizedGroup& q) {
  uint32_t noise[8][W];
  for (int half = 0; half < 2; half++)
    for (int w = 0; w < W; w++) {
      const int64_t block = to.first + w * to.stride;
      uint32_t words[4];
      philox(seed, 2 * block + half, words);
      for (int j = 0; j < 4; j++)
        noise[4 * half + j][w] = words[j];
    }
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++) {
      const int byte = (noise[i / 4][w] >> (8 * (i % 4))) & 255;
      q.code[i][w] = round_stochastic(v[i][w], byte) | sign_bit(v[i][w]);
    }
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
  for (int w = 0; w < W; w++) {
    const int e = absmax_exponent(largest[w]);
    const bool finite = is_finite(largest[w]);
    factor[w] = .75f * pow2(-e);
    q.scale[w] = finite ? e + 127 : 255;
    q.code_mask[w] = (finite && largest[w] > 0) ? 255 : 0;
  }
  for (int i = 0; i < 32; i++)
    for (int w = 0; w < W; w++)
      v[i][w] *= factor[w];

  if (params.stochastic)
    round_group_stochastic(v, seed, to, q);
  else
    round_group_nearest(v, q);
  pack(q, to);
}

// Quantises x.T for an x [M, K], in blocks of 32 rows of x. A group is W neighbouring columns of
// such 32 rows, read row by row: read_row(row, k, v) puts x[row, k .. k + W - 1] into v[0 .. W -
// 1]. Rows beyond M are zeros.
template <class F>
void quantize_backward_columns(
    int64_t M,
    int64_t K,
    const BackwardParams& params,
    uint64_t seed,
    uint8_t* codes,   // [K, Mp/2]
    uint8_t* scales,  // [K, Mp/32]
    F read_row) {
  const int64_t groups_across = K / W;
  const int64_t blocks_down = ceil_div(M, 32);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) {
      const int64_t k = group % groups_across * W;
      const int64_t block_row = group / groups_across;
      const int64_t row = 32 * block_row;
      Block<W> v = {};
      for (int i = 0; i < 32 && row + i < M; i++)
        read_row(row + i, k, v[i]);
      const PackedGroup to = {codes, scales, k * blocks_down + block_row, blocks_down, W};
      quantize_backward_group(v, params, params.column_order, seed, to);
    }
  };
  torch::stable::parallel_for(0, groups_across * blocks_down, MIN_GROUPS_PER_THREAD, run);
}

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
    for_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(x + 32 * first, n, v);
      const PackedGroup to = {(uint8_t*)codes, (uint8_t*)scales, first, 1, n};
      quantize_backward_group(v, params, params.row_order, seeds[0], to);
    });

    const auto read_row = [=](int64_t row, int64_t k, float* v) {
      for (int w = 0; w < W; w++)
        v[w] = to_float(x[row * K + k + w]);
    };
    quantize_backward_columns(
        M, K, params, seeds[1], (uint8_t*)codes_t, (uint8_t*)scales_t, read_row);
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
    for (int w = 0; w < W; w++) {
      const int byte = codes[index / 2 + w / 2];
      const int code = (byte >> (4 * (w % 2))) & 15;
      v[w] = e2m1_value(code) * scale;
    }
  };
  quantize_backward_columns(
      M, K, params, seed[0], (uint8_t*)codes_t, (uint8_t*)scales_t, read_row);
}

// ---- from packed to values, and from the rotated basis back

template <class T>
void dequantize_block(
    const uint8_t* codes,  // [16]
    uint8_t scale_byte,
    T* x) {  // [32]
  const float scale = e8m0_value(scale_byte);
  int code[32];
  for (int i = 0; i < 16; i++) {
    code[2 * i] = codes[i] & 15;
    code[2 * i + 1] = codes[i] >> 4;
  }
  for (int i = 0; i < 32; i++)
    store_float(x[i], e2m1_value(code[i]) * scale);
}

void dequantize(
    const uint8_t* codes,
    const uint8_t* scales,
    int64_t M,
    int64_t K,
    FloatMatrix x,
    void*) {
  with_dtype(x, [=](auto* x) {
    for_groups(M * K / 32, [=](int64_t first, int n) {
      for (int64_t block = first; block < first + n; block++)
        dequantize_block(codes + 16 * block, scales[block], x + 32 * block);
    });
  });
}

// The mask is a factor and does not select, because NaN * 0 is NaN and has to stay visible.
void apply_mask(const int32_t* mask, int n, Block<W>& v) {
  for (int w = 0; w < n; w++)
    for (int i = 0; i < 32; i++)
      v[i][w] *= float((mask[w] >> i) & 1);
}

void unrotate(
    FloatMatrix d,
    const int32_t* mask,
    int64_t M,
    int64_t K,
    FloatMatrix x,
    void*) {
  const auto run = [=](auto* d, auto* x) {
    for_groups(M * K / 32, [=](int64_t first, int n) {
      Block<W> v;
      load(d + 32 * first, n, v);
      apply_mask(mask + first, n, v);
      hadamard(v);
      store(v, n, x + 32 * first);
    });
  };
  with_dtype(d, [=](auto* d) {
    with_dtype(x, [=](auto* x) { run(d, x); });
  });
}

}  // namespace

const OpTable cpu_ops = {
    quantize_forward,
    quantize_backward,
    requantize_transposed,
    dequantize,
    unrotate,
};

void scale_values(const float* c, int64_t n, float alpha, FloatMatrix out) {
  with_dtype(out, [=](auto* out) {
    const auto run = [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        store_float(out[i], alpha * c[i]);
    };
    torch::stable::parallel_for(0, n, MIN_VALUES_PER_THREAD, run);
  });
}
