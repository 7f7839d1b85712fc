/*
The operations of a GPU that has a product of our own, alpha * a @ b.T. Which product that is
depends on the GPU, and backend.py chooses it with one macro:

    GEMM_FP32       gemm_fp32.cu, for GPUs before Ampere. It takes packed operands, so that only
                    the operation `gemm` differs from other GPUs.
    GEMM_SM90       gemm_sm90.cu, for Hopper. Its operands are FP8 tiles, and it can unrotate its
                    result.
    GEMM_MXF4=name  gemm_sm100.cu or gemm_sm120.cu, for Blackwell; `name` is the function. Its
                    operands are packed, but with their scales in tiles.
    none of these   A library multiplies: backend.py registers a `gemm` written in Python.

Whatever the macro, register_gemm() registers the operations that exist. This file is included by
bind.cpp only.
*/
#pragma once
#include <tuple>
#include "bind_tensors.h"

namespace {

#if defined(GEMM_FP32)

// a [M, K] and b [N, K], both packed -> [M, N]
Tensor gemm_cuda(
    const Tensor& a,
    const Tensor& a_scales,
    const Tensor& b,
    const Tensor& b_scales,
    double alpha,
    ScalarType dtype) {
  check_packed(a, a_scales);
  const int64_t M = a.size(0);
  const int64_t N = b.size(0);
  const int64_t K = 2 * a.size(1);
  check_right_operand(b, b_scales, a, K);
  const Device device(a);
  Tensor out = new_matrix(a, M, N, dtype);
  gemm_fp32(
      bytes(a),
      bytes(a_scales),
      bytes(b),
      bytes(b_scales),
      M,
      N,
      K,
      float(alpha),
      float_matrix(out),
      device.stream);
  return out;
}

template <class Library>
void register_gemm(Library& library) {
  library.impl("gemm", TORCH_BOX(&gemm_cuda));
}

#elif defined(GEMM_SM90) || defined(GEMM_MXF4)

// ---- what differs between Hopper and Blackwell: six definitions with the same names
//
//   LEFT, RIGHT           the formats of the operands
//   new_left_operand()    allocates what quantize_forward_operand() writes
//   to_gemm_operand()     makes an operand of a packed matrix
//   check_gemm_operand()  checks an operand that is already in its format
//   multiply()            runs the product, and unrotates the result if there is a mask

#if defined(GEMM_SM90)

constexpr OperandFormat LEFT = OperandFormat::fp8_left;
constexpr OperandFormat RIGHT = OperandFormat::fp8_right;

Operand new_left_operand(const Tensor& x, const Tensor& codes) {
  return new_operand(x, x.size(0), x.size(1), LEFT);
}

Operand to_gemm_operand(
    const Tensor& codes,
    const Tensor& scales,
    OperandFormat format,
    const Device& device) {
  const int64_t rows = codes.size(0);
  const int64_t K = 2 * codes.size(1);
  const bool right = format == RIGHT;
  const Operand to = new_operand(codes, rows, K, format);
  packed_to_fp8_tiles(
      bytes(codes),
      bytes(scales),
      rows,
      K,
      right,
      to.values.data_ptr(),
      floats(to.scales),
      device.stream);
  return to;
}

void check_gemm_operand(const Operand& operand, int64_t rows, OperandFormat format) {
  check_tensor(operand.values, "an operand", 3, ScalarType::Byte);
  check_tensor(operand.scales, "its scales", 3, ScalarType::Float);
  check_aligned(operand.values, "an operand");
  check_aligned(operand.scales, "its scales");
  const int64_t tile_rows = mxfp4::ceil_div(rows, FP8_TILE_SIDE);
  const int64_t tile_columns = operand.values.size(1);
  const auto has_shape = [=](const Tensor& t, int64_t per_tile) {
    const bool same_tiles = t.size(0) == tile_rows && t.size(1) == tile_columns;
    return same_tiles && t.size(2) == per_tile;
  };
  CHECK(
      has_shape(operand.values, FP8_TILE_SIDE * FP8_TILE_SIDE) &&
          has_shape(operand.scales, scales_per_fp8_tile(format)),
      "an operand's tiles and scales are not those of ", rows, " rows");
}

// The kernel unrotates its result before it stores it, 16 bytes at a time. If it cuts K into
// several parts, it needs room for the partial sums.
Tensor multiply(
    const Operand& a,
    const Operand& b,
    int64_t M,
    int64_t N,
    const Tensor* mask,  // [M, N/32], or nullptr
    double alpha,
    ScalarType dtype,
    const Device& device) {
  CHECK(N % 8 == 0, "the rows of b must be a multiple of 8, got ", N);
  const int64_t K = FP8_TILE_SIDE * a.values.size(1);
  const int splits = gemm_sm90_splits(M, N, K);
  const int64_t partial_rows = splits > 1 ? 16 * splits * mxfp4::ceil_div(M, 16) : 0;
  Tensor out = new_matrix(a.values, M, N, dtype);
  Tensor partial = new_matrix(a.values, partial_rows, N, ScalarType::Float);
  gemm_sm90(
      bytes(a.values),
      floats(a.scales),
      bytes(b.values),
      floats(b.scales),
      M,
      N,
      K,
      float(alpha),
      mask ? words(*mask) : nullptr,
      floats(partial),
      splits,
      float_matrix(out),
      device.stream);
  return out;
}

#else  // GEMM_MXF4

constexpr OperandFormat LEFT = OperandFormat::mxf4;
constexpr OperandFormat RIGHT = OperandFormat::mxf4;

// The codes of the packed matrix are those of the operand.
Operand new_left_operand(const Tensor& x, const Tensor& codes) {
  return {codes, new_scale_tiles(x, x.size(0), x.size(1))};
}

Operand to_gemm_operand(
    const Tensor& codes,
    const Tensor& scales,
    OperandFormat,
    const Device& device) {
  const Tensor tiles = new_scale_tiles(scales, codes.size(0), 2 * codes.size(1));
  swizzle_scales(
      bytes(scales),
      scales.size(0),
      scales.size(1),
      bytes(tiles),
      device.stream);
  return {codes, tiles};
}

void check_gemm_operand(const Operand& operand, int64_t rows, OperandFormat) {
  check_tensor(operand.values, "an operand", 2, ScalarType::Byte);
  check_tensor(operand.scales, "its scales", 1, ScalarType::Byte);
  check_aligned(operand.values, "an operand");
  check_aligned(operand.scales, "its scales");
  const int64_t blocks = operand.values.size(1) / 16;
  const int64_t scale_bytes = mxfp4::scale_tiles_bytes(rows, blocks);
  const bool codes_match = operand.values.size(0) == rows && operand.values.size(1) % 16 == 0;
  const bool scales_match = operand.scales.numel() == scale_bytes;
  CHECK(
      codes_match && scales_match,
      "an operand's codes and scale tiles are not those of ", rows, " rows");
}

// The operation of this name, in bind.cpp.
Tensor unrotate(const Tensor& d, const Tensor& mask, ScalarType dtype);

// The kernel cannot unrotate. If the result is to be unrotated, it stays in float32 until then.
Tensor multiply(
    const Operand& a,
    const Operand& b,
    int64_t M,
    int64_t N,
    const Tensor* mask,  // [M, N/32], or nullptr
    double alpha,
    ScalarType dtype,
    const Device& device) {
  const int64_t K = 2 * a.values.size(1);
  Tensor out = new_matrix(a.values, M, N, mask ? ScalarType::Float : dtype);
  GEMM_MXF4(
      bytes(a.values),
      bytes(a.scales),
      bytes(b.values),
      bytes(b.scales),
      M,
      N,
      K,
      float(alpha),
      float_matrix(out),
      device.stream);
  if (!mask)
    return out;
  return unrotate(out, *mask, dtype);
}

#endif  // GEMM_SM90 or GEMM_MXF4

// ---- the operations of both

// a [M, K] and b [N, K], both packed -> [M, N]
Tensor gemm_cuda(
    const Tensor& a,
    const Tensor& a_scales,
    const Tensor& b,
    const Tensor& b_scales,
    double alpha,
    ScalarType dtype) {
  check_packed(a, a_scales);
  check_right_operand(b, b_scales, a, 2 * a.size(1));
  const Device device(a);
  const Operand right = to_gemm_operand(b, b_scales, RIGHT, device);
  const Operand left = to_gemm_operand(a, a_scales, LEFT, device);
  return multiply(left, right, a.size(0), b.size(0), nullptr, alpha, dtype, device);
}

// x [M, K] and b [N, K], which is packed -> the quantised x @ b.T [M, N]; codes, scales and mask
// of x. The quantiser writes x packed, for the backward pass, and what the product's operand needs
// besides (ops.h), and so saves the pass that would read the packed matrix again.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_gemm(
    const Tensor& x,
    int64_t scale,
    const Tensor& b,
    const Tensor& b_scales) {
  check_blocks(x);
  const bool nearest = parse_scale(scale);
  const int64_t M = x.size(0);
  const int64_t K = x.size(1);
  check_right_operand(b, b_scales, x, K);
  Tensor codes = new_codes(x, M, K);
  Tensor scales = new_scales(x, M, K);
  Tensor mask = new_mask(x, M, K);
  const Operand left = new_left_operand(x, codes);
  const Device device(x);
  quantize_forward_operand(
      float_matrix(x),
      M,
      K,
      nearest,
      bytes(codes),
      bytes(scales),
      words(mask),
      LEFT,
      left.values.data_ptr(),
      left.scales.data_ptr(),
      device.stream);
  const Operand right = to_gemm_operand(b, b_scales, RIGHT, device);
  Tensor y = multiply(left, right, M, b.size(0), nullptr, 1, x.scalar_type(), device);
  return {y, codes, scales, mask};
}

// a [M, K] in format LEFT and b [N, K] in format RIGHT -> alpha * a @ b.T [M, N]. With a mask
// [M, N/32] the result is masked and unrotated. M and N are arguments because the rows of an
// operand in tiles are padded.
Tensor multiply_operands(
    const Operand& left,
    const Operand& right,
    int64_t M,
    int64_t N,
    const Tensor* mask,
    double alpha,
    ScalarType dtype) {
  for (const Tensor* t : {&left.scales, &right.values, &right.scales})
    check_same_device(left.values, *t, "one of the operands");
  check_gemm_operand(left, M, LEFT);
  check_gemm_operand(right, N, RIGHT);
  CHECK(left.values.size(1) == right.values.size(1), "the operands' inner dimensions differ");
  const Device device(left.values);
  return multiply(left, right, M, N, mask, alpha, dtype, device);
}

Tensor gemm_operands(
    const Tensor& a,
    const Tensor& a_scales,
    const Tensor& b,
    const Tensor& b_scales,
    int64_t rows,
    int64_t columns,
    double alpha,
    ScalarType dtype) {
  return multiply_operands({a, a_scales}, {b, b_scales}, rows, columns, nullptr, alpha, dtype);
}

Tensor gemm_unrotate(
    const Tensor& a,
    const Tensor& a_scales,
    const Tensor& b,
    const Tensor& b_scales,
    const Tensor& mask,
    double alpha,
    ScalarType dtype) {
  check_tensor(mask, "mask", 2, ScalarType::Int);
  check_same_device(a, mask, "the mask");
  const int64_t M = mask.size(0);
  const int64_t N = 32 * mask.size(1);
  return multiply_operands({a, a_scales}, {b, b_scales}, M, N, &mask, alpha, dtype);
}

template <class Library>
void register_gemm(Library& library) {
  library.impl("gemm", TORCH_BOX(&gemm_cuda));
  library.impl("quantize_gemm", TORCH_BOX(&quantize_gemm));
  library.impl("gemm_operands", TORCH_BOX(&gemm_operands));
  library.impl("gemm_unrotate", TORCH_BOX(&gemm_unrotate));
}

#else  // a library's product

template <class Library>
void register_gemm(Library&) {}

#endif

}  // namespace
