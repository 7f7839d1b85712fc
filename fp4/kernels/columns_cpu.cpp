/*
The quantiser of a GemmSpec on the CPU. columns.cuh has its arithmetic; here 32 lanes lie side by
side, where a GPU has the threads of a warp. A thread takes a range of such groups.
*/
#include <torch/csrc/stable/ops.h>  // parallel_for, which runs on torch's own threads
#include <atomic>
#include "columns.cuh"
#include "columns.h"

using namespace columns;
using COLUMN_NAME::PackedMatrix;
using COLUMN_NAME::Quantization;

namespace {

struct SideBySide {
  static constexpr int W = 32;
  using Group = Block<W>;

  static int lane(int w) { return w; }

  static void exchange(const float (&x)[W], int n, float (&other)[W]) {
    for (int w = 0; w < W; w++)
      other[w] = x[w ^ n];
  }

  static void round_nearest(Group& u) { nearest_elements<SideBySide>(u); }

  static void round_stochastically(Group& u, const uint32_t (&noise)[8][W]) {
    stochastic_elements<SideBySide>(u, noise);
  }

  static void pack(const Group& elements, uint32_t (&words)[4][W]) {
    pack_elements<SideBySide>(elements, words);
  }
};

using Group = SideBySide::Group;
constexpr int W = SideBySide::W;
constexpr int64_t MIN_GROUPS_PER_THREAD = 4;

// Calls f(row, column) for the corner of each group of lanes. Groups below one another follow one
// another, because of a transposed matrix they read the same lines of the cache.
template <class F>
void for_groups(int64_t rows, int64_t columns, F f) {
  const int64_t down = ceil_div(rows, WARP_ROWS);
  const int64_t across = ceil_div(columns, WARP_COLUMNS);
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++)
      f(group % down * WARP_ROWS, group / down * WARP_COLUMNS);
  };
  torch::stable::parallel_for(0, down * across, MIN_GROUPS_PER_THREAD, run);
}

// Calls f(w, row, column) for the lanes of a group that begin inside [rows, columns].
template <class F>
void for_lanes(int64_t row, int64_t column, int64_t rows, int64_t columns, F f) {
  for (int w = 0; w < W; w++) {
    const int64_t lane_row = row + row_of_lane(w);
    const int64_t lane_column = column + column_of_lane(w);
    if (lane_row < rows && lane_column < columns)
      f(w, lane_row, lane_column);
  }
}

void find_signs(const int64_t* signs, int64_t column, uint32_t (&words)[W]) {
  for (int w = 0; w < W; w++)
    words[w] = SIGNS == Signs::none ? 0 : signs_of_lane(signs, column + column_of_lane(w));
}

// The factor of a row in memory, or of the whole matrix.
float factor_of(const Quantization& op, int64_t memory_row) {
  if (!op.factor)
    return 1;
  return op.factor[op.factor_by_row ? memory_row : 0];
}

template <class T>
float load_value(const Quantization& op, const T* x, int64_t row, int64_t column) {
  const int64_t memory_row = op.transposed ? column : row;
  const int64_t index = op.transposed ? column * op.rows + row : row * op.columns + column;
  return to_float(x[index]) * factor_of(op, memory_row);
}

template <class T>
void load_group(
    const Quantization& op, const T* x, int64_t row, int64_t column, Group& v) {
  memset(v, 0, sizeof(v));
  for_lanes(row, column, op.rows, op.columns, [&](int w, int64_t r, int64_t c) {
    const int64_t end = op.columns - c;
    for (int i = 0; i < 32 && i < end; i++)
      v[i][w] = load_value(op, x, r, c + i);
  });
}

// Element i of the lanes is a piece of 4 rows of the packed matrix, as many as blocks lie side by
// side in a group. The piece is 8 neighbours, a word of codes, which have the same scale.
void load_packed_group(const Quantization& op, int64_t row, int64_t column, Group& v) {
  constexpr int PIECES = WARP_COLUMNS / 32;
  for (int i = 0; i < 32; i++) {
    uint32_t codes[PIECES] = {};
    float scale[PIECES] = {};
    float factor[PIECES] = {};
    for (int j = 0; j < PIECES; j++) {
      const int64_t memory_row = column + 32 * j + i;
      if (memory_row >= op.columns)
        break;
      const int64_t index = memory_row * op.rows + row;
      memcpy(&codes[j], op.packed_x.codes + index / 2, 4);
      scale[j] = e8m0_value(op.packed_x.scales[index / 32]);
      factor[j] = factor_of(op, memory_row);
    }
    for (int r = 0; r < W / PIECES; r++)
      for (int j = 0; j < PIECES; j++) {
        const int code = (codes[j] >> (4 * r)) & 15;
        v[i][r * PIECES + j] = e2m1_value(code) * scale[j] * factor[j];
      }
  }
}

// Loads a group and its signs; what lies beyond the matrix is zero.
void load_values(
    const Quantization& op, int64_t row, int64_t column, Group& v, uint32_t (&signs)[W]) {
  if (op.packed_x.codes)
    load_packed_group(op, row, column, v);
  else
    with_dtype(op.x, [&](auto* x) { load_group(op, x, row, column, v); });
  find_signs(op.signs, column, signs);
}

float largest_magnitude(const Quantization& op) {
  std::atomic<uint32_t> largest = 0;
  for_groups(op.rows, op.padded, [&](int64_t row, int64_t column) {
    Group v;
    uint32_t signs[W];
    float of_lane[W];
    load_values(op, row, column, v, signs);
    rotated_max<SideBySide>(v, signs, of_lane);
    for (int w = 0; w < W; w++) {
      uint32_t known = largest;
      while (bits_of(of_lane[w]) > known &&
             !largest.compare_exchange_weak(known, bits_of(of_lane[w]))) {
      }
    }
  });
  return float_of(largest);
}

void store_values(const Quantization& op, const Group& v, int64_t row, int64_t column) {
  with_dtype(op.values, [&](auto* values) {
    for_lanes(row, column, op.rows, op.padded, [&](int w, int64_t r, int64_t c) {
      for (int i = 0; i < 32; i++)
        store_float(values[r * op.padded + c + i], v[i][w]);
    });
  });
}

void store_packed(
    const Quantization& op, const Group& v, const float (&scale)[W], int64_t row, int64_t column) {
  uint32_t words[4][W];
  pack_codes<SideBySide>(v, scale, words);
  for_lanes(row, column, op.rows, op.padded, [&](int w, int64_t r, int64_t c) {
    const int64_t block = (r * op.padded + c) / 32;
    for (int n = 0; n < 4; n++)
      memcpy(op.packed.codes + 16 * block + 4 * n, &words[n][w], 4);
    op.packed.scales[block] = scale_byte(scale[w]);
  });
}

template <bool packs>
void quantize_group(const Quantization& op, float tensor_scale, int64_t row, int64_t column) {
  Group v;
  uint32_t signs[W];
  Noise<SideBySide> noise;
  Quantized<SideBySide> out;
  load_values(op, row, column, v, signs);
  rotate<SideBySide>(v, signs);
  if (IS_RANDOM) {
    int64_t first[W];
    for (int w = 0; w < W; w++)
      first[w] = (row + row_of_lane(w)) * op.padded + column + column_of_lane(w);
    draw_noise<SideBySide>(op.seed[0], first, noise);
  }
  if (IS_NVFP4)
    quantize_nvfp4<SideBySide>(v, tensor_scale, noise);
  else
    quantize_mx<SideBySide, packs>(v, noise, out);

  if (packs)
    store_packed(op, v, out.scale, row, column);
  else
    store_values(op, v, row, column);
  for_lanes(row, column, op.rows, op.padded, [&](int w, int64_t r, int64_t c) {
    const int64_t block = (r * op.padded + c) / 32;
    if (HAS_MASK)
      op.mask[block] = out.mask[w];
    if (HAS_ROW_FACTOR) {
      op.scratch[block] = out.vv[w];
      op.scratch[op.rows * op.padded / 32 + block] = out.vq[w];
    }
  });
}

// EDEN's factor of each row, from the sums of its blocks, which are added in place in the order of
// sum_blocks().
void find_row_factors(const Quantization& op) {
  const int64_t blocks = op.padded / 32;
  torch::stable::parallel_for(0, op.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float* vv = op.scratch + row * blocks;
      float* vq = vv + op.rows * blocks;
      for (int64_t stride = 1; stride < blocks; stride *= 2)
        for (int64_t i = 0; i + stride < blocks; i += 2 * stride) {
          vv[i] += vv[i + stride];
          vq[i] += vq[i + stride];
        }
      op.out_factor[row] = eden_correction(vv[0], vq[0]);
    }
  });
}

}  // namespace

namespace COLUMN_NAME {

void quantize_on_cpu(const Quantization& op) {
  float factor = CONSTANT_FACTOR;
  if (IS_NVFP4)
    factor = nvfp4_tensor_scale(largest_magnitude(op));
  const auto quantize = CAN_PACK && op.packed.codes ? quantize_group<CAN_PACK>
                                                    : quantize_group<false>;
  for_groups(op.rows, op.padded, [&](int64_t row, int64_t column) {
    quantize(op, factor, row, column);
  });
  if (HAS_ROW_FACTOR)
    find_row_factors(op);
  else
    op.out_factor[0] = factor;
}

void unrotate_on_cpu(const Unrotation& op) {
  const auto run = [&](auto* product, auto* out, int64_t row, int64_t column) {
    Group v = {};
    for_lanes(row, column, op.rows, op.columns, [&](int w, int64_t r, int64_t c) {
      const float left = op.left[op.left_by_row ? r : 0];
      for (int i = 0; i < 32; i++) {
        const float factor = left * op.right[op.right_by_column ? c + i : 0];
        v[i][w] = to_float(product[r * op.columns + c + i]) * factor;
        if (HAS_MASK)
          v[i][w] *= float((op.mask[(r * op.columns + c) / 32] >> i) & 1);
      }
    });
    uint32_t signs[W];
    find_signs(op.signs, column, signs);
    rotate<SideBySide, true>(v, signs);
    for_lanes(row, column, op.rows, op.columns, [&](int w, int64_t r, int64_t c) {
      for (int i = 0; i < 32; i++)
        store_float(out[r * op.columns + c + i], v[i][w]);
    });
  };
  with_dtype(op.product, [&](auto* product) {
    with_dtype(op.out, [&](auto* out) {
      for_groups(op.rows, op.columns, [&](int64_t row, int64_t column) {
        run(product, out, row, column);
      });
    });
  });
}

}  // namespace COLUMN_NAME
