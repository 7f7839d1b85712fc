/*
The ops on a GPU, byte for byte those of reference.py. -fmad=false, see mxfp4.cuh.

    quantize_forward    x -> codes, scales, mask         a thread owns a block of 32, from the load to the packed bytes
    quantize_backward   dy -> operands dy and dy.T       one read: a tile of 128 x 128 waits in shared memory,
                                                         each thread takes a block of a row, then one of a column
    requantize          packed x -> operand x.T          the same; the packed tile is unpacked into shared memory (exact in BF16)

An operand is what the GPU's product wants (Format, ops.h): nothing in between is written to memory. Four neighbouring threads
own 128 neighbouring values, so that they write a line of a tile together; and a tile of scales is that of 128 x 128 values.

What bounds these kernels is not memory alone but instructions: at 3 TB/s an H100 has time for about 35 a value. A rotation
is five additions; to round, see round.cuh.

    nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c quantize.cu
*/
#include <type_traits>
#include "copy.cuh"
#include "ops.h"
#include "round.cuh"
#include "scale_tiles.cuh"
#include "tiles.cuh"

namespace {

constexpr int THREADS = 256, TILE_THREADS = 4 * SIDE;                      // a thread a block of 32; so many in 128 x 128

// ---- the forward quantiser
struct Packed { uint8_t *codes, *scales; int32_t* mask; };
struct Tiles { void *values, *scales; };

template <class T, Format format, bool tiles = format != Format::packed>
__global__ void __launch_bounds__(THREADS) forward_kernel(const T* __restrict__ x, int64_t M, int64_t blocks, bool up, Packed packed, Tiles to) {
  const unsigned depth = unsigned(blocks + 3) / 4;
  const int64_t row = int64_t(blockIdx.x / depth) * (THREADS / 4) + threadIdx.x / 4, at = blockIdx.x % depth * 4 + threadIdx.x % 4;
  const int64_t block = tiles ? row * blocks + at : int64_t(blockIdx.x) * THREADS + threadIdx.x;
  const bool inside = tiles ? row < M && at < blocks : block < M * blocks;
  if (!tiles && !inside) return;
  Vector v = {};
  float t[1];
  if (inside) load(x + 32 * block, v);
  hadamard(v);
  quest(v, t);
  const bool ok = finite(t[0]);
  const int e = quest_exponent(t[0], up);
  const float factor = pow2(-e) * ONE;
  uint32_t unclipped = 0;
  UNROLL for (int i = 31; i >= 0; i--)
    unclipped = __funnelshift_l(bits_of(fabsf(v[i][0] * factor) - 6 * ONE), unclipped, 1);         // the sign: |w| < 6
  const uint4 codes = nearest<true>(v, factor), q = ok ? codes : make_uint4(0, 0, 0, 0);
  if (inside) {
    reinterpret_cast<uint4*>(packed.codes)[block] = q;
    packed.scales[block] = ok ? e + 127 : 255;
    packed.mask[block] = ok ? unclipped : 0;
  }
  if (format == Format::left) fold_block<false>(q, e, ok, row % SIDE, row / SIDE * depth + at / 4, (uint4*)to.values, (float*)to.scales, nullptr);
  if (format == Format::mxf4) ((uint8_t*)to.scales)[tiled(row, at, blocks)] = ok ? e + 127 : 255;          // the whole tile
}

// ---- the backward quantiser, on tiles of 128 x 128

struct Operand {                                                           // [rows, 32 * blocks]
  void *values, *scales;
  int64_t rows, blocks;
  bool scale_tiles;                                                        // the scales of a packed one
};

struct Signs { uint32_t before[32], after[8]; };                           // sign bits of a block, where each use wants them

struct alignas(16) Shared { Signs of_rows, of_columns; int tops[TILE_THREADS / 32]; };

template <class T> struct Tile {                                           // 128 x 128 values in shared memory
  // 16 bytes more after each 32 values, and 8 values more after each 32 rows: then no access below meets a bank twice
  static constexpr int GROUP = 32 * sizeof(T) + 16, PITCH = 4 * GROUP, SKEW = 8 * sizeof(T);
  uint8_t x[SIDE * PITCH + 4 * SKEW];
  __device__ T* at(int row, int column) {
    return reinterpret_cast<T*>(x + row * PITCH + row / 32 * SKEW + column / 32 * GROUP + column % 32 * int(sizeof(T)));
  }
};

// what a warp does once for its block
__device__ void spread(uint32_t signs, Turn turn, bool tiles, Signs& to) {
  const int i = threadIdx.x % 32;
  const auto bit = [=](Turn where, int j) { return turn == where ? signs >> j & 1 : 0; };
  to.before[i] = bit(Turn::before, i) << 31;
  if (i < 8) {                                                             // bit 7 of each byte, or bit 3 of each code
    uint32_t word = 0;
    for (int j = 0; j < (tiles ? 4 : 8); j++)
      if ((tiles || i < 4) && bit(Turn::after, (tiles ? 4 : 8) * i + j)) word |= tiles ? 0x80u << 8 * j : 8u << 4 * j;
    to.after[i] = word;
  }
}

// v, part threadIdx.x % 4 of line threadIdx.x / 4 of the output's tile at (row, column) -> memory; usual: turn is before, known to the compiler
template <Format format, bool random, bool usual>
__device__ void quantize(Vector& v, Turn turn, const uint32_t (&after)[8], int64_t row, int64_t column, uint64_t seed, const Operand& to,
                         int (&tops)[TILE_THREADS / 32]) {
  float m[1];
  Pairs h;
  usual || turn != Turn::none ? hadamard(v, m) : largest(v, m);
  const int line = threadIdx.x / 4, part = threadIdx.x % 4, e = absmax_exponent(m[0]);
  const bool ok = finite(m[0]), counts = ok && m[0] > 0;
  const int64_t block = (row + line) * to.blocks + column / 32 + part;
  if constexpr (format != Format::packed) {
    constexpr bool right = format == Format::right;
    const int scale = shared_scale<right>(counts ? e : NONE, tops);
    const float one = ok ? 1 : float_of(0x7FC00000u), factor = one * .75f * pow2(-scale), unit = pow2(counts ? max(e - scale, -60) : 0);
    uint32_t word[8];
    if (random) {
      stochastic(v, .75f * pow2(-e) * UNIT, seed, block, h);
      UNROLL for (int i = 0; i < 8; i++) word[i] = __byte_perm(fp8x4<right>(h[2 * i], h[2 * i + 1], one * unit), 0, 0x3120);
    } else {
      UNROLL for (int i = 0; i < 32; i++) v[i][0] = nearest(v[i][0] * factor, unit);
      UNROLL for (int i = 0; i < 8; i++) word[i] = fp8x4<right>(v[4 * i][0], v[4 * i + 1][0], v[4 * i + 2][0], v[4 * i + 3][0]);
    }
    if (!usual) UNROLL for (int i = 0; i < 8; i++) word[i] ^= after[i];
    const int64_t tile = row / SIDE * (unsigned(to.blocks + 3) / 4) + column / SIDE;
    store_line<right, !right && !random>(word, line, part, scale, tile, (uint4*)to.values, (float*)to.scales);
  } else {
    const bool inside = row + line < to.rows && column / 32 + part < to.blocks;
    const int64_t place = to.scale_tiles ? tiled(row + line, column / 32 + part, to.blocks) : block;
    if (inside || to.scale_tiles) ((uint8_t*)to.scales)[place] = ok ? e + 127 : 255;       // the whole tile, of zeros beyond the matrix
    if (!inside) return;
    if (random) stochastic(v, .75f * pow2(-e) * UNIT, seed, block, h);
    uint4 q = random ? nibbles(h) : nearest<false>(v, .75f * pow2(-e) * ONE);
    if (!usual) q = make_uint4(q.x ^ after[0], q.y ^ after[1], q.z ^ after[2], q.w ^ after[3]);
    ((uint4*)to.values)[block] = counts ? q : make_uint4(0, 0, 0, 0);
  }
}

// one value of a column, with its sign changed or not
__device__ float get(bfloat16 x, uint32_t sign) { return float_of(x.bits * 65536u + sign); }
__device__ float get(float x, uint32_t sign) { return flipped(x, sign); }

// what fills a tile with rows m0 ... of a matrix [M, K], and with zeros beyond it: begin() has it on its way, end() in the tile
template <class T> struct Matrix {
  using Element = T;
  const T* x;
  static constexpr bool both = true;                                       // the operand of dy itself is wanted too
  static constexpr int N = 16 / sizeof(T), ROWS = TILE_THREADS / (SIDE / N), STEPS = SIDE / ROWS;      // 16 bytes a thread and step
  struct Read {};
  __device__ Read begin(Tile<T>& tile, int64_t M, int64_t K, int64_t m0, int64_t k0) const {
    const int row = threadIdx.x % TILE_THREADS / (SIDE / N), at = threadIdx.x % (SIDE / N) * N;       // % TILE_THREADS: else registers spill
    const T* from = x + (m0 + row) * K + k0 + at;
    const int rows = k0 + at < K ? int(min(M - m0, int64_t(SIDE))) : 0;
    UNROLL for (int i = 0; i < STEPS; i++, from += ROWS * K) copy16(address(tile.at(row + i * ROWS, at)), from, row + i * ROWS < rows);
    return {};
  }
  __device__ void end(Tile<T>&, Read) const { wait_for_copies(); }
};

struct PackedMatrix {
  const uint8_t *codes, *scales;
  using Element = bfloat16;
  static constexpr bool both = false;
  struct Read { uint4 q; uint8_t scale; };
  __device__ Read begin(Tile<bfloat16>&, int64_t M, int64_t K, int64_t m0, int64_t k0) const {         // a block a thread
    const int row = threadIdx.x / 4, at = threadIdx.x % 4;
    const int64_t block = ((m0 + row) * K + k0) / 32 + at;
    const bool inside = m0 + row < M && k0 + 32 * at < K;
    return {inside ? reinterpret_cast<const uint4*>(codes)[block] : make_uint4(0, 0, 0, 0), inside ? scales[block] : uint8_t(0)};
  }
  __device__ void end(Tile<bfloat16>& tile, const Read& r) const {
    const uint32_t word[4] = {r.q.x, r.q.y, r.q.z, r.q.w};
    bfloat16* to = tile.at(threadIdx.x / 4, 32 * (threadIdx.x % 4));
    const __nv_bfloat162 scale = __float2bfloat162_rn(scale_of(r.scale));
    UNROLL for (int j = 0; j < 4; j++) {
      const uint2 a = bfloats(word[j]), b = bfloats(word[j] >> 16);
      uint32_t out[4] = {a.x, a.y, b.x, b.y};
      UNROLL for (int n = 0; n < 4; n++) {
        __nv_bfloat162 two;
        memcpy(&two, &out[n], 4), two = __hmul2(two, scale), memcpy(&out[n], &two, 4);
      }
      reinterpret_cast<uint4*>(to)[j] = make_uint4(out[0], out[1], out[2], out[3]);
    }
  }
};

// tiles below one another. With room for two, `ahead`, one is on its way while the one before is rotated
template <class Source, Format format, bool random, bool usual>
__global__ void __launch_bounds__(TILE_THREADS, 2) backward_kernel(Source source, int64_t M, int64_t K, Backward how, const int64_t* seeds,
                                                                   Operand rows, Operand columns, bool ahead) {
  using T = typename Source::Element;
  extern __shared__ __align__(16) uint8_t memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  Tile<T>* const tiles = reinterpret_cast<Tile<T>*>(memory + sizeof(Shared));
  const int64_t k0 = int64_t(blockIdx.y) * SIDE, step = int64_t(gridDim.x) * SIDE;
  const int line = threadIdx.x / 4, part = threadIdx.x % 4;
  int64_t m0 = int64_t(blockIdx.x) * SIDE;
  auto next = source.begin(tiles[0], M, K, m0, k0);
  if (threadIdx.x < 32) spread(uint32_t(*how.signs), how.columns, format != Format::packed, s.of_columns);
  else if (Source::both && threadIdx.x < 64) spread(uint32_t(*how.signs), how.rows, format != Format::packed, s.of_rows);
  for (int now = 0;; now ^= 1, m0 += step) {
    const bool more = ahead && m0 + step < M;
    source.end(tiles[now], next);
    __syncthreads();
    if (more) next = source.begin(tiles[now ^ 1], M, K, m0 + step, k0);
    Vector v;
    if constexpr (Source::both) {
      load(tiles[now].at(line, 32 * part), v, s.of_rows.before);
      quantize<format, random, usual>(v, how.rows, s.of_rows.after, m0, k0, seeds[0], rows, s.tops);
      asm volatile("" ::: "memory");                                       // the signs are read again, not kept in registers
    }
    const T* column = tiles[now].at(32 * part, line);
    UNROLL for (int i = 0; i < 32; i++) v[i][0] = get(column[i * Tile<T>::PITCH / int(sizeof(T))], s.of_columns.before[i]);
    quantize<format, random, usual>(v, how.columns, s.of_columns.after, k0, m0, seeds[Source::both], columns, s.tops);
    if (!more) break;
  }
}

// ---- launches

template <Format format>
void forward(Values x, int64_t M, int64_t K, bool up, Packed packed, Tiles to, void* stream) {
  const int64_t halves = ceil_div(M, SIDE) * (4 * SIDE / THREADS) * ceil_div(K, SIDE);             // of tiles
  const int64_t all = format == Format::packed ? ceil_div(M * K / 32, THREADS) : halves;
  if (all) typed(x, [=](auto* x) {
    forward_kernel<std::remove_pointer_t<decltype(x)>, format><<<unsigned(all), THREADS, 0, (cudaStream_t)stream>>>(x, M, K / 32, up, packed, to);
  });
}

void quantize_forward(Values x, int64_t M, int64_t K, bool up, uint8_t* codes, uint8_t* scales, int32_t* mask, void* stream) {
  forward<Format::packed>(x, M, K, up, {codes, scales, mask}, {}, stream);
}

template <class Source>
void backward(Source source, int64_t M, int64_t K, Backward how, const int64_t* seeds, Operand rows, Operand columns, void* stream) {
  if (!M || !K) return;
  constexpr Format fp8 = Source::both ? Format::left : Format::right, four = Format::packed;
  const auto choose = [&](auto random, auto usual) {
    return how.format == fp8 ? backward_kernel<Source, fp8, random(), usual()> : backward_kernel<Source, four, random(), usual()>;
  };
  const std::true_type yes; const std::false_type no;
  const bool usual = how.columns == Turn::before && (how.rows == Turn::before || !Source::both);
  const auto kernel = how.stochastic ? usual ? choose(yes, yes) : choose(yes, no) : usual ? choose(no, yes) : choose(no, no);
  const int tile = sizeof(Tile<typename Source::Element>), base = sizeof(Shared);
  const bool ahead = 2 * (base + 2 * tile + 1024) <= shared_memory();      // of two blocks; 1024 are CUDA's
  const int bytes = base + (1 + ahead) * tile;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  rows.scale_tiles = columns.scale_tiles = how.format == Format::mxf4;
  const int64_t high = ceil_div(M, SIDE), wide = ceil_div(K, SIDE);
  const dim3 grid(unsigned(ahead ? min(high, max(int64_t(1), 2 * processors() / wide)) : high), unsigned(wide));
  kernel<<<grid, TILE_THREADS, bytes, (cudaStream_t)stream>>>(source, M, K, how, seeds, rows, columns, ahead);
}

void quantize_backward(Values x, int64_t M, int64_t K, Backward how, const int64_t* seeds,
                       void* values, void* scales, void* values_t, void* scales_t, void* stream) {
  const Operand rows = {values, scales, M, K / 32}, columns = {values_t, scales_t, K, ceil_div(M, 32)};
  typed(x, [=](auto* x) { backward(Matrix<std::remove_pointer_t<decltype(x)>>{x}, M, K, how, seeds, rows, columns, stream); });
}

void requantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how, const int64_t* seed,
                void* values_t, void* scales_t, void* stream) {
  backward(PackedMatrix{codes, scales}, M, K, how, seed, {}, {values_t, scales_t, K, ceil_div(M, 32)}, stream);
}

}  // namespace

// the same, and what the left operand of a product lacks
void quantize_forward_operand(Values x, int64_t M, int64_t K, bool up, uint8_t* codes, uint8_t* scales, int32_t* mask,
                              Format format, void* values, void* tile_scales, void* stream) {
  (format == Format::left ? forward<Format::left> : forward<Format::mxf4>)(x, M, K, up, {codes, scales, mask}, {values, tile_scales}, stream);
}

const Ops cuda = {quantize_forward, quantize_backward, requantize, dequantize_cuda, unrotate_cuda};

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
