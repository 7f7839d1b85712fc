/*
The quantisers on a GPU. They give the bytes of reference.py, for which this file must be compiled
with -fmad=false (mxfp4.cuh says why).

    quantize_forward            x -> codes, scales, mask
    quantize_backward           dy -> the operands dy and dy.T, reading dy once
    requantize_transposed       packed x -> the operand x.T

An operand is what the product on this GPU reads (OperandFormat in ops.h). The quantisers write it
directly: nothing in between is stored in memory.

The unit of work is a block of 32 values along a row, which share a scale and are rotated together.
One thread owns one block, from the load to the packed bytes, and has its 32 values in registers, so
that the rotation and the scale need no communication. Four neighbouring threads own 128
neighbouring values, which together make a row of a tile.

The forward quantiser needs nothing else, and is in this file. The backward quantiser needs blocks
of rows and blocks of columns of the same values, for which 128 x 128 of them wait in shared memory:
see quantize_backward.cuh.

What bounds these kernels is not memory alone but also instructions: while the bytes of a value are
read and written, at 3 TB/s, an H100 has time for about 35 instructions per value. A rotation takes
five additions; for rounding see round.cuh.

    nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c quantize.cu
*/
#include <type_traits>
#include "ops.h"
#include "round.cuh"
#include "scale_tiles.cuh"
#include "fp8_tiles.cuh"
#include "quantize_backward.cuh"

namespace {

// ---- the forward quantiser

constexpr int FORWARD_THREADS = 256;
constexpr int FORWARD_ROWS = FORWARD_THREADS / 4;       // of a CUDA block: half a tile

struct PackedOutput {
  uint8_t* codes;                   // [M, K/2]
  uint8_t* scales;                  // [M, K/32]
  int32_t* mask;                    // [M, K/32]: bit i is element i
};

struct TileOutput {
  void* values;                     // fp8_left: FP8 tiles
  void* scales;                     // fp8_left: of FP8 tiles; mxf4: tiles of scale_tiles.cuh
};

// Returns the mask: bit i is set if |v_i * factor| < 6 units, so that element i does not clip.
// The sign bit of |v_i * factor| - 6 units says so; it is shifted in, the last element first.
__device__ uint32_t unclipped_mask(const Block32& v, float factor) {
  uint32_t mask = 0;
  UNROLL for (int i = 31; i >= 0; i--) {
    const float excess = fabsf(v[i][0] * factor) - 6 * NEAREST_UNIT;
    mask = __funnelshift_l(bits_of(excess), mask, 1);
  }
  return mask;
}

template <class T, OperandFormat format>
__global__ void __launch_bounds__(FORWARD_THREADS) forward_kernel(
    const T* __restrict__ x,            // [M, 32 * blocks]
    int64_t M,
    int64_t blocks,                     // of 32 in a row
    bool round_scale_to_nearest,
    PackedOutput packed,
    TileOutput tiles) {                 // unused if the format is packed
  constexpr bool has_tiles = format != OperandFormat::packed;
  const unsigned tiles_per_row = unsigned(blocks + 3) / 4;

  // The block that this thread owns, at (row, column) with columns counted in blocks. With tiles a
  // CUDA block takes half a tile: first the upper halves of a row of tiles, then the lower.
  // Otherwise blocks are simply taken in the order of memory, which leaves fewer threads idle.
  const int64_t row = int64_t(blockIdx.x / tiles_per_row) * FORWARD_ROWS + threadIdx.x / 4;
  const int64_t column = blockIdx.x % tiles_per_row * 4 + threadIdx.x % 4;
  const int64_t in_memory = int64_t(blockIdx.x) * FORWARD_THREADS + threadIdx.x;
  const int64_t block = has_tiles ? row * blocks + column : in_memory;
  const bool inside = has_tiles ? row < M && column < blocks : block < M * blocks;
  if (!has_tiles && !inside)
    return;
  Block32 v = {};
  if (inside)
    load(x + 32 * block, v);

  float scale[1];                       // before it is rounded to a power of two
  hadamard(v);
  quest_scale(v, scale);
  const bool finite = is_finite(scale[0]);
  const int e = quest_exponent(scale[0], round_scale_to_nearest);
  const float factor = pow2(-e) * NEAREST_UNIT;
  const uint32_t mask = unclipped_mask(v, factor);
  const uint4 rounded = nearest_codes<true>(v, factor);
  const uint4 codes = finite ? rounded : make_uint4(0, 0, 0, 0);

  if (inside) {
    reinterpret_cast<uint4*>(packed.codes)[block] = codes;
    packed.scales[block] = finite ? e + 127 : 255;
    packed.mask[block] = finite ? mask : 0;
  }
  if (format == OperandFormat::fp8_left) {
    packed_to_fp8_block<false>(
        codes,
        e,
        finite,
        row % TILE_SIDE,
        row / TILE_SIDE * tiles_per_row + column / 4,
        (uint4*)tiles.values,
        (float*)tiles.scales,
        nullptr);
  }
  if (format == OperandFormat::mxf4) {          // the whole tile, beyond the matrix as well
    const uint8_t scale_byte = finite ? e + 127 : 255;
    ((uint8_t*)tiles.scales)[scale_tile_index(row, column, blocks)] = scale_byte;
  }
}

template <OperandFormat format>
void launch_forward(
    FloatMatrix x,
    int64_t M,
    int64_t K,
    bool round_scale_to_nearest,
    PackedOutput packed,
    TileOutput tiles,
    void* stream) {
  const int64_t in_memory = ceil_div(M * K / 32, FORWARD_THREADS);
  const int64_t half_tiles =
      ceil_div(M, TILE_SIDE) * (TILE_SIDE / FORWARD_ROWS) * ceil_div(K, TILE_SIDE);
  const int64_t grid = format == OperandFormat::packed ? in_memory : half_tiles;
  if (!grid)
    return;
  with_dtype(x, [=](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    forward_kernel<T, format><<<unsigned(grid), FORWARD_THREADS, 0, (cudaStream_t)stream>>>(
        values, M, K / 32, round_scale_to_nearest, packed, tiles);
  });
}

void quantize_forward(
    FloatMatrix x,                  // [M, K]
    int64_t M,
    int64_t K,
    bool round_scale_to_nearest,
    uint8_t* codes,                 // [M, K/2]
    uint8_t* scales,                // [M, K/32]
    int32_t* mask,                  // [M, K/32]
    void* stream) {
  const PackedOutput packed = {codes, scales, mask};
  launch_forward<OperandFormat::packed>(x, M, K, round_scale_to_nearest, packed, {}, stream);
}

// ---- the backward quantiser

void quantize_backward(
    FloatMatrix x,                  // [M, K]
    int64_t M,
    int64_t K,
    BackwardParams params,
    const int64_t* seeds,           // [2]: of x and of x.T
    void* values,                   // the operand x, [M, K]
    void* scales,
    void* values_t,                 // the operand x.T, [K, M up to a multiple of 32]
    void* scales_t,
    void* stream) {
  const Operand rows = {values, scales, M, K / 32};
  const Operand columns = {values_t, scales_t, K, ceil_div(M, 32)};
  with_dtype(x, [=](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    launch_backward(FloatSource<T>{data}, M, K, params, seeds, rows, columns, stream);
  });
}

void requantize_transposed(
    const uint8_t* codes,           // [M, K/2]
    const uint8_t* scales,          // [M, K/32]
    int64_t M,
    int64_t K,
    BackwardParams params,          // row_order is not used
    const int64_t* seed,            // [1]
    void* values_t,                 // the operand x.T, [K, M up to a multiple of 32]
    void* scales_t,
    void* stream) {
  const PackedSource source = {codes, scales};
  const Operand columns = {values_t, scales_t, K, ceil_div(M, 32)};
  launch_backward(source, M, K, params, seed, {}, columns, stream);
}

}  // namespace

// The forward quantiser, and what the left operand of a product needs in addition.
void quantize_forward_operand(
    FloatMatrix x,                  // [M, K]
    int64_t M,
    int64_t K,
    bool round_scale_to_nearest,
    uint8_t* codes,                 // [M, K/2]
    uint8_t* scales,                // [M, K/32]
    int32_t* mask,                  // [M, K/32]
    OperandFormat format,           // fp8_left or mxf4
    void* values,                   // FP8 tiles; unused for mxf4, whose values are the codes
    void* tile_scales,
    void* stream) {
  const PackedOutput packed = {codes, scales, mask};
  const TileOutput tiles = {values, tile_scales};
  if (format == OperandFormat::fp8_left)
    launch_forward<OperandFormat::fp8_left>(
        x, M, K, round_scale_to_nearest, packed, tiles, stream);
  else
    launch_forward<OperandFormat::mxf4>(x, M, K, round_scale_to_nearest, packed, tiles, stream);
}

const OpTable cuda_ops = {
    quantize_forward,
    quantize_backward,
    requantize_transposed,
    dequantize_cuda,
    unrotate_cuda,
    matvec_cuda,
};

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
