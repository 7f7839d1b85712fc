/*
The operations of a CPU that multiply packed matrices. MXFP4's values are exact in float32, so the
operands are unpacked, and torch's library multiplies them.

Unpacked, a gradient of 2,048 x 704 values is 6 MB, and a core takes longer to write that much to
memory and to read it again than to unpack it. So the left operand is unpacked in tiles that stay in
the core's cache, and the result is finished while it is there, too. A thread has some rows of the
left operand, and walks along them tile by tile. The right operand, which all threads read, is
unpacked whole. It is the smaller one: a weight, or the input of a layer.

This file is included by bind.cpp only.
*/
#pragma once
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>  // addmm with a given output
#include <algorithm>
#include "bind_tensors.h"

namespace {

// 256 x 512 values are 512 KB. With fewer rows the library rearranges the right operand too often.
constexpr int64_t TILE_ROWS = 256;
constexpr int64_t TILE_COLUMNS = 512;

// The rows of a tile: fewer, if otherwise a thread would have none.
int64_t tile_rows(int64_t M) {
  const int64_t per_thread = mxfp4::ceil_div(M, torch::stable::get_num_threads());
  const int64_t rounded = 16 * mxfp4::ceil_div(per_thread, 16);
  return std::clamp<int64_t>(rounded, 16, TILE_ROWS);
}

// The matrix x from a row on. It has `columns` columns.
FloatMatrix from_row(FloatMatrix x, int64_t row, int64_t columns) {
  const int64_t bytes_per_value = x.is_bf16 ? 2 : 4;
  uint8_t* data = (uint8_t*)x.data + row * columns * bytes_per_value;
  return {data, x.is_bf16};
}

// product = a @ b.T for the rows of a from `first` on, as many as the product has.
void multiply_rows(
    const Operand& a,  // packed [M, K]
    const Tensor& b,   // [N, K] in float32
    int64_t first,
    float* tile,              // room for the values of a tile of a
    const Tensor& product) {  // [rows, N]
  const int64_t K = b.size(1);
  const int64_t rows = product.size(0);
  Tensor b_view = b;
  int64_t k = 0;
  do {
    const int64_t columns = std::min(TILE_COLUMNS, K - k);
    dequantize_tile(bytes(a.values), bytes(a.scales), K, first, k, rows, columns, tile);
    const Tensor left = torch::stable::from_blob(
        tile, {rows, columns}, {columns, 1}, b.device(), ScalarType::Float);
    Tensor b_tile = torch::stable::narrow(b_view, 1, k, columns);
    const Tensor right = torch::stable::transpose(b_tile, 0, 1);
    const double beta = k == 0 ? 0 : 1;  // 0: what the product holds is not read
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(
        product.get(), product.get(), left.get(), right.get(), beta, 1));
    k += columns;
  } while (k < K);
}

// out = a @ b.T, after finish(product, first, rows) has made of some rows of the product, from row
// `first` on, those rows of out. They lie in out already if that is float32.
template <class F>
void multiply(
    const Operand& a,  // packed [M, K]
    const Operand& b,  // packed [N, K]
    const Tensor& out,  // [M, N]
    F finish) {
  const int64_t M = out.size(0);
  const int64_t N = out.size(1);
  const int64_t K = 2 * a.values.size(1);
  const bool is_in_out = out.scalar_type() == ScalarType::Float;
  const Tensor b_values = new_matrix(out, N, K, ScalarType::Float);
  cpu_ops.dequantize(bytes(b.values), bytes(b.scales), N, K, float_matrix(b_values), nullptr);
  const int64_t rows_of_tile = tile_rows(M);
  const auto run = [&](int64_t begin, int64_t end) {
    const Tensor tile = new_matrix(out, rows_of_tile, TILE_COLUMNS, ScalarType::Float);
    Tensor products = is_in_out ? out : new_matrix(out, rows_of_tile, N, ScalarType::Float);
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i * rows_of_tile;
      const int64_t rows = std::min(rows_of_tile, M - first);
      const Tensor product = torch::stable::narrow(products, 0, is_in_out ? first : 0, rows);
      multiply_rows(a, b_values, first, floats(tile), product);
      finish(floats(product), first, rows);
    }
  };
  torch::stable::parallel_for(0, mxfp4::ceil_div(M, rows_of_tile), 1, run);
}

// a [M, K] and b [N, K], both packed -> alpha * a @ b.T [M, N]
Tensor gemm_cpu(
    const Tensor& a,
    const Tensor& a_scales,
    const Tensor& b,
    const Tensor& b_scales,
    double alpha,
    ScalarType dtype) {
  check_packed(a, a_scales);
  check_right_operand(b, b_scales, a, 2 * a.size(1));
  const int64_t N = b.size(0);
  const Tensor out = new_matrix(a, a.size(0), N, dtype);
  const FloatMatrix to = float_matrix(out);
  const bool is_finished = alpha == 1 && !to.is_bf16;
  const auto finish = [&](const float* product, int64_t first, int64_t rows) {
    if (!is_finished)
      scale_values(product, rows * N, float(alpha), from_row(to, first, N));
  };
  multiply({a, a_scales}, {b, b_scales}, out, finish);
  return out;
}

// The same, masked and rotated back.
Tensor gemm_unrotate_cpu(
    const Tensor& a,
    const Tensor& a_scales,
    const Tensor& b,
    const Tensor& b_scales,
    const Tensor& mask,
    double alpha,
    ScalarType dtype) {
  check_packed(a, a_scales);
  check_right_operand(b, b_scales, a, 2 * a.size(1));
  const int64_t N = b.size(0);
  check_mask(mask, a, a.size(0), N);
  const Tensor out = new_matrix(a, a.size(0), N, dtype);
  const FloatMatrix to = float_matrix(out);
  const auto finish = [&](float* product, int64_t first, int64_t rows) {
    const FloatMatrix d = {product, false};
    const int32_t* mask_of_rows = words(mask) + first * N / 32;
    unrotate_product(d, float(alpha), mask_of_rows, rows, N, from_row(to, first, N));
  };
  multiply({a, a_scales}, {b, b_scales}, out, finish);
  return out;
}

}  // namespace
