/*
The ops of __init__.py for compiled kernels: every argument check is here, and nowhere below.
Torch's stable ABI (torch/csrc/stable) compiles in seconds and needs nothing but the CPU wheel.
*/
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <optional>
#include <stdexcept>
#include <string>
#include "ops.h"
#include "scale_tiles.cuh"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using std::tuple;

namespace {

// the sentence is put together without a stream: std::ostringstream crashes in a library into which the compiler
// has linked a part of libstdc++ (seen: Ubuntu 24.04's g++ 13 with torch 2.11)
std::string text(std::string s) { return s; }
std::string text(int64_t n) { return std::to_string(n); }
#define CHECK(ok, ...) \
  if (!(ok)) throw std::runtime_error("fp4: " + sentence(__VA_ARGS__))
template <class... Parts> std::string sentence(const Parts&... parts) { return (text(parts) + ...); }

void check_tensor(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
  CHECK(t.dim() == dim && t.scalar_type() == dtype && t.is_contiguous(), name, " must be contiguous, with ", dim,
        " dimension(s) of ", torch::headeronly::toString(dtype), ", got ", t.dim(), " of ", torch::headeronly::toString(t.scalar_type()));
}

// the kernels read 16 bytes at a time
void check_aligned(const Tensor& t, const char* name) {
  CHECK(!t.is_cuda() || uintptr_t(t.data_ptr()) % 16 == 0, name, " must begin at a multiple of 16 bytes: clone it");
}

void check_blocks(const Tensor& x) {
  const bool ok = x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16;
  CHECK(ok && x.dim() == 2 && x.is_contiguous(), "x must be a contiguous float32 or bfloat16 matrix, got ",
        x.dim(), " dimension(s) of ", torch::headeronly::toString(x.scalar_type()));
  check_aligned(x, "x");
  CHECK(x.size(1) % 32 == 0, "the last dimension must be a multiple of 32, got ", x.size(1));
}

void check_scale(const std::string& scale) { CHECK(scale == "floor" || scale == "nearest", "scale must be floor or nearest, got ", scale); }

void check_with(const Tensor& x, const Tensor& t, const char* name) {
  CHECK(t.is_cuda() == x.is_cuda() && t.get_device() == x.get_device(), name, " is on another device");
}

void check_packed(const Tensor& codes, const Tensor& scales) {
  check_tensor(codes, "codes", 2, ScalarType::Byte), check_tensor(scales, "scales", 2, ScalarType::Byte);
  check_with(codes, scales, "scales"), check_aligned(codes, "codes");
  CHECK(codes.size(0) == scales.size(0) && codes.size(1) == 16 * scales.size(1), "codes [M, K/2] and scales [M, K/32] do not match: [",
        codes.size(0), ", ", codes.size(1), "], [", scales.size(0), ", ", scales.size(1), "]");
}

// the right operand of a product with a [M, K]
void check_right(const Tensor& b, const Tensor& bs, const Tensor& a, int64_t K) {
  check_packed(b, bs), check_with(a, b, "b");
  CHECK(2 * b.size(1) == K, "the products' inner dimensions differ: ", K, " and ", 2 * b.size(1));
}

void check_random(const Tensor& x, const Tensor& t, const char* name, int64_t n) {
  check_tensor(t, name, 1, ScalarType::Long), check_with(x, t, name);
  CHECK(t.numel() == n, name, " must have ", n, " element(s), got ", t.numel());
}

Values values(const Tensor& x) { return {x.data_ptr(), x.scalar_type() == ScalarType::BFloat16}; }
uint8_t* bytes(const Tensor& t) { return (uint8_t*)t.data_ptr(); }
int64_t* longs(const Tensor& t) { return (int64_t*)t.data_ptr(); }

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) { return torch::stable::new_empty(like, {rows, columns}, dtype); }
Tensor codes(const Tensor& like, int64_t M, int64_t K) { return empty(like, M, K / 2, ScalarType::Byte); }
Tensor scales(const Tensor& like, int64_t M, int64_t K) { return empty(like, M, K / 32, ScalarType::Byte); }
int64_t padded(int64_t M) { return 32 * mxfp4::ceil_div(M, 32); }

// where a tensor lives: its table of functions and, on a GPU, torch's current stream
struct Device {
  const Ops* ops = &cpu;
  void* stream = nullptr;
#ifdef USE_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit Device(const Tensor& x) {
    if (!x.is_cuda()) return;
    ops = &cuda;
    guard.emplace(x.get_device_index());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  }
  ~Device() noexcept(false) {                                 // the op's launches are done
    const char* error = ops == &cuda ? launch_error() : nullptr;
    CHECK(!error, "a kernel did not start: ", error);
  }
#else
  explicit Device(const Tensor&) {}
#endif
  const Ops* operator->() const { return ops; }
};

tuple<Tensor, Tensor, Tensor> quantize_forward(const Tensor& x, std::string scale) {
  check_blocks(x), check_scale(scale);
  const int64_t M = x.size(0), K = x.size(1);
  Tensor c = codes(x, M, K), s = scales(x, M, K), mask = empty(x, M, K / 32, ScalarType::Int);
  const Device on(x);
  on->quantize_forward(values(x), M, K, scale == "nearest", bytes(c), bytes(s), (int32_t*)mask.data_ptr(), on.stream);
  return {c, s, mask};
}

// an operand of a product, in a format
struct Operand { Tensor values, scales; };
Format format_of(const std::string& name, Format fp8) {
  CHECK(name == "packed" || name == "mxf4" || name == "fp8", "format must be packed, mxf4 or fp8, got ", name);
  return name == "packed" ? Format::packed : name == "mxf4" ? Format::mxf4 : fp8;
}
Tensor scale_tiles(const Tensor& like, int64_t M, int64_t K) { return torch::stable::new_empty(like, {mxfp4::tiled_bytes(M, K / 32)}, ScalarType::Byte); }
Operand operand(const Tensor& like, int64_t M, int64_t K, Format format) {
  if (format == Format::packed) return {codes(like, M, K), scales(like, M, K)};
  CHECK(like.is_cuda(), "tiles are for a GPU");
  if (format == Format::mxf4) return {codes(like, M, K), scale_tiles(like, M, K)};
  const int64_t m = mxfp4::ceil_div(M, 128), k = mxfp4::ceil_div(K, 128);
  return {torch::stable::new_empty(like, {m, k, 128 * 128}, ScalarType::Byte), torch::stable::new_empty(like, {m, k, format == Format::left ? 128 : 4}, ScalarType::Float)};
}

Turn turn_of(const std::string& name) {
  CHECK(name == "before" || name == "after" || name == "none", "turn must be before, after or none, got ", name);
  return name == "before" ? Turn::before : name == "after" ? Turn::after : Turn::none;
}

tuple<Tensor, Tensor, Tensor, Tensor> quantize_backward(const Tensor& x, const Tensor& signs, const Tensor& seeds,
                                                        bool stochastic, std::string turn, std::string turn_t, std::string name) {
  check_blocks(x), check_random(x, signs, "signs", 1), check_random(x, seeds, "seeds", 2);
  const int64_t M = x.size(0), K = x.size(1);
  const Format format = format_of(name, Format::left);
  const Operand rows = operand(x, M, K, format), columns = operand(x, K, padded(M), format);
  const Device on(x);
  on->quantize_backward(values(x), M, K, {longs(signs), turn_of(turn), turn_of(turn_t), stochastic, format}, longs(seeds), rows.values.data_ptr(),
                        rows.scales.data_ptr(), columns.values.data_ptr(), columns.scales.data_ptr(), on.stream);
  return {rows.values, rows.scales, columns.values, columns.scales};
}

tuple<Tensor, Tensor> requantize(const Tensor& c, const Tensor& s, const Tensor& signs, const Tensor& seed, bool stochastic, std::string turn, std::string name) {
  check_packed(c, s), check_random(c, signs, "signs", 1), check_random(c, seed, "seed", 1);
  const int64_t M = c.size(0), K = 2 * c.size(1);
  const Format format = format_of(name, Format::right);
  const Operand columns = operand(c, K, padded(M), format);
  const Device on(c);
  on->requantize(bytes(c), bytes(s), M, K, {longs(signs), Turn::none, turn_of(turn), stochastic, format}, longs(seed),
                 columns.values.data_ptr(), columns.scales.data_ptr(), on.stream);
  return {columns.values, columns.scales};
}

Tensor dequantize(const Tensor& c, const Tensor& s, ScalarType dtype) {
  check_packed(c, s);
  CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "dtype must be float32 or bfloat16");
  Tensor x = empty(c, c.size(0), 2 * c.size(1), dtype);
  const Device on(c);
  on->dequantize(bytes(c), bytes(s), x.size(0), x.size(1), values(x), on.stream);
  return x;
}

// the operands are exact in float32; the library multiplies them, but on an old GPU
Tensor gemm(const Tensor& a, const Tensor& as, const Tensor& b, const Tensor& bs, double alpha, ScalarType dtype) {
  check_packed(a, as), check_right(b, bs, a, 2 * a.size(1));
#ifdef GEMM_PLAIN
  if (const Device on(a); a.is_cuda()) {
    Tensor out = empty(a, a.size(0), b.size(0), dtype);
    return gemm_plain(bytes(a), bytes(as), bytes(b), bytes(bs), a.size(0), b.size(0), 2 * a.size(1), float(alpha), values(out), on.stream), out;
  }
#endif
  Tensor x = dequantize(a, as, ScalarType::Float), y = dequantize(b, bs, ScalarType::Float);
  Tensor c = torch::stable::matmul(x, torch::stable::transpose(y, 0, 1));
  if (alpha == 1 && dtype == ScalarType::Float) return c;
  Tensor out = empty(c, c.size(0), c.size(1), dtype);
  return scale((float*)c.data_ptr(), c.numel(), float(alpha), values(out)), out;
}

Tensor unrotate(const Tensor& d, const Tensor& mask, ScalarType dtype) {
  check_blocks(d), check_tensor(mask, "mask", 2, ScalarType::Int), check_with(d, mask, "mask");
  CHECK(mask.size(0) == d.size(0) && 32 * mask.size(1) == d.size(1), "mask [M, K/32] does not match d [M, K]");
  Tensor x = empty(d, d.size(0), d.size(1), dtype);
  const Device on(d);
  on->unrotate(values(d), (int32_t*)mask.data_ptr(), d.size(0), d.size(1), values(x), on.stream);
  return x;
}

#ifdef USE_CUDA
tuple<Tensor, Tensor> fold_packed(const Tensor& c, const Tensor& s, double alpha) {
  check_packed(c, s);
  Tensor fp8 = empty(c, c.size(0), 2 * c.size(1), ScalarType::Float8_e4m3fn), row = empty(c, c.size(0), 1, ScalarType::Float);
  const Device on(c);
  fold(bytes(c), bytes(s), c.size(0), 2 * c.size(1), float(alpha), bytes(fp8), (float*)row.data_ptr(), on.stream);
  return {fp8, row};
}
#endif

#ifdef GEMM_SM90
constexpr Format LEFT = Format::left, RIGHT = Format::right;               // what the product wants

// alpha * a @ b.T, masked and un-rotated if there is a mask
Tensor product(const Operand& a, const Operand& b, int64_t M, int64_t N, const Tensor* mask, double alpha, ScalarType dtype, const Device& on) {
  const int64_t K = 128 * a.values.size(1);
  const int splits = gemm_sm90_splits(M, N, K);
  Tensor out = empty(a.values, M, N, dtype), partial = empty(a.values, splits > 1 ? 16 * splits * mxfp4::ceil_div(M, 16) : 0, N, ScalarType::Float);
  gemm_sm90(bytes(a.values), (float*)a.scales.data_ptr(), bytes(b.values), (float*)b.scales.data_ptr(), M, N, K, float(alpha),
            mask ? (int32_t*)mask->data_ptr() : nullptr, (float*)partial.data_ptr(), splits, values(out), on.stream);
  return out;
}

Operand prepared(const Tensor& c, const Tensor& s, Format format, const Device& on) {
  CHECK(format == Format::left || c.size(0) % 8 == 0, "the rows of b must be a multiple of 8, got ", c.size(0));      // stores of 16 bytes
  const Operand to = operand(c, c.size(0), 2 * c.size(1), format);
  fold_tiles(bytes(c), bytes(s), c.size(0), 2 * c.size(1), format == Format::right, to.values.data_ptr(), (float*)to.scales.data_ptr(), on.stream);
  return to;
}

void check_operand(const Operand& o, int64_t rows, Format format) {
  check_tensor(o.values, "an operand", 3, ScalarType::Byte), check_tensor(o.scales, "its scales", 3, ScalarType::Float);
  const auto shaped = [&](const Tensor& t, int64_t n) { return t.size(0) == mxfp4::ceil_div(rows, 128) && t.size(1) == o.values.size(1) && t.size(2) == n; };
  CHECK(shaped(o.values, 128 * 128) && shaped(o.scales, format == Format::left ? 128 : 4), "an operand's tiles and scales are not those of ", rows, " rows");
}
#elif defined(GEMM_MXF4)
constexpr Format LEFT = Format::mxf4, RIGHT = Format::mxf4;

Tensor product(const Operand& a, const Operand& b, int64_t M, int64_t N, const Tensor* mask, double alpha, ScalarType dtype, const Device& on) {
  Tensor out = empty(a.values, M, N, mask ? ScalarType::Float : dtype);
  GEMM_MXF4(bytes(a.values), bytes(a.scales), bytes(b.values), bytes(b.scales), M, N, 2 * a.values.size(1), float(alpha), values(out), on.stream);
  return mask ? unrotate(out, *mask, dtype) : out;
}

Operand prepared(const Tensor& c, const Tensor& s, Format, const Device& on) {
  const Tensor tiles = scale_tiles(s, c.size(0), 2 * c.size(1));
  swizzle_scales(bytes(s), s.size(0), s.size(1), bytes(tiles), on.stream);
  return {c, tiles};
}

void check_operand(const Operand& o, int64_t rows, Format) {
  check_tensor(o.values, "an operand", 2, ScalarType::Byte), check_tensor(o.scales, "its scales", 1, ScalarType::Byte);
  check_aligned(o.values, "an operand"), check_aligned(o.scales, "its scales");
  const int64_t blocks = o.values.size(1) / 16;
  CHECK(o.values.size(0) == rows && o.values.size(1) == 16 * blocks && o.scales.numel() == mxfp4::tiled_bytes(rows, blocks),
        "an operand's codes and scale tiles are not those of ", rows, " rows");
}
#endif

#if defined(GEMM_SM90) || defined(GEMM_MXF4)
// packed [M, K], [N, K] -> alpha * a @ b.T
Tensor own_gemm(const Tensor& a, const Tensor& as, const Tensor& b, const Tensor& bs, double alpha, ScalarType dtype) {
  check_packed(a, as), check_right(b, bs, a, 2 * a.size(1));
  const Device on(a);
  return product(prepared(a, as, LEFT, on), prepared(b, bs, RIGHT, on), a.size(0), b.size(0), nullptr, alpha, dtype, on);
}

// x [M, K], packed [N, K] -> x quantised @ b.T, and x quantised
tuple<Tensor, Tensor, Tensor, Tensor> quantize_gemm(const Tensor& x, std::string scale, const Tensor& b, const Tensor& bs) {
  const int64_t M = x.size(0), K = x.size(1);
  check_blocks(x), check_scale(scale), check_right(b, bs, x, K);
  Tensor c = codes(x, M, K), s = scales(x, M, K), mask = empty(x, M, K / 32, ScalarType::Int);
  const Operand a = LEFT == Format::mxf4 ? Operand{c, scale_tiles(x, M, K)} : operand(x, M, K, LEFT);
  const Device on(x);
  quantize_forward_operand(values(x), M, K, scale == "nearest", bytes(c), bytes(s), (int32_t*)mask.data_ptr(), LEFT, a.values.data_ptr(),
                           a.scales.data_ptr(), on.stream);
  return {product(a, prepared(b, bs, RIGHT, on), M, b.size(0), nullptr, 1, x.scalar_type(), on), c, s, mask};
}

// operands as the product wants them, [M, K] and [N, K] -> alpha * a @ b.T, masked and un-rotated: [M, N] as the mask says
Tensor gemm_unrotate(const Tensor& a, const Tensor& as, const Tensor& b, const Tensor& bs, const Tensor& mask, double alpha, ScalarType dtype) {
  check_tensor(mask, "mask", 2, ScalarType::Int);
  for (const Tensor* t : {&as, &b, &bs, &mask}) check_with(a, *t, "one of the operands");
  const int64_t M = mask.size(0), N = 32 * mask.size(1);
  check_operand({a, as}, M, LEFT), check_operand({b, bs}, N, RIGHT);
  CHECK(a.size(1) == b.size(1), "the operands' inner dimensions differ");
  const Device on(a);
  return product({a, as}, {b, bs}, M, N, &mask, alpha, dtype, on);
}
#endif

const auto same_on_both = [](auto& m) {
  m.impl("quantize_forward", TORCH_BOX(&quantize_forward)), m.impl("quantize_backward", TORCH_BOX(&quantize_backward));
  m.impl("requantize", TORCH_BOX(&requantize)), m.impl("dequantize", TORCH_BOX(&dequantize)), m.impl("unrotate", TORCH_BOX(&unrotate));
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fp4, CPU, m) { same_on_both(m), m.impl("gemm", TORCH_BOX(&gemm)); }

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fp4, CUDA, m) {
  same_on_both(m), m.impl("fold", TORCH_BOX(&fold_packed));    // for a library's gemm: product.py
#ifdef GEMM_PLAIN
  m.impl("gemm", TORCH_BOX(&gemm));
#endif
#if defined(GEMM_SM90) || defined(GEMM_MXF4)
  m.impl("gemm", TORCH_BOX(&own_gemm));
  m.impl("quantize_gemm", TORCH_BOX(&quantize_gemm));
  m.impl("gemm_unrotate", TORCH_BOX(&gemm_unrotate));
#endif
}
#endif
