/*
The quantiser of a GemmSpec on the CPU. columns.cuh has its arithmetic; here 32 lanes lie side by
side, where a GPU has the threads of a warp. A thread takes a range of such groups.
*/
#include <torch/csrc/stable/ops.h>  // parallel_for, which runs on torch's own threads
#include <atomic>
#include "columns.cuh"
#include "columns.h"

using namespace columns;

namespace {

struct SideBySide {
  static constexpr int W = 32;

  static int lane(int w) { return w; }

  static void exchange(const float (&x)[W], int n, float (&other)[W]) {
    for (int w = 0; w < W; w++)
      other[w] = x[w ^ n];
  }
};

using Group = Values<SideBySide>;
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

// A value of the operand, times the factor of its matrix or of its row there.
template <class T>
float load_value(const COLUMN_NAME::Quantization& op, const T* x, int64_t row, int64_t column) {
  const int64_t memory_row = op.transposed ? column : row;
  const int64_t index = op.transposed ? column * op.rows + row : row * op.columns + column;
  const float value = to_float(x[index]);
  if (!op.factor)
    return value;
  return value * op.factor[op.factor_by_row ? memory_row : 0];
}

// Loads and rotates a group; what lies beyond the matrix is zero.
template <class T>
void load_rotated(
    const COLUMN_NAME::Quantization& op, const T* x, int64_t row, int64_t column, Group& v) {
  memset(v, 0, sizeof(v));
  for_lanes(row, column, op.rows, op.columns, [&](int w, int64_t r, int64_t c) {
    const int64_t end = op.columns - c;
    for (int i = 0; i < 32 && i < end; i++)
      v[i][w] = load_value(op, x, r, c + i);
  });
  uint32_t signs[W];
  find_signs(op.signs, column, signs);
  rotate<SideBySide>(v, signs);
}

template <class T>
float largest_magnitude(const COLUMN_NAME::Quantization& op, const T* x) {
  std::atomic<uint32_t> largest = 0;
  for_groups(op.rows, op.padded, [&](int64_t row, int64_t column) {
    Group v;
    float of_lane[W];
    load_rotated(op, x, row, column, v);
    max_magnitude(v, of_lane);
    for (int w = 0; w < W; w++) {
      uint32_t known = largest;
      while (bits_of(of_lane[w]) > known &&
             !largest.compare_exchange_weak(known, bits_of(of_lane[w]))) {
      }
    }
  });
  return float_of(largest);
}

template <class T, class U>
void quantize_group(
    const COLUMN_NAME::Quantization& op,
    const T* x,
    float tensor_scale,
    int64_t row,
    int64_t column,
    U* values) {
  Group v;
  Noise<SideBySide> noise;
  Quantized<SideBySide> out;
  load_rotated(op, x, row, column, v);
  if (IS_RANDOM) {
    int64_t first[W];
    for (int w = 0; w < W; w++)
      first[w] = (row + row_of_lane(w)) * op.padded + column + column_of_lane(w);
    draw_noise<SideBySide>(op.seed[0], first, noise);
  }
  if (IS_NVFP4)
    quantize_nvfp4<SideBySide>(v, tensor_scale, noise);
  else
    quantize_mx<SideBySide>(v, noise, out);

  for_lanes(row, column, op.rows, op.padded, [&](int w, int64_t r, int64_t c) {
    for (int i = 0; i < 32; i++)
      store_float(values[r * op.padded + c + i], v[i][w]);
    const int64_t block = (r * op.padded + c) / 32;
    if (HAS_MASK)
      op.mask[block] = out.mask[w];
    if (HAS_ROW_FACTOR) {
      op.scratch[block] = out.vv[w];
      op.scratch[op.rows * op.padded / 32 + block] = out.vq[w];
    }
  });
}

// EDEN's factor of each row, from the sums of its blocks.
void find_row_factors(const COLUMN_NAME::Quantization& op) {
  const int64_t blocks = op.padded / 32;
  torch::stable::parallel_for(0, op.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float* vv = op.scratch + row * blocks;
      float* vq = vv + op.rows * blocks;
      for (int64_t stride = 1; stride < blocks; stride *= 2)
        for (int64_t i = 0; i < blocks; i += 2 * stride) {
          add_pair(vv, blocks, i, stride);
          add_pair(vq, blocks, i, stride);
        }
      op.out_factor[row] = eden_correction(vv[0], vq[0]);
    }
  });
}

}  // namespace

namespace COLUMN_NAME {

void quantize_on_cpu(const Quantization& op) {
  with_dtype(op.x, [&](auto* x) {
    float factor = CONSTANT_FACTOR;
    if (IS_NVFP4)
      factor = nvfp4_tensor_scale(largest_magnitude(op, x));
    with_dtype(op.values, [&](auto* values) {
      for_groups(op.rows, op.padded, [&](int64_t row, int64_t column) {
        quantize_group(op, x, factor, row, column, values);
      });
    });
    if (HAS_ROW_FACTOR)
      find_row_factors(op);
    else
      op.out_factor[0] = factor;
  });
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
