/*
The ops of one GemmSpec, torch.ops.fp4_columns.quantize_NAME and unrotate_NAME, which check their
arguments, allocate the results and call the kernel for the device of their tensors. Their schemas
and their definition are in emulate/columns.py; bind.cpp says what they are written against.
*/
#include <optional>
#include <tuple>
#include "bind_tensors.h"
#include "columns.cuh"
#include "columns.h"

using namespace COLUMN_NAME;

namespace {

constexpr int64_t PADDING = columns::ROTATION > 32 ? columns::ROTATION : 32;

// Checks the matrix that is quantised, and returns [rows, columns] of it in memory.
std::pair<int64_t, int64_t> check_source(
    const Tensor& x, const std::optional<Tensor>& scales, bool transposed) {
  if (!scales) {
    check_matrix(x, 16);
    return {x.size(0), x.size(1)};
  }
  check_packed(x, *scales);
  CHECK(transposed && !columns::IS_SQUARE, "a packed x is only quantised transposed, in rows");
  return {x.size(0), 2 * x.size(1)};
}

// The format of an operand that is not written as values: packed, or FP8 tiles.
OperandFormat parse_format(int64_t number, bool packs, bool transposed) {
  const auto format = OperandFormat(number);
  const bool is_right = format == OperandFormat::fp8_right;
  const bool in_tiles = is_right || format == OperandFormat::fp8_left;
  CHECK(
      in_tiles || format == OperandFormat::packed,
      "operand_format must be 0 (packed), 2 (fp8_left) or 3 (fp8_right), got ", number);
  CHECK(packs || !in_tiles, "only what is packed can be put into tiles");
  CHECK(transposed || !is_right, "a right operand in tiles is quantised transposed");
  return format;
}

PackedMatrix packed_matrix(const Tensor& codes, const Tensor& scales) {
  return {bytes(codes), bytes(scales)};
}

// Values, which have no scales beside them.
Operand new_values(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const Tensor no_scales = torch::stable::new_empty(like, {0}, ScalarType::Byte);
  return {new_matrix(like, rows, columns, dtype), no_scales};
}

// The factors of `rows` rows, or one for all.
void check_factor(const Tensor& x, const Tensor& factor, const char* name, int64_t rows) {
  check_tensor(factor, name, 2, ScalarType::Float);
  check_same_device(x, factor, name);
  const bool fits = factor.size(0) == 1 || factor.size(0) == rows;
  CHECK(
      fits && factor.size(1) == 1,
      name, " must be [1, 1] or [", rows, ", 1], got [",
      factor.size(0), ", ", factor.size(1), "]");
}

// The n words of an argument that may be missing, but not if they are needed.
const int64_t* optional_words(
    const Tensor& x, const std::optional<Tensor>& t, const char* name, int64_t n, bool needed) {
  CHECK(t || !needed, name, " is missing");
  if (!t)
    return nullptr;
  check_random(x, *t, name, n);
  return longs(*t);
}

const int64_t* sign_words(const Tensor& x, const std::optional<Tensor>& signs) {
  return optional_words(x, signs, "signs", 2, columns::SIGNS != columns::Signs::none);
}

// The arguments are those of quantize_operand in emulate/columns.py.
std::tuple<Tensor, Tensor, Tensor, Tensor> quantize(
    const Tensor& x,
    const std::optional<Tensor>& x_scales,
    const std::optional<Tensor>& factor,
    const std::optional<Tensor>& signs,
    const std::optional<Tensor>& seed,
    bool transposed,
    ScalarType dtype,
    int64_t operand_format) {
  const auto [memory_rows, memory_columns] = check_source(x, x_scales, transposed);
  CHECK(x.numel() > 0, "x must not be empty");
  if (factor)
    check_factor(x, *factor, "factor", memory_rows);
  const bool packs = dtype == ScalarType::Byte;
  CHECK(columns::CAN_PACK || !packs, "only MXFP4 can be packed");
  const OperandFormat format = parse_format(operand_format, packs, transposed);

  Quantization op = {};
  if (x_scales)
    op.packed_x = packed_matrix(x, *x_scales);
  else
    op.x = float_matrix(x);
  op.transposed = transposed;
  op.rows = transposed ? memory_columns : memory_rows;
  op.columns = transposed ? memory_rows : memory_columns;
  op.padded = PADDING * mxfp4::ceil_div(op.columns, PADDING);
  op.factor = factor ? floats(*factor) : nullptr;
  op.factor_by_row = factor && factor->numel() > 1;
  op.signs = sign_words(x, signs);
  op.seed = optional_words(x, seed, "seed", 1, columns::IS_RANDOM);

  const int64_t blocks = op.rows * op.padded / 32;
  const int64_t sums = columns::HAS_ROW_FACTOR ? 2 * blocks : 1;
  const Operand out = packs ? new_operand(x, op.rows, op.padded, format)
                            : new_values(x, op.rows, op.padded, dtype);
  const int64_t factors = columns::HAS_ROW_FACTOR ? op.rows : 1;
  Tensor out_factor = new_matrix(x, factors, 1, ScalarType::Float);
  Tensor mask = columns::HAS_MASK
      ? new_mask(x, op.rows, op.padded)
      : torch::stable::new_empty(x, {0}, ScalarType::Int);
  Tensor scratch = torch::stable::new_empty(x, {sums}, ScalarType::Float);
  if (format != OperandFormat::packed)
    op.tiles = {out.values.data_ptr(), floats(out.scales), format == OperandFormat::fp8_right};
  else if (packs)
    op.packed = packed_matrix(out.values, out.scales);
  else
    op.values = float_matrix(out.values);
  op.out_factor = floats(out_factor);
  op.mask = words(mask);
  op.scratch = floats(scratch);

  const CurrentDevice device(x);
  op.stream = device.stream;
#ifdef USE_CUDA
  if (x.is_cuda()) {
    quantize_on_gpu(op);
    return {out.values, out.scales, out_factor, mask};
  }
#endif
  quantize_on_cpu(op);
  return {out.values, out.scales, out_factor, mask};
}

// The arguments are those of unrotate in emulate/columns.py.
Tensor unrotate(
    const Tensor& product,
    const Tensor& left,
    const Tensor& right,
    const Tensor& mask,
    const std::optional<Tensor>& signs,
    ScalarType dtype) {
  check_matrix(product, PADDING);
  const int64_t M = product.size(0);
  const int64_t K = product.size(1);
  check_factor(product, left, "left", M);
  check_factor(product, right, "right", K);
  if (columns::HAS_MASK)
    check_mask(mask, product, M, K, "the product");

  Tensor out = new_matrix(product, M, K, dtype);
  Unrotation op = {};
  op.product = float_matrix(product);
  op.rows = M;
  op.columns = K;
  op.left = floats(left);
  op.left_by_row = left.numel() > 1;
  op.right = floats(right);
  op.right_by_column = right.numel() > 1;
  op.mask = words(mask);
  op.signs = sign_words(product, signs);
  op.out = float_matrix(out);

  const CurrentDevice device(product);
  op.stream = device.stream;
#ifdef USE_CUDA
  if (product.is_cuda()) {
    unrotate_on_gpu(op);
    return out;
  }
#endif
  unrotate_on_cpu(op);
  return out;
}

}  // namespace

#define NAME_OF(op, name) #op "_" #name
#define OP_NAME(op, name) NAME_OF(op, name)     // so that the macro COLUMN_NAME is replaced first

STABLE_TORCH_LIBRARY_IMPL(fp4_columns, CPU, library) {
  library.impl(OP_NAME(quantize, COLUMN_NAME), TORCH_BOX(&quantize));
  library.impl(OP_NAME(unrotate, COLUMN_NAME), TORCH_BOX(&unrotate));
}

#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(fp4_columns, CUDA, library) {
  library.impl(OP_NAME(quantize, COLUMN_NAME), TORCH_BOX(&quantize));
  library.impl(OP_NAME(unrotate, COLUMN_NAME), TORCH_BOX(&unrotate));
}
#endif
