/*
The functions behind the operations of torch.ops.fp4. bind.cpp checks the arguments of an
operation and then calls one of these. The CPU's functions are in cpu.cpp; the GPU's are in the
.cu files.

MXFP4 in brief. A row of a matrix is cut into blocks of 32 neighbouring values. Each value becomes
a code of 4 bits in the format E2M1, whose magnitudes are 0, .5, 1, 1.5, 2, 3, 4 and 6, and the 32
codes of a block share one scale, a power of two whose exponent fills one byte (E8M0):

    value = E2M1(code) * 2^(scale - 127)

A matrix [M, K] packed in this way is codes [M, K/2], two codes to a byte with the even column in
the low nibble, and scales [M, K/32].

Everything here takes raw pointers to contiguous, row-major matrices and trusts its caller. K is a
multiple of 32 and M is any number. Mp stands for M rounded up to a multiple of 32: a transposed
matrix has its blocks along M, so that the missing rows are filled with zeros. `stream` is a
cudaStream_t, which this header does not name because it must compile without CUDA; the CPU's
functions ignore it.
*/
#pragma once
#include <cstdint>
#include "mxfp4.cuh"

// A matrix of values that are not quantised: float32 or bfloat16, whichever the caller has.
struct FloatMatrix {
  void* data;
  bool is_bf16;
};

// Calls f with the pointer of x, cast to the type of its values.
template <class F>
void with_dtype(FloatMatrix x, F f) {
  if (x.is_bf16)
    f((mxfp4::bfloat16*)x.data);
  else
    f((float*)x.data);
}

// The most rows of x that matvec multiplies. It stands in fp4/ops.py, too.
constexpr int MATVEC_ROWS = 8;

// How an operand of a matrix product lies in memory. A GPU's product wants its operands in tiles,
// and the quantisers write them so at once, because rearranging them later would cost another
// pass. The order of the values is that of OPERAND_FORMATS in fp4/ops.py.
enum class OperandFormat {
  // Codes and scales as described above. This is the only format on a CPU.
  packed,
  // The same codes, but the scales lie in the tiles of scale_tiles.cuh, for Blackwell's FP4
  // units.
  mxf4,
  // The FP8 tiles of fp8_tiles.cuh, for Hopper's FP8 units. A product a @ b.T takes a as fp8_left,
  // where each row of a tile has a scale, and b as fp8_right, where 32 rows share one.
  fp8_left,
  fp8_right,
};

// The backward quantiser multiplies each block by random signs and rotates it with a Hadamard
// matrix, which spreads an outlier over the whole block. The paper's method applies the signs
// first; the other orders are ablations. The order of the values is that of SIGN_ORDERS in
// fp4/ops.py.
enum class SignOrder {
  before,  // random signs, then the Hadamard matrix
  after,   // the Hadamard matrix, then random signs
  none,    // neither signs nor rotation
};

// The settings of the backward quantiser, which makes the operands of the two gradient products.
struct BackwardParams {
  const int64_t* signs;    // [1], on the device; bit i < 32 negates element i of a block
  SignOrder row_order;     // for the blocks of x
  SignOrder column_order;  // for the blocks of x.T
  bool stochastic;         // round stochastically rather than to nearest
  OperandFormat format;    // of the operands that are made
};

// What every device offers: one table for the CPU and one for CUDA, which bind.cpp chooses from.
struct OpTable {
  // Rotates x, quantises it with QuEST's scale, and notes which values did not clip.
  void (*quantize_forward)(
      FloatMatrix x,    // [M, K]
      int64_t M,
      int64_t K,
      bool nearest,     // round the scale to the nearest power of two rather than down
      uint8_t* codes,   // [M, K/2]
      uint8_t* scales,  // [M, K/32]
      int32_t* mask,    // [M, K/32]; bit i of a word: element i of the block did not clip
      void* stream);

  // Makes two operands of x, a gradient: one of x itself and one of x.T.
  void (*quantize_backward)(
      FloatMatrix x,  // [M, K]
      int64_t M,
      int64_t K,
      BackwardParams params,
      const int64_t* seeds,  // [2], on the device: for x and for x.T
      void* values,          // codes [M, K/2] if packed, otherwise what the format says
      void* scales,          // scales [M, K/32], likewise
      void* values_t,        // codes [K, Mp/2], likewise
      void* scales_t,        // scales [K, Mp/32], likewise
      void* stream);

  // Makes the operand of x.T from a packed x, as the second half of quantize_backward would.
  void (*requantize_transposed)(
      const uint8_t* codes,   // [M, K/2]
      const uint8_t* scales,  // [M, K/32]
      int64_t M,
      int64_t K,
      BackwardParams params,  // row_order is not read
      const int64_t* seed,    // [1], on the device
      void* values_t,         // codes [K, Mp/2] if packed
      void* scales_t,         // scales [K, Mp/32] if packed
      void* stream);

  // Unpacks a packed matrix.
  void (*dequantize)(
      const uint8_t* codes,   // [M, K/2]
      const uint8_t* scales,  // [M, K/32]
      int64_t M,
      int64_t K,
      FloatMatrix x,  // [M, K]
      void* stream);

  // Takes a gradient back from the rotated basis: x = (d * mask) @ Hadamard, block by block. The
  // values that clipped in the forward pass receive no gradient.
  void (*unrotate)(
      FloatMatrix d,        // [M, K]
      const int32_t* mask,  // [M, K/32]
      int64_t M,
      int64_t K,
      FloatMatrix x,  // [M, K]
      void* stream);

  // y = x @ w.T of packed matrices, for 1 to MATVEC_ROWS rows of x.
  void (*matvec)(
      const uint8_t* x,         // [M, K/2] codes
      const uint8_t* x_scales,  // [M, K/32]
      const uint8_t* w,         // [N, K/2] codes
      const uint8_t* w_scales,  // [N, K/32]
      int64_t M,
      int64_t N,
      int64_t K,
      FloatMatrix y,  // [M, N]
      void* stream);
};

extern const OpTable cpu_ops;
extern const OpTable cuda_ops;

// ---- CPU only (cpu.cpp)

// Unpacks `rows` rows and `columns` columns, both from the given ones on, of a packed matrix.
void dequantize_tile(
    const uint8_t* codes,   // [M, K/2]
    const uint8_t* scales,  // [M, K/32]
    int64_t K,
    int64_t first_row,
    int64_t first_column,  // a multiple of 32, as is `columns`
    int64_t rows,
    int64_t columns,
    float* x);  // [rows, columns]

// Unrotates alpha * d. x may be d itself, if both are of one type.
void unrotate_product(
    FloatMatrix d,  // [M, K]
    float alpha,
    const int32_t* mask,  // [M, K/32]
    int64_t M,
    int64_t K,
    FloatMatrix x);  // [M, K]

// out = alpha * c
void scale_values(
    const float* c,  // [n]
    int64_t n,
    float alpha,
    FloatMatrix out);  // [n]

// ---- GPU only: the entries of cuda_ops that are in another file than the table (elementwise.cu,
// matvec.cu)

void dequantize_cuda(
    const uint8_t* codes,   // [M, K/2]
    const uint8_t* scales,  // [M, K/32]
    int64_t M,
    int64_t K,
    FloatMatrix x,  // [M, K]
    void* stream);

void unrotate_cuda(
    FloatMatrix d,        // [M, K]
    const int32_t* mask,  // [M, K/32]
    int64_t M,
    int64_t K,
    FloatMatrix x,  // [M, K]
    void* stream);

void matvec_cuda(
    const uint8_t* x,         // [M, K/2] codes
    const uint8_t* x_scales,  // [M, K/32]
    const uint8_t* w,         // [N, K/2] codes
    const uint8_t* w_scales,  // [N, K/32]
    int64_t M,
    int64_t N,
    int64_t K,
    FloatMatrix y,  // [M, N]
    void* stream);

// ---- GPU only: making operands (quantize.cu, fp8_tiles.cu, scale_tiles.cu)

// Does what quantize_forward does, and also writes what a product needs of its left operand
// beyond the packed matrix.
void quantize_forward_operand(
    FloatMatrix x,  // [M, K]
    int64_t M,
    int64_t K,
    bool nearest,
    uint8_t* codes,        // [M, K/2]
    uint8_t* scales,       // [M, K/32]
    int32_t* mask,         // [M, K/32]
    OperandFormat format,  // fp8_left or mxf4
    void* values,          // fp8_left: the FP8 tiles; mxf4: not written, its values are the codes
    void* tile_scales,     // fp8_left: the tiles' scales; mxf4: `scales` once more, in tiles
    void* stream);

// Turns a packed matrix into E4M3 with one scale a row, for a library's FP8 product.
void packed_to_fp8_rows(
    const uint8_t* codes,   // [M, K/2]
    const uint8_t* scales,  // [M, K/32]
    int64_t M,
    int64_t K,
    float alpha,        // a factor of the product, which goes into the scales
    uint8_t* fp8,       // [M, K]
    float* row_scales,  // [M]
    void* stream);

// Turns a packed matrix into an operand of gemm_sm90. In the shapes of the outputs below,
// m = ceil(M / 128) and k = ceil(K / 128).
void packed_to_fp8_tiles(
    const uint8_t* codes,   // [M, K/2]
    const uint8_t* scales,  // [M, K/32]
    int64_t M,
    int64_t K,
    bool right,          // the format is fp8_right rather than fp8_left
    void* values,        // [m, k, 128 * 128]
    float* tile_scales,  // [m, k, 128], or [m, k, 4] for a right operand
    void* stream);

// Rearranges the scales of a packed matrix into the tiles of scale_tiles.cuh.
void swizzle_scales(
    const uint8_t* scales,  // [rows, blocks]
    int64_t rows,
    int64_t blocks,
    uint8_t* out,  // scale_tiles_bytes(rows, blocks) bytes
    void* stream);

// ---- GPU only: the products. Each is compiled only for the GPUs that it is for: see backend.py.

// Into how many parts gemm_sm90 should cut K. More than one keeps the GPU busy when M and N are
// small.
int gemm_sm90_splits(int64_t M, int64_t N, int64_t K);

// out = alpha * a @ b.T on Hopper's FP8 units; if there is a mask, also unrotated with it.
void gemm_sm90(
    const uint8_t* a,       // [M, K] in format fp8_left
    const float* a_scales,
    const uint8_t* b,       // [N, K] in format fp8_right
    const float* b_scales,
    int64_t M,
    int64_t N,
    int64_t K,
    float alpha,
    const int32_t* mask,  // [M, N/32], or nullptr: the result is not unrotated
    float* partial,       // [splits, M rounded up to a multiple of 16, N] if splits > 1
    int splits,
    FloatMatrix out,  // [M, N]
    void* stream);

// out = alpha * a @ b.T for operands of which both are packed, or both in format mxf4.
using Gemm = void(
    const uint8_t* a,  // [M, K/2]
    const uint8_t* a_scales,
    const uint8_t* b,  // [N, K/2]
    const uint8_t* b_scales,
    int64_t M,
    int64_t N,
    int64_t K,
    float alpha,
    FloatMatrix out,  // [M, N]
    void* stream);

Gemm gemm_fp32;   // for GPUs before Ampere, though it runs on any; packed operands
Gemm gemm_sm100;  // for data centre Blackwell; operands in format mxf4
Gemm gemm_sm120;  // for consumer Blackwell; operands in format mxf4

// The error of the last launch in words, or nullptr if there was none.
const char* launch_error();
