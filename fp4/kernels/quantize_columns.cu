/*
The quantiser of a GemmSpec on a GPU. columns.cuh has its arithmetic; here a lane is a thread, which
has its 32 values in registers from the load to the store.

A CUDA block makes a tile of the operand, 64 rows of 128 values. A matrix that lies in memory as it
is needed is read directly. Of a transposed one, the tile goes through shared memory: it is copied
there in whole rows of the matrix, and read from there in columns. A packed matrix is unpacked on
the way into shared memory. Only the results are written, and a few sums for a factor.

    quantize_kernel     load, rotate, find scales, round, store
    largest_kernel      load, rotate, find the largest magnitude: the pass before it, for NVFP4
    row_factor_kernel   the pass after it: EDEN's factor of a row, for other formats
    unrotate_kernel     a gradient: factors, mask, and the rotation undone

    nvcc -O3 -fmad=false -DCOLUMN_FORMAT=nvfp4 ... -c quantize_columns.cu
*/
#include "columns.cuh"
#include "columns.h"
#include "fp8_tiles.cuh"
#include "round.cuh"

using namespace columns;
using COLUMN_NAME::PackedMatrix;
using COLUMN_NAME::Quantization;
using COLUMN_NAME::Unrotation;

namespace {

constexpr bool IS_E2M1 = std::is_same_v<Elements, E2M1>;
constexpr bool IS_E4M3 = std::is_same_v<Elements, E4M3>;
#if __CUDA_ARCH__ >= 890
constexpr bool CONVERTS_TO_FP8 = true;      // in one instruction; before Ada it took many
#else
constexpr bool CONVERTS_TO_FP8 = false;
#endif
constexpr int THREADS = 256;
constexpr int TILE_ROWS = 64;
constexpr int TILE_COLUMNS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int WARPS_ACROSS = TILE_COLUMNS / WARP_COLUMNS;
static_assert(TILE_ROWS * TILE_COLUMNS == 32 * THREADS);

__device__ void round_to_e4m3(float& a, float& b) {
  const auto pair = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const float2 rounded = __half22float2(__nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3));
  a = rounded.x;
  b = rounded.y;
}

struct Warp {
  static constexpr int W = 1;

  static __device__ int lane(int) { return threadIdx.x % 32; }

  static __device__ void exchange(const float (&x)[1], int n, float (&other)[1]) {
    other[0] = __shfl_xor_sync(0xFFFFFFFFu, x[0], n);
  }

  // round.cuh has faster ways for E2M1, and newer GPUs have instructions for E4M3.

  static __device__ void round_nearest(Block32& u) {
    if constexpr (IS_E2M1) {
      UNROLL for (int i = 0; i < 32; i++)
        u[i][0] = with_sign_of(u[i][0], round_to_grid(clip(u[i][0], 6), 1));
    } else if constexpr (IS_E4M3 && CONVERTS_TO_FP8) {
      UNROLL for (int i = 0; i < 32; i += 2)
        round_to_e4m3(u[i][0], u[i + 1][0]);
    } else {
      nearest_elements<Warp>(u);
    }
  }

  static __device__ void round_stochastically(Block32& u, const uint32_t (&noise)[8][1]) {
    if constexpr (IS_E2M1) {
      UNROLL for (int i = 0; i < 32; i++)
        u[i][0] = clip(u[i][0], 6);
      Fp16Pairs pairs;
      ::round_stochastically(u, FP16_UNIT, noise, pairs);
      from_fp16(pairs, u);
    } else {
      stochastic_elements<Warp>(u, noise);
    }
  }

  static __device__ void pack(const Block32& elements, uint32_t (&words)[4][1]) {
    Block32 in_units;
    Fp16Pairs pairs;
    UNROLL for (int i = 0; i < 32; i++)
      in_units[i][0] = elements[i][0] * FP16_UNIT;
    round_to_fp16(in_units, pairs);
    const uint4 codes = fp16_to_codes(pairs);
    memcpy(words, &codes, 16);
  }
};

// ---- what a thread owns

struct Place {
  int tile_row;             // in the tile
  int tile_column;
  int64_t row;              // in the operand
  int64_t column;
};

__device__ Place place_of_thread() {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int tile_row = warp / WARPS_ACROSS * WARP_ROWS + row_of_lane(lane);
  const int tile_column = warp % WARPS_ACROSS * WARP_COLUMNS + column_of_lane(lane);
  return {tile_row, tile_column, int64_t(blockIdx.x) * TILE_ROWS + tile_row,
          int64_t(blockIdx.y) * TILE_COLUMNS + tile_column};
}

__device__ void sign_word(const int64_t* signs, int64_t column, uint32_t (&word)[1]) {
  word[0] = SIGNS == Signs::none ? 0 : signs_of_lane(signs, column);
}

// ---- a transposed tile in shared memory

// What a tile holds of a source: its values, of a packed one as BF16, which has them exactly.
template <class Source>
struct InTile {
  using Type = bfloat16;
};

template <class T>
struct InTile<const T*> {
  using Type = T;
};

// Reads 16 bytes of a tile, beginning with this value of the source.
template <class T>
__device__ uint4 load_chunk(const T* x, int64_t index) {
  return *(const uint4*)(x + index);
}

__device__ uint4 load_chunk(PackedMatrix x, int64_t index) {
  const uint32_t codes = *(const uint32_t*)(x.codes + index / 2);
  const float scale = e8m0_value(x.scales[index / 32]);
  uint32_t pairs[4];
  UNROLL for (int j = 0; j < 4; j++) {
    const float even = e2m1_value((codes >> (8 * j)) & 15) * scale;
    const float odd = e2m1_value((codes >> (8 * j + 4)) & 15) * scale;
    pairs[j] = pack_bf16x2(even, odd);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// 128 rows of 64 values of the matrix, of which a thread reads 32 below one another. After each 32
// rows there is room for 8 values: at a time, a warp reads 8 neighbours in 4 rows, 32 rows apart,
// and the room moves each of the 4 rows to other memory banks.
template <class T>
struct Tile {
  static constexpr int CHUNK = 16 / sizeof(T);          // values that a thread copies at a time
  static constexpr int CHUNKS_A_ROW = TILE_ROWS / CHUNK;
  static constexpr int QUARTER = 32 * TILE_ROWS + 8;

  T values[4 * QUARTER];

  __device__ T* at(int row, int column) {
    return values + row / 32 * QUARTER + row % 32 * TILE_ROWS + column;
  }

  // Copies the tile whose corner is (row0, column0) of x [rows, columns]; beyond x it is zero.
  template <class Source>
  __device__ void fill(
      Source x, int64_t rows, int64_t columns, int64_t row0, int64_t column0) {
    UNROLL for (int i = 0; i < TILE_COLUMNS * CHUNKS_A_ROW / THREADS; i++) {
      const int chunk = threadIdx.x + i * THREADS;
      const int row = chunk / CHUNKS_A_ROW;
      const int column = chunk % CHUNKS_A_ROW * CHUNK;
      const bool inside = row0 + row < rows && column0 + column < columns;
      const int64_t index = (row0 + row) * columns + column0 + column;
      const uint4 zeros = make_uint4(0, 0, 0, 0);
      *(uint4*)at(row, column) = inside ? load_chunk(x, index) : zeros;
    }
  }
};

// ---- loading

// Loads the first n of 32 values of a row; the others become zero.
template <class T>
__device__ void load_row(const T* x, int64_t n, Block32& v) {
  if (n >= 32) {
    load(x, v);
    return;
  }
  UNROLL for (int i = 0; i < 32; i++)
    v[i][0] = i < n ? to_float(x[i]) : 0;
}

// Multiplies by the factor of a matrix, or by those of its rows.
template <bool transposed>
__device__ void apply_factor(const Quantization& op, const Place& place, Block32& v) {
  if (transposed && op.factor_by_row) {
    UNROLL for (int i = 0; i < 32; i++)
      if (place.column + i < op.columns)
        v[i][0] *= op.factor[place.column + i];
    return;
  }
  if (op.factor_by_row && place.row >= op.rows)
    return;
  const float factor = op.factor[op.factor_by_row ? place.row : 0];
  UNROLL for (int i = 0; i < 32; i++)
    v[i][0] *= factor;
}

template <bool transposed, class Source>
__device__ void load_values(
    const Quantization& op, Source x, const Place& place, Block32& v) {
  if constexpr (transposed) {
    using T = typename InTile<Source>::Type;
    __shared__ __align__(16) Tile<T> tile;
    tile.fill(x, op.columns, op.rows, place.column - place.tile_column,
              place.row - place.tile_row);
    __syncthreads();
    const T* values = tile.at(place.tile_column, place.tile_row);
    UNROLL for (int i = 0; i < 32; i++)
      v[i][0] = to_float(values[i * TILE_ROWS]);
  } else {
    const int64_t n = place.row < op.rows ? op.columns - place.column : 0;
    load_row(x + place.row * op.columns + place.column, n, v);
  }
  if (op.factor)
    apply_factor<transposed>(op, place, v);
}

// ---- storing
// What is written is a Target: values (float*, bfloat16*), a PackedMatrix, or Fp8Tiles. The last
// two are made of elements and their scale. No GemmSpec uses every target: [[maybe_unused]].

template <bool right>
struct Fp8Tiles {
  uint4* values;
  float* scales;
};

template <class Target>
constexpr bool IS_VALUES = std::is_pointer_v<Target>;

__device__ uint4 codes_of(const Block32& elements, const float (&scale)[1]) {
  uint32_t words[4][1];
  pack_codes<Warp>(elements, scale, words);
  return make_uint4(words[0][0], words[1][0], words[2][0], words[3][0]);
}

[[maybe_unused]] __device__ void store_block(
    PackedMatrix target, int64_t block, const Block32& elements, const float (&scale)[1]) {
  ((uint4*)target.codes)[block] = codes_of(elements, scale);
  target.scales[block] = scale_byte(scale[0]);
}

template <class T>
__device__ void store_block(
    T* target, int64_t block, const Block32& v, const float (&)[1]) {
  store(target + 32 * block, v);
}

// Two CUDA blocks make one of the tiles of 128 x 128 that the FP8 product reads. They write zeros
// beyond the operand, too.
template <bool right>
__device__ void store_tiles(
    Fp8Tiles<right> target,
    const Place& place,
    const Block32& elements,
    const float (&scale)[1]) {
  __shared__ int warp_max[WARPS];
  const int tile_row = blockIdx.x % 2 * TILE_ROWS + place.tile_row;
  const int64_t tile = int64_t(blockIdx.x / 2) * gridDim.y + blockIdx.y;
  const int e = int(scale_byte(scale[0])) - 127;
  packed_to_fp8_block<right>(codes_of(elements, scale), e, is_finite(scale[0]), tile_row, tile,
                             target.values, target.scales, warp_max);
}

// Stores the BF16 values of a warp so that each instruction writes whole sectors of 32 bytes. Two
// neighbouring lanes, whose blocks are neighbours in memory, write both blocks together: of each 16
// values the even lane writes the first 8, and the odd one the others.
[[maybe_unused]] __device__ void store_in_pairs(
    bfloat16* values, int64_t first, bool inside, const Block32& v) {
  const int odd = threadIdx.x % 2;
  const bool other_inside = __shfl_xor_sync(0xFFFFFFFFu, int(inside), 1);
  UNROLL for (int half = 0; half < 2; half++) {
    uint32_t words[8];
    UNROLL for (int i = 0; i < 8; i++)
      words[i] = pack_bf16x2(v[16 * half + 2 * i][0], v[16 * half + 2 * i + 1][0]);
    exchange_chunks(words, odd);
    UNROLL for (int block = 0; block < 2; block++) {
      bfloat16* target = values + first + 32 * (block - odd) + 16 * half + 8 * odd;
      if (block == odd ? inside : other_inside)
        *(uint4*)target = make_uint4(words[4 * block], words[4 * block + 1],
                                     words[4 * block + 2], words[4 * block + 3]);
    }
  }
}

// Stores the blocks of a warp, each thread its own; `block` is its number in the operand.
template <class Target>
__device__ void store_warp(
    Target target,
    const Place& place,
    int64_t block,
    bool inside,
    const Block32& v,
    const float (&scale)[1]) {
  if constexpr (std::is_same_v<Target, bfloat16*> && !IS_SQUARE)
    store_in_pairs(target, 32 * block, inside, v);
  else if constexpr (IS_VALUES<Target> || std::is_same_v<Target, PackedMatrix>) {
    if (inside)
      store_block(target, block, v, scale);
  } else {
    store_tiles(target, place, v, scale);
  }
}

// ---- the kernels

template <bool transposed, class Source>
__global__ void __launch_bounds__(THREADS) largest_kernel(Quantization op, Source x) {
  __shared__ float of_warp[WARPS];
  const Place place = place_of_thread();
  Block32 v;
  float largest[1];
  float other[1];
  uint32_t signs[1];
  load_values<transposed>(op, x, place, v);
  sign_word(op.signs, place.column, signs);
  rotated_max<Warp>(v, signs, largest);
  UNROLL for (int n = 1; n < 32; n *= 2) {
    Warp::exchange(largest, n, other);
    largest[0] = larger(largest[0], other[0]);
  }
  if (threadIdx.x % 32 == 0)
    of_warp[threadIdx.x / 32] = largest[0];
  __syncthreads();
  if (threadIdx.x > 0)
    return;
  UNROLL for (int warp = 1; warp < WARPS; warp++)
    largest[0] = larger(largest[0], of_warp[warp]);
  atomicMax((int*)op.scratch, int(bits_of(largest[0])));        // as integers: NaN is the largest
}

template <bool transposed, class Source, class Target>
__global__ void __launch_bounds__(THREADS) quantize_kernel(
    Quantization op, Source x, Target target) {
  const Place place = place_of_thread();
  const bool inside = place.row < op.rows && place.column < op.padded;
  const int64_t first[1] = {place.row * op.padded + place.column};
  Block32 v;
  Noise<Warp> noise;
  Quantized<Warp> out;
  uint32_t signs[1];
  load_values<transposed>(op, x, place, v);
  sign_word(op.signs, place.column, signs);
  rotate<Warp>(v, signs);
  if (IS_RANDOM)
    draw_noise<Warp>(op.seed[0], first, noise);

  float factor = CONSTANT_FACTOR;
  if (IS_NVFP4) {
    factor = nvfp4_tensor_scale(op.scratch[0]);
    quantize_nvfp4<Warp>(v, factor, noise);
  } else {
    quantize_mx<Warp, !IS_VALUES<Target>>(v, noise, out);
  }

  if (!HAS_ROW_FACTOR && blockIdx.x + blockIdx.y + threadIdx.x == 0)
    op.out_factor[0] = factor;
  store_warp(target, place, first[0] / 32, inside, v, out.scale);
  if (!inside)
    return;
  const int64_t block = first[0] / 32;
  if (HAS_MASK)
    op.mask[block] = out.mask[0];
  if (HAS_ROW_FACTOR) {
    op.scratch[block] = out.vv[0];
    op.scratch[op.rows * op.padded / 32 + block] = out.vq[0];
  }
}

// The sum over a warp, in the order of sum_blocks().
__device__ float sum_of_warp(float x) {
  UNROLL for (int n = 1; n < 32; n *= 2)
    x += __shfl_xor_sync(0xFFFFFFFFu, x, n);
  return x;
}

// A warp adds up a row, in place: it makes one sum of each 32, as long as there are several.
__global__ void __launch_bounds__(THREADS) row_factor_kernel(Quantization op) {
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= op.rows)
    return;
  const int64_t blocks = op.padded / 32;
  float* vv = op.scratch + row * blocks;
  float* vq = vv + op.rows * blocks;
  for (int64_t n = blocks; n > 1; n = ceil_div(n, 32)) {
    for (int64_t first = 0; first < n; first += 32) {
      const bool inside = first + lane < n;
      const float sum_vv = sum_of_warp(inside ? vv[first + lane] : 0);
      const float sum_vq = sum_of_warp(inside ? vq[first + lane] : 0);
      if (lane == 0) {
        vv[first / 32] = sum_vv;
        vq[first / 32] = sum_vq;
      }
    }
    __syncwarp();
  }
  if (lane == 0)
    op.out_factor[row] = eden_correction(vv[0], vq[0]);
}

// Multiplies by the factors of the two operands.
__device__ void apply_factors(const Unrotation& op, const Place& place, Block32& v) {
  const float left = op.left[op.left_by_row ? place.row : 0];
  if (!op.right_by_column) {
    const float factor = left * op.right[0];
    UNROLL for (int i = 0; i < 32; i++)
      v[i][0] *= factor;
    return;
  }
  Block32 right;
  load(op.right + place.column, right);
  UNROLL for (int i = 0; i < 32; i++)
    v[i][0] *= left * right[i][0];
}

template <class T, class U>
__global__ void __launch_bounds__(THREADS) unrotate_kernel(
    Unrotation op, const T* product, U* out) {
  const Place place = place_of_thread();
  const bool inside = place.row < op.rows && place.column < op.columns;
  const int64_t first = place.row * op.columns + place.column;
  Block32 v = {};
  if (inside) {
    load(product + first, v);
    apply_factors(op, place, v);
    const uint32_t mask = HAS_MASK ? op.mask[first / 32] : ~0u;
    UNROLL for (int i = 0; i < 32; i++)
      if (!((mask >> i) & 1))
        v[i][0] *= 0;                                   // NaN stays NaN
  }
  uint32_t signs[1];
  sign_word(op.signs, place.column, signs);
  rotate<Warp, true>(v, signs);
  if (inside)
    store(out + first, v);
}

// ---- launches

dim3 grid_of(int64_t rows, int64_t columns) {
  return dim3(unsigned(ceil_div(rows, TILE_ROWS)), unsigned(ceil_div(columns, TILE_COLUMNS)));
}

// Calls f with the Target. Only with CAN_PACK it can be another one than values.
template <bool transposed, class F>
void with_target(const Quantization& op, F f) {
  if constexpr (CAN_PACK) {
    if (op.packed.codes)
      return f(op.packed);
    const auto tiles = (uint4*)op.tiles.values;
    if (tiles && !op.tiles.right)
      return f(Fp8Tiles<false>{tiles, op.tiles.scales});
    if constexpr (transposed)
      if (tiles)
        return f(Fp8Tiles<true>{tiles, op.tiles.scales});
  }
  with_dtype(op.values, f);
}

template <bool transposed, class Source>
void launch_quantize(const Quantization& op, Source x) {
  const cudaStream_t stream = (cudaStream_t)op.stream;
  dim3 grid = grid_of(op.rows, op.padded);
  if (op.tiles.values)
    grid.x += grid.x % 2;           // whole tiles of 128 rows
  if constexpr (IS_NVFP4) {
    cudaMemsetAsync(op.scratch, 0, sizeof(float), stream);
    largest_kernel<transposed><<<grid, THREADS, 0, stream>>>(op, x);
  }
  with_target<transposed>(op, [=](auto target) {
    quantize_kernel<transposed><<<grid, THREADS, 0, stream>>>(op, x, target);
  });
  if constexpr (HAS_ROW_FACTOR)
    row_factor_kernel<<<unsigned(ceil_div(op.rows, WARPS)), THREADS, 0, stream>>>(op);
}

}  // namespace

namespace COLUMN_NAME {

void quantize_on_gpu(const Quantization& op) {
  if (!op.rows || !op.padded)
    return;
  if (op.packed_x.codes) {
    launch_quantize<true>(op, op.packed_x);
    return;
  }
  with_dtype(op.x, [=](const auto* x) {
    if (op.transposed)
      launch_quantize<true>(op, x);
    else
      launch_quantize<false>(op, x);
  });
}

void unrotate_on_gpu(const Unrotation& op) {
  if (!op.rows || !op.columns)
    return;
  with_dtype(op.product, [=](auto* product) {
    with_dtype(op.out, [=](auto* out) {
      unrotate_kernel<<<grid_of(op.rows, op.columns), THREADS, 0, (cudaStream_t)op.stream>>>(
          op, product, out);
    });
  });
}

}  // namespace COLUMN_NAME

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
