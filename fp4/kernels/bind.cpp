/*
The compiled operations of torch.ops.fp4: each checks its arguments, allocates its results, and
calls the kernel for the device of its tensors. Their schemas and their versions in Python are in
fp4/ops.py. Products are in bind_cpu.h, and those of GPUs that have one of our own in bind_gemm.h.

They are written against torch's stable ABI (torch/csrc/stable), which compiles in seconds and needs
nothing but the CPU's wheel of torch. No argument is a string, because that ABI leaks every string
that crosses it. A setting is the number of a word; fp4/ops.py has the words.
*/
#include <tuple>
#include "bind_cpu.h"
#include "bind_gemm.h"
#include "bind_tensors.h"

namespace {

// ---- the operations that a CPU and every GPU have

std::tuple<Tensor, Tensor, Tensor> quantize_forward(const Tensor& x, int64_t scale) {
  check_blocks(x);
  const bool nearest = parse_scale(scale);
  const int64_t M = x.size(0);
  const int64_t K = x.size(1);
  Tensor codes = new_codes(x, M, K);
  Tensor scales = new_scales(x, M, K);
  Tensor mask = new_mask(x, M, K);
  const Device device(x);
  device.ops->quantize_forward(
      float_matrix(x),
      M,
      K,
      nearest,
      bytes(codes),
      bytes(scales),
      words(mask),
      device.stream);
  return {codes, scales, mask};
}

// x [M, K] -> an operand of x, and an operand of x.T, where M is padded to whole blocks. Both
// belong to gradient products, in which x is on the left.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_backward(
    const Tensor& x,
    const Tensor& signs,
    const Tensor& seeds,
    bool stochastic,
    int64_t sign_order,
    int64_t sign_order_t,
    int64_t operand_format) {
  check_blocks(x);
  check_random(x, signs, "signs", 1);
  check_random(x, seeds, "seeds", 2);
  const int64_t M = x.size(0);
  const int64_t K = x.size(1);
  const OperandFormat format = parse_operand_format(operand_format, OperandFormat::fp8_left);
  const Operand rows = new_operand(x, M, K, format);
  const Operand columns = new_operand(x, K, padded_to_blocks(M), format);
  const Device device(x);
  BackwardParams params;
  params.signs = longs(signs);
  params.row_order = parse_sign_order(sign_order);
  params.column_order = parse_sign_order(sign_order_t);
  params.stochastic = stochastic;
  params.format = format;
  device.ops->quantize_backward(
      float_matrix(x),
      M,
      K,
      params,
      longs(seeds),
      rows.values.data_ptr(),
      rows.scales.data_ptr(),
      columns.values.data_ptr(),
      columns.scales.data_ptr(),
      device.stream);
  return std::make_tuple(rows.values, rows.scales, columns.values, columns.scales);
}

// A packed matrix [M, K] -> an operand of its transpose, which is on the right of a gradient
// product.
std::tuple<Tensor, Tensor> requantize_transposed(
    const Tensor& codes,
    const Tensor& scales,
    const Tensor& signs,
    const Tensor& seed,
    bool stochastic,
    int64_t sign_order,
    int64_t operand_format) {
  check_packed(codes, scales);
  check_random(codes, signs, "signs", 1);
  check_random(codes, seed, "seed", 1);
  const int64_t M = codes.size(0);
  const int64_t K = 2 * codes.size(1);
  const OperandFormat format = parse_operand_format(operand_format, OperandFormat::fp8_right);
  const Operand columns = new_operand(codes, K, padded_to_blocks(M), format);
  const Device device(codes);
  BackwardParams params;
  params.signs = longs(signs);
  params.row_order = SignOrder::none;  // the rows are not quantised
  params.column_order = parse_sign_order(sign_order);
  params.stochastic = stochastic;
  params.format = format;
  device.ops->requantize_transposed(
      bytes(codes),
      bytes(scales),
      M,
      K,
      params,
      longs(seed),
      columns.values.data_ptr(),
      columns.scales.data_ptr(),
      device.stream);
  return std::make_tuple(columns.values, columns.scales);
}

Tensor dequantize(const Tensor& codes, const Tensor& scales, ScalarType dtype) {
  check_packed(codes, scales);
  const int64_t M = codes.size(0);
  const int64_t K = 2 * codes.size(1);
  Tensor x = new_matrix(codes, M, K, dtype);
  const Device device(codes);
  device.ops->dequantize(
      bytes(codes),
      bytes(scales),
      M,
      K,
      float_matrix(x),
      device.stream);
  return x;
}

Tensor unrotate(const Tensor& d, const Tensor& mask, ScalarType dtype) {
  check_blocks(d);
  const int64_t M = d.size(0);
  const int64_t K = d.size(1);
  check_mask(mask, d, M, K);
  Tensor x = new_matrix(d, M, K, dtype);
  const Device device(d);
  device.ops->unrotate(
      float_matrix(d),
      words(mask),
      M,
      K,
      float_matrix(x),
      device.stream);
  return x;
}

// Packed x [M, K] and w [N, K] -> x @ w.T [M, N], for few rows M.
Tensor matvec(
    const Tensor& x,
    const Tensor& x_scales,
    const Tensor& w,
    const Tensor& w_scales,
    ScalarType dtype) {
  check_packed(x, x_scales);
  const int64_t M = x.size(0);
  const int64_t N = w.size(0);
  const int64_t K = 2 * x.size(1);
  check_right_operand(w, w_scales, x, K);
  CHECK(M <= MATVEC_ROWS, "matvec multiplies at most ", MATVEC_ROWS, " rows, got ", M);
  Tensor y = new_matrix(x, M, N, dtype);
  const Device device(x);
  device.ops->matvec(
      bytes(x),
      bytes(x_scales),
      bytes(w),
      bytes(w_scales),
      M,
      N,
      K,
      float_matrix(y),
      device.stream);
  return y;
}

// ---- an operation of GPUs alone

#ifdef USE_CUDA
// A packed matrix [M, K] -> E4M3 [M, K] and one float32 scale a row [M, 1], which includes alpha.
// It is for a library's FP8 product: see backend.py.
std::tuple<Tensor, Tensor> packed_to_fp8(
    const Tensor& codes,
    const Tensor& scales,
    double alpha) {
  check_packed(codes, scales);
  const int64_t M = codes.size(0);
  const int64_t K = 2 * codes.size(1);
  Tensor fp8 = new_matrix(codes, M, K, ScalarType::Float8_e4m3fn);
  Tensor row_scales = new_matrix(codes, M, 1, ScalarType::Float);
  const Device device(codes);
  packed_to_fp8_rows(
      bytes(codes),
      bytes(scales),
      M,
      K,
      float(alpha),
      bytes(fp8),
      floats(row_scales),
      device.stream);
  return {fp8, row_scales};
}
#endif

// ---- registration

template <class Library>
void register_common(Library& library) {
  library.impl("quantize_forward", TORCH_BOX(&quantize_forward));
  library.impl("quantize_backward", TORCH_BOX(&quantize_backward));
  library.impl("requantize_transposed", TORCH_BOX(&requantize_transposed));
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("unrotate", TORCH_BOX(&unrotate));
  library.impl("matvec", TORCH_BOX(&matvec));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, library) {
  register_common(library);
  library.impl("gemm", TORCH_BOX(&gemm_cpu));
  library.impl("gemm_unrotate", TORCH_BOX(&gemm_unrotate_cpu));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fp4, CUDA, library) {
  register_common(library);
  library.impl("packed_to_fp8", TORCH_BOX(&packed_to_fp8));
  register_gemm(library);
}
#endif
