/*
The backward quantiser: a matrix x [M, K] -> the operands x and x.T of two products. Only
quantize.cu includes this file.

Why a tile waits in shared memory. The operand x has its blocks of 32 along rows of x, the operand
x.T has them along columns of x. To read x only once for both, and in whole rows, a CUDA block
copies 128 x 128 values into shared memory, once, and each of its 512 threads takes a block of a row
from there, and then a block of a column.

What a thread owns. Thread t owns a block of row `tile_row` = t / 4 of the output's tile, in quarter
`quarter` = t % 4 of this row. So in the first half of the work the block lies along a row of the
tile in shared memory, and in the second half along a column of it.

The steps, each a function below:

    source.start_load()         starts to bring a tile from memory
    source.finish_load()        waits until the tile is in shared memory
    load_row_block()            reads a block into 32 registers, changing signs on the way
    load_column_block()         does the same with a block of a column
    rotate()                    does the Hadamard transform, and finds the largest magnitude
    quantize_to_fp8()           scales, rounds and stores, if the operand is FP8 tiles
    quantize_to_codes()         does the same if the operand is packed

If the source is a packed matrix (requantize_transposed), there is only the second half of the work,
since only x.T is made. Its values are unpacked into shared memory, where they are exact in BF16.

What bounds the kernel. Its traffic is small, one read of x and four or eight bits a value for each
operand, so that instructions bound it as much as memory does. To keep both busy, a multiprocessor
has two CUDA blocks to switch between, and each of them copies its next tile while it works on the
current one, if shared memory has room for two tiles (prefetch).
*/
#pragma once
#include "ptx/cp_async.cuh"
#include "ops.h"
#include "round.cuh"
#include "scale_tiles.cuh"
#include "fp8_tiles.cuh"

namespace {

constexpr int TILE_WARPS = TILE_THREADS / 32;

// One output, with its blocks along rows: [rows, 32 * blocks].
struct Operand {
  void* values;
  void* scales;
  int64_t rows;
  int64_t blocks;                   // in a row
  bool scale_tiles;                 // a packed operand's scales are in tiles (scale_tiles.cuh)
};

// ---- signs
// A random rotation changes signs before the Hadamard transform, or after it for an ablation. One
// word has the 32 signs of all blocks. It is expanded once, into the masks that each use needs.

struct SignMasks {
  uint32_t before[32];              // bit 31: negates value i as it is loaded
  uint32_t after[8];                // negates bytes of FP8 (bit 7), or codes (bit 3), 4 or 8 a word
};

// Lets one warp fill the masks. Masks that `order` does not use become 0.
__device__ void expand_signs(uint32_t signs, SignOrder order, bool is_fp8, SignMasks& masks) {
  const int lane = threadIdx.x % 32;
  const auto sign_bit_if = [=](SignOrder used_by, int i) {
    return order == used_by ? (signs >> i) & 1 : 0;
  };
  masks.before[lane] = sign_bit_if(SignOrder::before, lane) << 31;
  if (lane >= 8)
    return;
  const int per_word = is_fp8 ? 4 : 8;
  uint32_t word = 0;
  for (int j = 0; j < per_word; j++) {
    const bool exists = is_fp8 || lane < 4;             // 32 codes fill only four words
    if (exists && sign_bit_if(SignOrder::after, per_word * lane + j))
      word |= is_fp8 ? 0x80u << (8 * j) : 8u << (4 * j);
  }
  masks.after[lane] = word;
}

// ---- a tile

struct alignas(16) SharedState {    // in front of the tiles
  SignMasks row_signs;
  SignMasks column_signs;
  int warp_max[TILE_WARPS];
};

// 128 x 128 values in shared memory. There are 16 bytes of padding after each 32 values, and
// room for 8 more values after each 32 rows. With these no access meets a memory bank twice:
//   - a row block is read 16 bytes at a time, and 8 neighbouring threads read from 8 groups, which
//     lie an odd number of 16 bytes apart;
//   - of column blocks, the threads of a warp read 8 neighbouring columns in 4 rows, 32 rows apart:
//     8 values of each row, and the extra room moves each of the 4 rows on by 8 values.
template <class T>
struct Tile {
  static constexpr int GROUP_BYTES = 32 * sizeof(T) + 16;
  static constexpr int ROW_BYTES = 4 * GROUP_BYTES;
  static constexpr int SKEW_BYTES = 8 * sizeof(T);

  uint8_t memory[TILE_SIDE * ROW_BYTES + 4 * SKEW_BYTES];

  __device__ T* at(int row, int column) {
    return reinterpret_cast<T*>(memory + row * ROW_BYTES + row / 32 * SKEW_BYTES +
                                column / 32 * GROUP_BYTES + column % 32 * int(sizeof(T)));
  }
};

template <class T>
__device__ void load_row_block(
    Tile<T>& tile, int row, int quarter, const uint32_t (&signs)[32], Block32& v) {
  load(tile.at(row, 32 * quarter), v, signs);
}

// One value with its sign changed, or not: bit 31 of sign. For BF16 the sum is a multiply-add, see
// lower_bf16() in block_io.cuh.
__device__ float to_float(bfloat16 x, uint32_t sign) { return float_of(x.bits * 65536u + sign); }
__device__ float to_float(float x, uint32_t sign) { return xor_sign(x, sign); }

template <class T>
__device__ void load_column_block(
    Tile<T>& tile, int column, int quarter, const uint32_t (&signs)[32], Block32& v) {
  constexpr int NEXT_ROW = Tile<T>::ROW_BYTES / int(sizeof(T));
  const T* values = tile.at(32 * quarter, column);
  UNROLL for (int i = 0; i < 32; i++)
    v[i][0] = to_float(values[i * NEXT_ROW], signs[i]);
}

// ---- sources: what fills a tile
// A source fills a tile with the values from row m0 and column k0 on, and with zeros beyond the
// matrix. start_load() returns what a thread keeps in registers until finish_load().

// A matrix of FP32 or BF16. The copies need no registers and go on while the thread computes.
template <class T>
struct FloatSource {
  using Element = T;
  struct InFlight {};
  static constexpr bool QUANTIZES_ROWS = true;          // the operand x is made, beside x.T
  static constexpr int CHUNK = 16 / sizeof(T);          // values that a thread copies at a time
  static constexpr int CHUNKS_A_ROW = TILE_SIDE / CHUNK;
  static constexpr int ROWS = TILE_THREADS / CHUNKS_A_ROW;      // that all threads copy at a time
  static constexpr int STEPS = TILE_SIDE / ROWS;

  const T* x;                       // [M, K]

  __device__ InFlight start_load(
      Tile<T>& tile, int64_t M, int64_t K, int64_t m0, int64_t k0) const {
    const int row = threadIdx.x % TILE_THREADS / CHUNKS_A_ROW;  // without the % registers spill
    const int column = threadIdx.x % CHUNKS_A_ROW * CHUNK;
    const T* from = x + (m0 + row) * K + k0 + column;
    const int rows = k0 + column < K ? int(min(M - m0, int64_t(TILE_SIDE))) : 0;
    UNROLL for (int i = 0; i < STEPS; i++) {
      const int tile_row = row + i * ROWS;
      cp_async_16(smem_address(tile.at(tile_row, column)), from, tile_row < rows);
      from += ROWS * K;
    }
    return {};
  }

  __device__ void finish_load(Tile<T>&, InFlight) const { cp_async_wait_all(); }
};

__device__ inline uint32_t multiply_bf16x2(uint32_t bits, __nv_bfloat162 scale) {
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, 4);
  pair = __hmul2(pair, scale);
  memcpy(&bits, &pair, 4);
  return bits;
}

// A packed matrix. Each thread reads one block, 16 bytes of codes and a scale, and unpacks it in
// finish_load().
struct PackedSource {
  using Element = bfloat16;
  struct InFlight {
    uint4 codes;
    uint8_t scale;
  };
  static constexpr bool QUANTIZES_ROWS = false;

  const uint8_t* codes;             // [M, K/2]
  const uint8_t* scales;            // [M, K/32]

  __device__ InFlight start_load(
      Tile<bfloat16>&, int64_t M, int64_t K, int64_t m0, int64_t k0) const {
    const int row = threadIdx.x / 4;
    const int quarter = threadIdx.x % 4;
    const int64_t block = ((m0 + row) * K + k0) / 32 + quarter;
    const bool inside = m0 + row < M && k0 + 32 * quarter < K;
    const uint4* packed = reinterpret_cast<const uint4*>(codes);
    return {(inside ? packed[block] : make_uint4(0, 0, 0, 0)),
            (inside ? scales[block] : uint8_t(0))};
  }

  __device__ void finish_load(Tile<bfloat16>& tile, const InFlight& block) const {
    uint32_t eight_codes[4];
    memcpy(eight_codes, &block.codes, 16);
    const __nv_bfloat162 scale = __float2bfloat162_rn(e8m0_value(block.scale));
    bfloat16* to = tile.at(threadIdx.x / 4, 32 * (threadIdx.x % 4));
    UNROLL for (int j = 0; j < 4; j++) {
      const uint2 a = e2m1_to_bf16x4(eight_codes[j]);
      const uint2 b = e2m1_to_bf16x4(eight_codes[j] >> 16);
      reinterpret_cast<uint4*>(to)[j] =
          make_uint4(multiply_bf16x2(a.x, scale), multiply_bf16x2(a.y, scale),
                     multiply_bf16x2(b.x, scale), multiply_bf16x2(b.y, scale));
    }
  }

};

// ---- rotate, scale, round, store

// Rotates v, unless there is no rotation, and returns its largest magnitude. signs_before: order is
// SignOrder::before, and the compiler knows it.
template <bool signs_before>
__device__ float rotate(Block32& v, SignOrder order) {
  float absmax[1];
  if (signs_before || order != SignOrder::none)
    hadamard(v, absmax);
  else
    max_magnitude(v, absmax);
  return absmax[0];
}

// In the functions below, (row, column) is the corner of the output's tile in the operand.

// Scales, rounds and stores a rotated block as FP8. 3/4 v is rounded to 2^e * E2M1, the values that
// MXFP4 has; relative to the shared scale these are unit * E2M1. Without the 3/4 the largest value
// could lie above 6 * 2^e, and would clip. NaN or Inf anywhere makes all of the block NaN.
template <bool right, bool stochastic, bool signs_before>
__device__ void quantize_to_fp8(
    Block32& v,
    float absmax,
    const uint32_t (&signs_after)[8],
    int64_t row,
    int64_t column,
    uint64_t seed,
    const Operand& out,
    int (&warp_max)[TILE_WARPS]) {
  const int tile_row = threadIdx.x / 4;
  const int quarter = threadIdx.x % 4;
  const int e = absmax_exponent(absmax);
  const bool finite = is_finite(absmax);
  const bool nonzero = finite && absmax > 0;
  const int64_t block = (row + tile_row) * out.blocks + column / 32 + quarter;
  const int scale = shared_scale_exponent<right>(nonzero ? e : NO_EXPONENT, warp_max);
  const float nan_or_one = finite ? 1 : float_of(BITS_OF_NAN);
  const float factor = nan_or_one * .75f * pow2(-scale);
  const float unit = pow2(nonzero ? max(e - scale, MIN_S) : 0);

  uint32_t words[8];
  if (stochastic) {
    Fp16Pairs pairs;
    round_stochastically(v, .75f * pow2(-e) * FP16_UNIT, seed, block, pairs);
    UNROLL for (int i = 0; i < 8; i++)
      words[i] = fp16_to_fp8x4<right>(pairs[2 * i], pairs[2 * i + 1], nan_or_one * unit);
  } else {
    UNROLL for (int i = 0; i < 32; i++)
      v[i][0] = round_to_grid(v[i][0] * factor, unit);
    UNROLL for (int i = 0; i < 8; i++)
      words[i] = fp8x4<right>(v[4 * i][0], v[4 * i + 1][0], v[4 * i + 2][0], v[4 * i + 3][0]);
  }
  if (!signs_before) {
    UNROLL for (int i = 0; i < 8; i++)
      words[i] ^= signs_after[i];
  }

  const int64_t tiles_per_row = unsigned(out.blocks + 3) / 4;
  const int64_t tile = row / TILE_SIDE * tiles_per_row + column / TILE_SIDE;
  constexpr bool exchange = !right && !stochastic;      // elsewhere instructions are the bound
  store_tile_row<right, exchange>(
      words, tile_row, quarter, scale, tile, (uint4*)out.values, (float*)out.scales);
}

// Scales, rounds and stores a rotated block as codes and a scale byte.
template <bool stochastic, bool signs_before>
__device__ void quantize_to_codes(
    const Block32& v,
    float absmax,
    const uint32_t (&signs_after)[8],
    int64_t row,
    int64_t column,
    uint64_t seed,
    const Operand& out) {
  const int tile_row = threadIdx.x / 4;
  const int quarter = threadIdx.x % 4;
  const int e = absmax_exponent(absmax);
  const bool finite = is_finite(absmax);
  const bool nonzero = finite && absmax > 0;
  const int64_t block = (row + tile_row) * out.blocks + column / 32 + quarter;
  const bool inside = row + tile_row < out.rows && column / 32 + quarter < out.blocks;

  // A tile of scales is that of 128 x 128 values, this CUDA block's. It is written completely, with
  // the scales of zeros beyond the matrix.
  const int64_t scale_index =
      out.scale_tiles ? scale_tile_index(row + tile_row, column / 32 + quarter, out.blocks)
                      : block;
  if (inside || out.scale_tiles)
    ((uint8_t*)out.scales)[scale_index] = finite ? e + 127 : 255;
  if (!inside)
    return;

  uint4 codes;
  if (stochastic) {
    Fp16Pairs pairs;
    round_stochastically(v, .75f * pow2(-e) * FP16_UNIT, seed, block, pairs);
    codes = fp16_to_codes(pairs);
  } else {
    codes = nearest_codes<false>(v, .75f * pow2(-e) * NEAREST_UNIT);
  }
  if (!signs_before)
    codes = make_uint4(codes.x ^ signs_after[0], codes.y ^ signs_after[1],
                       codes.z ^ signs_after[2], codes.w ^ signs_after[3]);
  ((uint4*)out.values)[block] = nonzero ? codes : make_uint4(0, 0, 0, 0);
}

template <OperandFormat format, bool stochastic, bool signs_before>
__device__ void quantize_block(
    Block32& v,
    SignOrder order,
    const uint32_t (&signs_after)[8],
    int64_t row,
    int64_t column,
    uint64_t seed,
    const Operand& out,
    int (&warp_max)[TILE_WARPS]) {
  const float absmax = rotate<signs_before>(v, order);
  if constexpr (format == OperandFormat::packed)
    quantize_to_codes<stochastic, signs_before>(v, absmax, signs_after, row, column, seed, out);
  else
    quantize_to_fp8<format == OperandFormat::fp8_right, stochastic, signs_before>(
        v, absmax, signs_after, row, column, seed, out, warp_max);
}

// ---- the kernel
// A CUDA block takes tiles below one another, the first in tile row blockIdx.x, each next one
// gridDim.x further down. With prefetch there are two tiles in shared memory, and one is filled
// while the other one is quantised. Without it there is only one, and a CUDA block takes one tile.
// One __syncthreads() a tile is enough: after it, all threads have filled their part of this tile,
// and have finished reading the tile before, which can now be filled again.
template <class Source, OperandFormat format, bool stochastic, bool signs_before>
__global__ void __launch_bounds__(TILE_THREADS, 2) backward_kernel(
    Source source,                  // [M, K]
    int64_t M,
    int64_t K,
    BackwardParams params,
    const int64_t* seeds,           // of rows, if the source makes them, then of columns
    Operand rows,                   // x: [M, K]
    Operand columns,                // x.T: [K, M]
    bool prefetch) {
  using T = typename Source::Element;
  extern __shared__ __align__(16) uint8_t memory[];
  SharedState& shared = *reinterpret_cast<SharedState*>(memory);
  Tile<T>* const tiles = reinterpret_cast<Tile<T>*>(memory + sizeof(SharedState));
  const int64_t k0 = int64_t(blockIdx.y) * TILE_SIDE;
  const int64_t step = int64_t(gridDim.x) * TILE_SIDE;
  const int tile_row = threadIdx.x / 4;
  const int quarter = threadIdx.x % 4;
  constexpr bool is_fp8 = format != OperandFormat::packed;

  int64_t m0 = int64_t(blockIdx.x) * TILE_SIDE;
  auto in_flight = source.start_load(tiles[0], M, K, m0, k0);
  if (threadIdx.x < 32)
    expand_signs(uint32_t(*params.signs), params.column_order, is_fp8, shared.column_signs);
  else if (Source::QUANTIZES_ROWS && threadIdx.x < 64)
    expand_signs(uint32_t(*params.signs), params.row_order, is_fp8, shared.row_signs);

  for (int stage = 0;; stage ^= 1) {
    const bool has_next = prefetch && m0 + step < M;
    source.finish_load(tiles[stage], in_flight);
    __syncthreads();
    if (has_next)
      in_flight = source.start_load(tiles[stage ^ 1], M, K, m0 + step, k0);

    Block32 v;
    if constexpr (Source::QUANTIZES_ROWS) {
      load_row_block(tiles[stage], tile_row, quarter, shared.row_signs.before, v);
      quantize_block<format, stochastic, signs_before>(
          v, params.row_order, shared.row_signs.after, m0, k0, seeds[0], rows,
          shared.warp_max);
      asm volatile("" ::: "memory");            // else signs stay in registers, which then spill
    }
    load_column_block(tiles[stage], tile_row, quarter, shared.column_signs.before, v);
    quantize_block<format, stochastic, signs_before>(
        v, params.column_order, shared.column_signs.after, k0, m0,
        seeds[Source::QUANTIZES_ROWS ? 1 : 0], columns, shared.warp_max);
    if (!has_next)
      break;
    m0 += step;
  }
}

// ---- launches

template <class Source>
struct BackwardCall {
  Source source;
  int64_t M;
  int64_t K;
  BackwardParams params;
  const int64_t* seeds;
  Operand rows;
  Operand columns;
  cudaStream_t stream;
};

template <OperandFormat format, bool stochastic, bool signs_before, class Source>
void launch_kernel(const BackwardCall<Source>& call) {
  const auto kernel = backward_kernel<Source, format, stochastic, signs_before>;
  const int tile_bytes = sizeof(Tile<typename Source::Element>);
  const int state_bytes = sizeof(SharedState);

  // Two CUDA blocks share a multiprocessor, and CUDA keeps 1024 bytes of each for itself.
  const int prefetch_bytes = state_bytes + 2 * tile_bytes;
  const bool prefetch = 2 * (prefetch_bytes + 1024) <= shared_memory_per_multiprocessor();
  const int bytes = prefetch ? prefetch_bytes : state_bytes + tile_bytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);

  // With prefetch there are about as many CUDA blocks as run at a time, and where there are more
  // tiles than that, each block takes several of them, below one another.
  const int64_t tile_rows = ceil_div(call.M, TILE_SIDE);
  const int64_t tile_columns = ceil_div(call.K, TILE_SIDE);
  const int64_t resident = max(int64_t(1), 2 * multiprocessor_count() / tile_columns);
  const int64_t height = prefetch ? min(tile_rows, resident) : tile_rows;
  const dim3 grid = dim3(unsigned(height), unsigned(tile_columns));
  kernel<<<grid, TILE_THREADS, bytes, call.stream>>>(
      call.source, call.M, call.K, call.params, call.seeds, call.rows, call.columns, prefetch);
}

template <bool stochastic, bool signs_before, class Source>
void launch_format(const BackwardCall<Source>& call) {
  constexpr OperandFormat fp8 =
      Source::QUANTIZES_ROWS ? OperandFormat::fp8_left : OperandFormat::fp8_right;
  if (call.params.format == fp8) {
    launch_kernel<fp8, stochastic, signs_before>(call);
  } else {
    launch_kernel<OperandFormat::packed, stochastic, signs_before>(call);
  }
}

template <class Source>
void launch_backward(
    Source source,
    int64_t M,
    int64_t K,
    BackwardParams params,
    const int64_t* seeds,
    Operand rows,
    Operand columns,
    void* stream) {
  if (!M || !K)
    return;
  rows.scale_tiles = params.format == OperandFormat::mxf4;
  columns.scale_tiles = params.format == OperandFormat::mxf4;
  const BackwardCall<Source> call = {
      source, M, K, params, seeds, rows, columns, (cudaStream_t)stream};

  const bool rows_before = params.row_order == SignOrder::before || !Source::QUANTIZES_ROWS;
  const bool signs_before = rows_before && params.column_order == SignOrder::before;
  if (params.stochastic) {
    if (signs_before) {
      launch_format<true, true>(call);
    } else {
      launch_format<true, false>(call);
    }
  } else {
    if (signs_before) {
      launch_format<false, true>(call);
    } else {
      launch_format<false, false>(call);
    }
  }
}

}  // namespace
