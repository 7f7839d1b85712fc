/*
What the operations of bind.cpp and bind_gemm.h do with tensors before and after a kernel runs: they
check the arguments, allocate the results, and find the functions and the stream of a device.

All checks of arguments are made with this file; the kernels trust their callers. It is included by
bind.cpp and columns_bind.cpp.
*/
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <stdexcept>
#include <string>
#include "ops.h"
#include "scale_tiles.cuh"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- CHECK(condition, parts of a sentence...) throws the sentence if the condition is false

// The sentence is put together without a stream, because std::ostringstream crashes in a library
// into which the compiler has linked a part of libstdc++ (seen with Ubuntu 24.04's g++ 13 and
// torch 2.11).
std::string text(std::string s) { return s; }

std::string text(int64_t n) { return std::to_string(n); }

template <class... Parts>
std::string sentence(const Parts&... parts) { return (text(parts) + ...); }

#define CHECK(condition, ...) \
  if (!(condition))           \
    throw std::runtime_error("fp4: " + sentence(__VA_ARGS__))

// ---- checks of one tensor

std::string dtype_name(const Tensor& t) { return torch::headeronly::toString(t.scalar_type()); }

bool is_float_or_bfloat16(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16;
}

void check_tensor(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
  const bool has_form = t.dim() == dim && t.scalar_type() == dtype;
  CHECK(
      has_form && t.is_contiguous(),
      name, " must be contiguous, with ", dim, " dimension(s) of ",
      torch::headeronly::toString(dtype), ", got ", t.dim(), " of ", dtype_name(t));
}

// The kernels of a GPU read 16 bytes at a time.
void check_aligned(const Tensor& t, const char* name) {
  const bool is_aligned = uintptr_t(t.data_ptr()) % 16 == 0;
  CHECK(
      !t.is_cuda() || is_aligned,
      name, " must begin at a multiple of 16 bytes: clone it");
}

// x is a matrix of values whose rows divide into pieces of `multiple`.
void check_matrix(const Tensor& x, int64_t multiple) {
  const bool is_matrix = x.dim() == 2 && x.is_contiguous();
  CHECK(
      is_float_or_bfloat16(x.scalar_type()) && is_matrix,
      "x must be a contiguous float32 or bfloat16 matrix, got ",
      x.dim(), " dimension(s) of ", dtype_name(x));
  check_aligned(x, "x");
  CHECK(
      x.size(1) % multiple == 0,
      "the last dimension must be a multiple of ", multiple, ", got ", x.size(1));
}

// x is what Quartet's quantisers take: its rows divide into blocks of 32.
void check_blocks(const Tensor& x) { check_matrix(x, 32); }

// ---- checks of tensors that belong together

void check_same_device(const Tensor& x, const Tensor& t, const char* name) {
  const bool is_same = t.is_cuda() == x.is_cuda() && t.get_device() == x.get_device();
  CHECK(is_same, name, " is on another device");
}

// A packed matrix.
void check_packed(const Tensor& codes, const Tensor& scales) {
  check_tensor(codes, "codes", 2, ScalarType::Byte);
  check_tensor(scales, "scales", 2, ScalarType::Byte);
  check_same_device(codes, scales, "scales");
  check_aligned(codes, "codes");
  const bool same_rows = codes.size(0) == scales.size(0);
  const bool same_blocks = codes.size(1) == 16 * scales.size(1);
  CHECK(
      same_rows && same_blocks,
      "codes [M, K/2] and scales [M, K/32] do not match: [",
      codes.size(0), ", ", codes.size(1), "], [", scales.size(0), ", ", scales.size(1), "]");
}

// b, packed, is the right operand of a product a @ b.T whose left operand has K columns.
void check_right_operand(const Tensor& b, const Tensor& b_scales, const Tensor& a, int64_t K) {
  check_packed(b, b_scales);
  check_same_device(a, b, "b");
  CHECK(
      2 * b.size(1) == K,
      "the products' inner dimensions differ: ", K, " and ", 2 * b.size(1));
}

// `name` is what the mask belongs to: a matrix [M, K] on the device of x.
void check_mask(
    const Tensor& mask, const Tensor& x, int64_t M, int64_t K, const char* name = "d") {
  check_tensor(mask, "mask", 2, ScalarType::Int);
  check_same_device(x, mask, "mask");
  CHECK(
      mask.size(0) == M && 32 * mask.size(1) == K,
      "mask [M, K/32] does not match ", name, " [M, K]");
}

// t holds the n sign words or the n seeds with which x is quantised.
void check_random(const Tensor& x, const Tensor& t, const char* name, int64_t n) {
  check_tensor(t, name, 1, ScalarType::Long);
  check_same_device(x, t, name);
  CHECK(t.numel() == n, name, " must have ", n, " element(s), got ", t.numel());
}

// ---- arguments that are the numbers of words, in the order of the lists in fp4/ops.py

// Returns whether the scale is rounded to the nearest power of two, rather than down.
bool parse_scale(int64_t scale) {
  CHECK(scale == 0 || scale == 1, "scale must be 0 (floor) or 1 (nearest), got ", scale);
  return scale == 1;
}

SignOrder parse_sign_order(int64_t number) {
  CHECK(
      number >= 0 && number <= 2,
      "sign_order must be 0 (before), 1 (after) or 2 (none), got ", number);
  return SignOrder(number);
}

// `fp8` is what the word "fp8" stands for: the format of a left or of a right operand.
OperandFormat parse_operand_format(int64_t number, OperandFormat fp8) {
  CHECK(
      number >= 0 && number <= 2,
      "operand_format must be 0 (packed), 1 (mxf4) or 2 (fp8), got ", number);
  return number == 2 ? fp8 : OperandFormat(number);
}

// ---- the data of a tensor

FloatMatrix float_matrix(const Tensor& x) {
  CHECK(is_float_or_bfloat16(x.scalar_type()), "dtype must be float32 or bfloat16");
  void* data = x.data_ptr();
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  return {data, is_bf16};
}

uint8_t* bytes(const Tensor& t) { return (uint8_t*)t.data_ptr(); }

int32_t* words(const Tensor& t) { return (int32_t*)t.data_ptr(); }

int64_t* longs(const Tensor& t) { return (int64_t*)t.data_ptr(); }

float* floats(const Tensor& t) { return (float*)t.data_ptr(); }

// ---- allocation, each on the device of `like`

Tensor new_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return torch::stable::new_empty(like, {rows, columns}, dtype);
}

Tensor new_codes(const Tensor& like, int64_t M, int64_t K) {
  return new_matrix(like, M, K / 2, ScalarType::Byte);
}

Tensor new_scales(const Tensor& like, int64_t M, int64_t K) {
  return new_matrix(like, M, K / 32, ScalarType::Byte);
}

Tensor new_mask(const Tensor& like, int64_t M, int64_t K) {
  return new_matrix(like, M, K / 32, ScalarType::Int);
}

// The scales of a matrix [M, K] in the layout of scale_tiles.cuh.
Tensor new_scale_tiles(const Tensor& like, int64_t M, int64_t K) {
  return torch::stable::new_empty(like, {mxfp4::scale_tiles_bytes(M, K / 32)}, ScalarType::Byte);
}

// The two tensors of a product's operand, in any format.
struct Operand {
  Tensor values;
  Tensor scales;
};

// The FP8 tiles of fp8_tiles.cuh, 128 x 128 values each. A tile has a scale for each row if the
// operand is the left one, and a scale for each 32 rows if it is the right one.
constexpr int64_t FP8_TILE_SIDE = 128;

int64_t scales_per_fp8_tile(OperandFormat format) {
  return format == OperandFormat::fp8_left ? 128 : 4;
}

Operand new_fp8_tiles(const Tensor& like, int64_t M, int64_t K, OperandFormat format) {
  const int64_t rows = mxfp4::ceil_div(M, FP8_TILE_SIDE);
  const int64_t columns = mxfp4::ceil_div(K, FP8_TILE_SIDE);
  const int64_t n_values = FP8_TILE_SIDE * FP8_TILE_SIDE;
  const int64_t n_scales = scales_per_fp8_tile(format);
  const Tensor values =
      torch::stable::new_empty(like, {rows, columns, n_values}, ScalarType::Byte);
  const Tensor scales =
      torch::stable::new_empty(like, {rows, columns, n_scales}, ScalarType::Float);
  return {values, scales};
}

Operand new_operand(const Tensor& like, int64_t M, int64_t K, OperandFormat format) {
  CHECK(format == OperandFormat::packed || like.is_cuda(), "tiles are for a GPU");
  if (format == OperandFormat::fp8_left || format == OperandFormat::fp8_right)
    return new_fp8_tiles(like, M, K, format);
  const bool in_tiles = format == OperandFormat::mxf4;
  const Tensor codes = new_codes(like, M, K);
  const Tensor scales = in_tiles ? new_scale_tiles(like, M, K) : new_scales(like, M, K);
  return {codes, scales};
}

// The columns of a transposed matrix: M rounded up to whole blocks.
int64_t padded_to_blocks(int64_t M) { return 32 * mxfp4::ceil_div(M, 32); }

// ---- the device

// On a GPU, torch's current stream. As long as the object lives, the GPU of the tensor is the
// current one. When it dies, the operation has made all its launches, and an error of one of them
// is raised.
struct CurrentDevice {
  void* stream = nullptr;
#ifdef USE_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard;

  explicit CurrentDevice(const Tensor& x) {
    if (!x.is_cuda())
      return;
    const auto index = x.get_device_index();
    guard.emplace(index);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }

  ~CurrentDevice() noexcept(false) {
    const char* error = guard ? launch_error() : nullptr;
    CHECK(!error, "a kernel did not start: ", error);
  }
#else
  explicit CurrentDevice(const Tensor&) {}
#endif
};

// The same, with the functions for this device.
struct Device : CurrentDevice {
  const OpTable* ops = &cpu_ops;

  explicit Device(const Tensor& x) : CurrentDevice(x) {
#ifdef USE_CUDA
    if (x.is_cuda())
      ops = &cuda_ops;
#endif
  }
};

}  // namespace
