/*
The ops of __init__.py for compiled kernels: every argument check is here, and nowhere below.
Torch's stable ABI (torch/csrc/stable) compiles in seconds and needs nothing but the CPU wheel.
*/
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include "ops.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using std::tuple;

namespace {

// the sentence is put together without a stream: std::ostringstream crashes in a library into which the compiler
// has linked a part of libstdc++ (seen: Ubuntu 24.04's g++ 13 with torch 2.11)
std::string text(const char* s) { return s; }
std::string text(const std::string& s) { return s; }
std::string text(int64_t n) { return std::to_string(n); }
#define CHECK(ok, ...) \
  if (!(ok)) throw std::runtime_error("fp4: " + sentence(__VA_ARGS__))
template <class... Parts> std::string sentence(const Parts&... parts) { return (text(parts) + ...); }

void check_tensor(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
  CHECK(t.dim() == dim && t.scalar_type() == dtype && t.is_contiguous(), name, " must be contiguous, with ", dim,
        " dimension(s) of ", torch::headeronly::toString(dtype), ", got ", t.dim(), " of ", torch::headeronly::toString(t.scalar_type()));
}

void check_blocks(const Tensor& x) {
  const bool ok = x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
  CHECK(ok && x.dim() == 2 && x.is_contiguous(), "x must be a contiguous float32 or bfloat16 matrix, got ",
        x.dim(), " dimension(s) of ", torch::headeronly::toString(x.scalar_type()));
  CHECK(x.size(1) % 32 == 0, "the last dimension must be a multiple of 32, got ", x.size(1));
}

void check_packed(const Tensor& codes, const Tensor& scales) {
  check_tensor(codes, "codes", 2, ScalarType::Byte), check_tensor(scales, "scales", 2, ScalarType::Byte);
  CHECK(codes.size(0) == scales.size(0) && codes.size(1) == 16 * scales.size(1), "codes [M, K/2] and scales [M, K/32] do not match: [",
        codes.size(0), ", ", codes.size(1), "], [", scales.size(0), ", ", scales.size(1), "]");
}

void check_random(const Tensor& t, const char* name, int64_t n) {
  check_tensor(t, name, 1, ScalarType::Long);
  CHECK(t.numel() == n, name, " must have ", n, " element(s), got ", t.numel());
}

Values values(const Tensor& x) { return {x.data_ptr(), x.scalar_type() == ScalarType::BFloat16}; }
uint8_t* bytes(const Tensor& t) { return (uint8_t*)t.data_ptr(); }
int64_t* longs(const Tensor& t) { return (int64_t*)t.data_ptr(); }

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return torch::stable::new_empty(like, {rows, columns}, dtype);
}
Tensor codes(const Tensor& like, int64_t M, int64_t K) { return empty(like, M, K / 2, ScalarType::Byte); }
Tensor scales(const Tensor& like, int64_t M, int64_t K) { return empty(like, M, K / 32, ScalarType::Byte); }
int64_t padded(int64_t M) { return (M + 31) / 32 * 32; }

tuple<Tensor, Tensor, Tensor> quantize_forward(const Tensor& x, std::string scale) {
  check_blocks(x);
  CHECK(scale == "floor" || scale == "nearest", "scale must be floor or nearest, got ", scale);
  const int64_t M = x.size(0), K = x.size(1);
  Tensor c = codes(x, M, K), s = scales(x, M, K), mask = empty(x, M, K / 32, ScalarType::Int);
  cpu::quantize_forward(values(x), M, K, scale == "nearest", bytes(c), bytes(s), (int32_t*)mask.data_ptr());
  return {c, s, mask};
}

tuple<Tensor, Tensor, Tensor, Tensor> quantize_backward(const Tensor& x, const Tensor& signs, const Tensor& seeds,
                                                        bool stochastic, bool signs_after) {
  check_blocks(x), check_random(signs, "signs", 1), check_random(seeds, "seeds", 2);
  const int64_t M = x.size(0), K = x.size(1), Mp = padded(M);
  Tensor c = codes(x, M, K), s = scales(x, M, K), ct = codes(x, K, Mp), st = scales(x, K, Mp);
  cpu::quantize_backward(values(x), M, K, {uint32_t(*longs(signs)), signs_after, stochastic}, longs(seeds),
                         bytes(c), bytes(s), bytes(ct), bytes(st));
  return {c, s, ct, st};
}

tuple<Tensor, Tensor> requantize(const Tensor& c, const Tensor& s, const Tensor& signs, const Tensor& seed,
                                 bool stochastic, bool signs_after) {
  check_packed(c, s), check_random(signs, "signs", 1), check_random(seed, "seed", 1);
  const int64_t M = c.size(0), K = 2 * c.size(1), Mp = padded(M);
  Tensor ct = codes(c, K, Mp), st = scales(c, K, Mp);
  cpu::requantize(bytes(c), bytes(s), M, K, {uint32_t(*longs(signs)), signs_after, stochastic}, longs(seed), bytes(ct), bytes(st));
  return {ct, st};
}

Tensor dequantize(const Tensor& c, const Tensor& s, ScalarType dtype) {
  check_packed(c, s);
  CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be float32 or bfloat16");
  Tensor x = empty(c, c.size(0), 2 * c.size(1), dtype);
  cpu::dequantize(bytes(c), bytes(s), x.size(0), x.size(1), values(x));
  return x;
}

// the operands are exact in float32; the library multiplies them
Tensor gemm(const Tensor& a, const Tensor& as, const Tensor& b, const Tensor& bs, double alpha, ScalarType dtype) {
  check_packed(a, as), check_packed(b, bs);
  CHECK(a.size(1) == b.size(1), "the products' inner dimensions differ: ", 2 * a.size(1), " and ", 2 * b.size(1));
  Tensor x = dequantize(a, as, ScalarType::Float), y = dequantize(b, bs, ScalarType::Float);
  Tensor c = torch::stable::matmul(x, torch::stable::transpose(y, 0, 1));
  Tensor out = empty(c, c.size(0), c.size(1), dtype);
  cpu::scale((float*)c.data_ptr(), c.numel(), float(alpha), values(out));
  return out;
}

Tensor unrotate(const Tensor& d, const Tensor& mask, ScalarType dtype) {
  check_blocks(d), check_tensor(mask, "mask", 2, ScalarType::Int);
  CHECK(mask.size(0) == d.size(0) && 32 * mask.size(1) == d.size(1), "mask [M, K/32] does not match d [M, K]");
  Tensor x = empty(d, d.size(0), d.size(1), dtype);
  cpu::unrotate(values(d), (int32_t*)mask.data_ptr(), d.size(0), d.size(1), values(x));
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, m) {
  m.impl("quantize_forward", TORCH_BOX(&quantize_forward));
  m.impl("quantize_backward", TORCH_BOX(&quantize_backward));
  m.impl("requantize", TORCH_BOX(&requantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("unrotate", TORCH_BOX(&unrotate));
}
