/*
alpha * A @ B.T on Hopper's FP8 tensor cores, operands in the FP8 tiles of tiles.cuh: MXFP4's exact values.

A CUDA block of 3 warpgroups stays on its multiprocessor and takes one 256 x 128 tile of the output after the other. One thread
of the first warpgroup keeps three stages of shared memory filled, 128 of K each, by bulk copies; the other two own 128 x 128
outputs each, as two wgmma of 64 x 128. `full` and `empty` are mbarriers, a pair a stage. Two blocks, a cluster, work side by
side on 256 x 256: each copies half of A for both, or else the L2 cache would be the limit. The scales have tensor maps:
racecheck takes what threads read of a bulk copy without one for a race.

Hopper's FP8 unit keeps 13 fractional bits of the largest addend, so it sums only 128 of K; then the partial sum is multiplied
by the scales of its rows of A and B (powers of two: exact) and added in FP32. While one warpgroup does that, the other's
products run.

Before it is stored, a gradient is masked and rotated back (linear.py): outputs go through shared memory, where a thread
finds a block of 32 neighbours among what its warp has. Then TMA stores them, while the next tile begins. When there are too
few tiles for the GPU, K is split, and a second kernel sums the parts, always in the same order.

    nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c gemm_sm90.cu
*/
#include "cuda.cuh"
#include "ops.h"
#include "tiles.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace {

constexpr int STAGES = 3, TILE_BYTES = SIDE * SIDE, THREADS = 384;

struct Shared {
  uint8_t a[STAGES][2][TILE_BYTES], b[STAGES][TILE_BYTES];                // 1024-byte aligned
  uint8_t leaving[8][4][16 * 128];                                        // the same; of a warp, four times: 128 bytes of 16 rows of output
  float a_scales[STAGES][2][SIDE], b_scales[STAGES][32];                  // of b 4, but a box begins at a multiple of 128 bytes
  uint64_t full[STAGES], empty[STAGES];
};
static_assert(sizeof(Shared) <= 232448, "the shared memory a block can have on sm_90");

// ---- which tile

struct Work { int m, n, first, last, split; };                            // 256 x 256 outputs at (m, n), k-tiles first ... last - 1

// neighbours in time share operands: 4 along n, then the next m
__device__ Work work(unsigned i, unsigned rows, unsigned columns, unsigned depth, unsigned splits) {
  const unsigned split = i / (rows * columns), at = i % (rows * columns);
  const unsigned group = at / (4 * rows), width = min(4u, columns - 4 * group), in = at - 4 * rows * group;
  return {int(in / width), int(4 * group + in % width), int(depth * split / splits), int(depth * (split + 1) / splits), int(split)};
}

struct Problem {
  const uint8_t *a, *b;
  CUtensorMap a_scales, b_scales, out;
  int64_t M, N, padded;                                                   // rows; columns; rows, 16 a time, of which parts have so many
  int a_tiles, b_tiles, rows, columns, depth, splits;                     // of 128, 128, 256, 256, 128
  float alpha;
  const int32_t* mask;
};

// byte `at` of one of 16 rows, as TMA wants it and with the chunks of 16 bytes in an order in which two blocks of 32 floats, the second in
// the next 2 KB, meet no bank twice; and the byte `more` after it, where the two have no bit in common
__device__ int spot(int first, int row, int at) { return first + at / 128 * 2048 + row * 128 + (at % 128 ^ row % 8 * 16); }
__device__ int float_spot(int first, int row, int block, int at) { return first + row * 128 + (at ^ row % 4 * 32 ^ block * 16); }
__device__ uint8_t* at(uint8_t* to, int spot, int more) { return to + more / 128 * 2048 + (spot ^ more % 128); }

__device__ void put(void* to, float2 pair, bfloat16) { *(uint32_t*)to = bfloat2(pair.x, pair.y); }
__device__ void put(void* to, float2 pair, float) { *(float2*)to = pair; }

template <class T>                                                        // of the output
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) gemm_kernel(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0), t = threadIdx.x % 128, rank = cluster::rank(), clusters = gridDim.x / 2;
  const int all = p.rows * p.columns * p.splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) tma::init(address(&s.full[i]), 1), tma::init(address(&s.empty[i]), 16);
    tma::init_done();
  }
  cluster::sync();
  int stage = 0, phase = 0;
  const auto next = [&] { if (++stage == STAGES) stage = 0, phase ^= 1; };

  if (group == 0) {                                                       // ---- copies
    wgmma::fewer_registers();
    if (t == 0)
      for (int i = blockIdx.x / 2; i < all; i += clusters) {
        const Work w = work(i, p.rows, p.columns, p.depth, p.splits);
        // the last tiles may not exist: those outputs are not stored
        const int64_t a = int64_t(min(2 * w.m + rank, p.a_tiles - 1)) * p.depth, b = int64_t(min(2 * w.n + rank, p.b_tiles - 1)) * p.depth;
        for (int k = w.first; k < w.last; k++, next()) {
          const uint32_t full = address(&s.full[stage]);
          tma::wait(address(&s.empty[stage]), phase ^ 1);
          tma::expect(full, 3 * TILE_BYTES + 2 * SIDE * 4 + 16);
          tma::copy_to(3, address(s.a[stage][rank]), p.a + (a + k) * TILE_BYTES, TILE_BYTES, full);
          tma::copy_box_to(3, address(s.a_scales[stage][rank]), p.a_scales, 0, int(a + k) * 4, full);
          tma::copy(address(s.b[stage]), p.b + (b + k) * TILE_BYTES, TILE_BYTES, full);
          tma::copy_box(address(s.b_scales[stage]), p.b_scales, 0, int(b + k), full);
        }
      }
    __syncwarp();
    cluster::sync();                                                       // the other block may still write here
    return;
  }

  wgmma::more_registers();                                                // ---- products
  const int half = group - 1, lane = t % 32, row = t / 32 * 16 + lane / 4, warp = t / 32 + 4 * half;
  const uint32_t a_first = wgmma::descriptor(s.a[0][half]), b_first = wgmma::descriptor(s.b[0]);
  uint8_t(*leaving)[16 * 128] = s.leaving[0];
  for (int i = blockIdx.x / 2; i < all; i += clusters) {
    const Work w = work(i, p.rows, p.columns, p.depth, p.splits);
    const int m0 = 256 * w.m + 128 * half + t / 32 * 16, n0 = 256 * w.n + 128 * rank;        // of this warp
    // the masks of the four blocks this thread will rotate are on their way from now on
    int32_t mask[2][2];
    UNROLL for (int i = 0; i < 4; i++) {
      const int64_t m = m0 + 64 * (i / 2) + lane / 2, n = n0 + 64 * (i % 2) + lane % 2 * 32;
      mask[i / 2][i % 2] = p.mask && m < p.M && n < p.N ? p.mask[(m * p.N + n) / 32] : 0;
    }
    float sum[2][64] = {};
    tma::wait(address(&s.full[stage]), phase);
    for (int k = w.first; k < w.last; k++) {
      const uint32_t a = a_first + stage * (2 * TILE_BYTES >> 4), b = b_first + stage * (TILE_BYTES >> 4);
      const int now = stage;
      UNROLL for (int h = 0; h < 2; h++) {                                // rows 0 .. 63, then 64 .. 127
        float part[64], scale[2][4];                                      // scale: of two rows and of 4 times 32 columns
        UNROLL for (int j = 0; j < 8; j++) scale[j / 4][j % 4] = s.a_scales[now][half][64 * h + row + j / 4 * 8] * s.b_scales[now][j % 4];
        wgmma::begin();
        wgmma::multiply<false>(part, a + (h * 64 * SIDE >> 4), b);
        UNROLL for (int j = 1; j < 4; j++) wgmma::multiply<true>(part, a + (h * 64 * SIDE + 32 * j >> 4), b + (32 * j >> 4));
        wgmma::commit();
        if (h == 1) {
          next();
          if (k + 1 < w.last) tma::wait(address(&s.full[stage]), phase);                // what comes next, while the products run
        }
        wgmma::wait(part);
        if (h == 1) {
          __syncwarp();                                                   // the scales have been read, too
          if (lane == 0) cluster::arrive(address(&s.empty[now]));
        }
        UNROLL for (int j = 0; j < 64; j++) sum[h][j] = __fmaf_rn(part[j], scale[j / 2 % 2][j / 16], sum[h][j]);
      }
    }
    // in `leaving`, what this thread has of a row as it was summed, and of one that was rotated
    int me = lane;
    asm volatile("" : "+r"(me));                                          // computed here, not kept in registers
    const int as_summed = spot(8192 * warp, me / 4, me % 4 * 2 * sizeof(T)), turned = spot(8192 * warp, me / 2, me % 2 * 32 * sizeof(T));
    const int to_turn = float_spot(8192 * warp, me / 4, 0, me % 4 * 8), turning = float_spot(8192 * warp, me / 2, me % 2, 0);
    UNROLL for (int c = 0; c < 4; c++) {                                  // ---- a warp: 16 rows of output, 64 columns at a time
      constexpr int PLACES = 8 / sizeof(T);                               // of the four in BF16; in FP32 it takes two
      const int h = c / 2, place = c % PLACES * (4 / PLACES);
      uint8_t* to = leaving[place];
      if (lane == 0) p.mask && PLACES == 4 ? tma::wait_for_reads<2>() : tma::wait_for_reads<PLACES - 1>();     // to turn, BF16 takes two as well
      __syncwarp();
      const auto outputs = [&](int r, int j) { return make_float2(sum[h][c % 2 * 32 + 4 * j + 2 * r], sum[h][c % 2 * 32 + 4 * j + 2 * r + 1]); };
      if (p.mask) {
        UNROLL for (int j = 0; j < 8; j++)
          UNROLL for (int r = 0; r < 2; r++) *(float2*)at(leaving[(place + j / 4) % 4] + 1024 * r, to_turn, j % 4 * 32 ^ j / 4 * 16) = outputs(r, j);
        __syncwarp();
        Vector v;                                                         // a block of 32 neighbours
        UNROLL for (int j = 0; j < 8; j++) {
          const float4 four = *(const float4*)at(leaving[(place + me % 2) % 4], turning, 16 * j);
          v[4 * j][0] = four.x, v[4 * j + 1][0] = four.y, v[4 * j + 2][0] = four.z, v[4 * j + 3][0] = four.w;
        }
        __syncwarp();
        unrotate(v, mask[h][c % 2], p.alpha);
        __align__(16) T rounded[32];
        store(rounded, v);
        UNROLL for (int j = 0; j < 2 * int(sizeof(T)); j++) *(uint4*)at(to, turned, 16 * j) = ((const uint4*)rounded)[j];
      } else {
        UNROLL for (int j = 0; j < 8; j++)
          UNROLL for (int r = 0; r < 2; r++) {
            const float2 pair = outputs(r, j);
            put(at(to + 1024 * r, as_summed, 8 * j * sizeof(T)), make_float2(p.alpha * pair.x, p.alpha * pair.y), T());
          }
      }
      tma::writes_before_async();
      __syncwarp();
      const int m = m0 + 64 * h, n = n0 + c % 2 * 64;
      if (lane == 0 && m < p.M)                                           // what lies beyond the matrix is not stored
        for (int i = 0; i < 4 / PLACES; i++)
          tma::store_box(p.out, n * int(sizeof(T)) + 128 * i, int(w.split * p.padded) + m, address(to) + 8192 * warp + 2048 * i);
      if (lane == 0) tma::commit();
    }
  }
  if (lane == 0) tma::wait_for_reads<0>();
  cluster::sync();
}

template <class T>
__global__ void sum_kernel(const float* partial, int splits, int64_t stride, int64_t blocks, float alpha, const int32_t* mask, T* out) {
  const int64_t block = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (block >= blocks) return;
  Vector v, part;
  load(partial + 32 * block, v);
  for (int i = 1; i < splits; i++) {
    load(partial + i * stride + 32 * block, part);
    UNROLL for (int j = 0; j < 32; j++) v[j][0] += part[j][0];
  }
  if (mask) unrotate(v, mask[block], alpha);
  else UNROLL for (int j = 0; j < 32; j++) v[j][0] *= alpha;
  store(out + 32 * block, v);
}

template <class T> void launch(Problem p, T* out, cudaStream_t stream) {
  p.out = tma::map(out, p.splits > 1 ? p.splits * p.padded : p.M, p.N * sizeof(T), 16);
  const int64_t works = int64_t(p.rows) * p.columns * p.splits, clusters = processors() / 2;
  cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared)));
  gemm_kernel<T><<<2 * unsigned(works < clusters ? works : clusters), THREADS, sizeof(Shared), stream>>>(p);
}

}  // namespace

// into how many parts K is cut: when there is less work than the GPU has room for
int gemm_sm90_splits(int64_t M, int64_t N, int64_t K) {
  const int64_t works = ceil_div(M, 256) * ceil_div(N, 256), depth = ceil_div(K, 128), clusters = processors() / 2;
  return int(works > clusters / 2 || depth < 8 ? 1 : clusters / works < depth / 4 ? clusters / works : depth / 4);
}

void gemm_sm90(const uint8_t* a, const float* a_scales, const uint8_t* b, const float* b_scales, int64_t M, int64_t N, int64_t K, float alpha,
               const int32_t* mask, float* partial, int splits, Values out, void* stream) {
  if (!M || !N) return;
  if (!K) return (void)cudaMemsetAsync(out.data, 0, M * N * (out.bf16 ? 2 : 4), (cudaStream_t)stream);
  const auto over = [](int64_t n, int64_t size) { return int(ceil_div(n, size)); };
  const int depth = over(K, 128), a_tiles = over(M, 128), b_tiles = over(N, 128);
  const CUtensorMap rows = tma::map(a_scales, 4ll * a_tiles * depth, 128, 4, false), columns = tma::map(b_scales, 1ll * b_tiles * depth, 16, 1, false);
  Problem p = {a, b, rows, columns, {}, M, N, 16 * ceil_div(M, 16), a_tiles, b_tiles, over(M, 256), over(N, 256), depth, splits, alpha, mask};
  if (splits == 1) return typed(out, [=](auto* out) { launch(p, out, (cudaStream_t)stream); });
  p.alpha = 1, p.mask = nullptr;
  launch(p, partial, (cudaStream_t)stream);
  const int64_t blocks = M * N / 32;
  typed(out, [=](auto* out) { sum_kernel<<<unsigned(ceil_div(blocks, 128)), 128, 0, (cudaStream_t)stream>>>(partial, splits, p.padded * N, blocks, alpha, mask, out); });
}
