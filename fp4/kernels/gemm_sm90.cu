/*
out = alpha * A @ B.T on Hopper's FP8 tensor cores. The operands are the FP8 tiles of fp8_tiles.cuh,
which hold the MXFP4 values exactly (but for blocks far smaller than their neighbours).

The grid is persistent: there is one CUDA block per multiprocessor, and two neighbouring blocks form
a cluster, which takes one 256 x 256 tile of the output after another. Each of its two blocks
computes 128 of the tile's columns, for all 256 rows. A block has three warpgroups of 128 threads:

    producer      one thread keeps three stages of shared memory filled, each with 128 of K
    2 consumers   each computes 128 x 128 outputs, as two wgmma of 64 x 128

A stage holds 256 rows of A, of which each block copies one half for both blocks, and 128 rows of B,
which the block copies for itself. If each block copied all that it needs, the L2 cache would be the
limit. A stage has two mbarriers, which tell when it is full and when it is empty:

    producer:   wait for empty[stage]; start the copies, whose bytes arrive at full[stage]
    consumer:   wait for full[stage]; multiply; arrive at empty[stage] of both blocks

Hopper's FP8 unit aligns all addends with the largest one and cuts off their bits beyond the 13th
binary place after its leading one, which rounds towards zero. So it is made to sum no more than 128
of K, which is also as far as one pair of scales reaches. A consumer multiplies each such partial
sum by the scale of its row of A and by that of its 32 rows of B, which are columns of the output.
This is exact, because scales are powers of two. Then it adds the partial sum to its FP32 sums.
While one consumer does this, the products of the other one run.

The scales have tensor maps although a plain bulk copy would do: racecheck of compute-sanitizer
takes it for a race when threads read what a bulk copy without a map has written.

The epilogue (gemm_sm90_epilogue.cuh) masks gradients and rotates them back (linear.py). Then it
sends the outputs through shared memory to TMA, which stores them while the next tile begins. When
the output has too few tiles to fill the GPU, K is split: this kernel writes one partial matrix per
split. A second kernel adds them, always in the same order, and then masks and rotates back.

    nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c gemm_sm90.cu
*/
#include <algorithm>
#include "block_io.cuh"
#include "ops.h"
#include "fp8_tiles.cuh"
#include "gemm_sm90_epilogue.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace {

constexpr int STAGES = 3;
constexpr int THREADS = 384;                            // three warpgroups
constexpr int CONSUMER_WARPS = 8;
constexpr int CLUSTER_TILE = 256;                       // rows and columns of the output
constexpr int TILE_BYTES = TILE_SIDE * TILE_SIDE;       // an FP8 tile: 128 x 128
constexpr int BOTH_BLOCKS = 0b11;                       // of a cluster, a bit each

struct Shared {
  // wgmma and swizzled TMA boxes want addresses that are multiples of 1024 bytes. Those of the
  // first three are, because the size of each of their elements is such a multiple.
  uint8_t a[STAGES][2][TILE_BYTES];                     // a tile per consumer
  uint8_t b[STAGES][TILE_BYTES];
  epilogue::WarpBoxes out[CONSUMER_WARPS];
  float a_scales[STAGES][2][TILE_SIDE];                 // one per row
  float b_scales[STAGES][32];                           // 4 are used, of 128 bytes
  uint64_t full[STAGES];                                // mbarriers: the stage holds its operands
  uint64_t empty[STAGES];                               // mbarriers: all consumers have read it
};
static_assert(sizeof(Shared) <= 232448, "the shared memory that a block can have on sm_90");

struct Problem {
  const uint8_t* a;                                     // [a_tiles, k_tiles] tiles, E4M3
  const uint8_t* b;                                     // [b_tiles, k_tiles] tiles, E5M2
  CUtensorMap a_scales;                                 // [a_tiles * k_tiles * 4, 32] float32
  CUtensorMap b_scales;                                 // [b_tiles * k_tiles, 4] float32
  CUtensorMap out;                                      // [M, N], or [splits * padded_M, N]
  int64_t M;
  int64_t N;
  int64_t padded_M;                                     // rows of a split, boxes of 16
  int a_tiles;                                          // ceil(M / 128)
  int b_tiles;                                          // ceil(N / 128)
  int cluster_rows;                                     // ceil(M / 256)
  int cluster_columns;                                  // ceil(N / 256)
  int k_tiles;                                          // ceil(K / 128)
  int splits;                                           // of K
  float alpha;
  const int32_t* mask;                                  // [M, N/32]; nullptr: do not un-rotate
};

// ---- which tile

struct ClusterTile {
  int m;                                                // in units of 256 rows
  int n;                                                // in units of 256 columns
  int k_begin;                                          // in units of 128 of K
  int k_end;
  int split;
};

// Says which tile has the number `index`. Tiles that are computed at the same time share operands:
// the order is 4 tiles along n, then the next m.
__device__ __forceinline__ ClusterTile cluster_tile(unsigned index, const Problem& p) {
  const unsigned rows = p.cluster_rows;
  const unsigned columns = p.cluster_columns;
  const unsigned k_tiles = p.k_tiles;
  const unsigned splits = p.splits;
  const unsigned split = index / (rows * columns);
  const unsigned in_split = index % (rows * columns);
  const unsigned group = in_split / (4 * rows);
  const unsigned width = min(4u, columns - 4 * group);
  const unsigned in_group = in_split - 4 * rows * group;
  ClusterTile tile;
  tile.m = int(in_group / width);
  tile.n = int(4 * group + in_group % width);
  tile.k_begin = int(k_tiles * split / splits);
  tile.k_end = int(k_tiles * (split + 1) / splits);
  tile.split = int(split);
  return tile;
}

// ---- the pipeline of stages

// The stage that a thread uses next. The phase of its barriers is 0 in the first round through the
// stages, 1 in the second, then 0 again.
struct Pipeline {
  int stage = 0;
  int phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

__device__ __forceinline__ void init_barriers(Shared& s) {
  for (int i = 0; i < STAGES; i++) {
    tma::init(smem_address(&s.full[i]), 1);                        // the producer
    tma::init(smem_address(&s.empty[i]), 2 * CONSUMER_WARPS);      // a lane per warp of both blocks
  }
  tma::init_done();
}

// ---- the producer

// Fills one stage after another with the operands of a tile. Only one thread of a block does this.
__device__ __forceinline__ void fill_stages(Shared& s, const Problem& p, const ClusterTile& tile,
                                            int rank, Pipeline& pipeline) {
  // Two tiles of A, of which one comes from the other block, and one of B arrive, with their
  // scales.
  constexpr int STAGE_BYTES = 3 * TILE_BYTES + 2 * TILE_SIDE * 4 + 4 * 4;
  // The last 128 rows of A or B may not exist. Others are copied in their place: what is computed
  // from them is not stored.
  const int64_t a = int64_t(min(2 * tile.m + rank, p.a_tiles - 1)) * p.k_tiles;
  const int64_t b = int64_t(min(2 * tile.n + rank, p.b_tiles - 1)) * p.k_tiles;
  for (int k = tile.k_begin; k < tile.k_end; k++) {
    const int stage = pipeline.stage;
    const uint32_t full = smem_address(&s.full[stage]);
    // In the first round the parity is 1. The phase before the first counts as over: no wait.
    tma::wait(smem_address(&s.empty[stage]), pipeline.phase ^ 1);
    tma::expect(full, STAGE_BYTES);
    tma::copy_to(BOTH_BLOCKS, smem_address(s.a[stage][rank]), p.a + (a + k) * TILE_BYTES,
                 TILE_BYTES, full);
    tma::copy_box_to(BOTH_BLOCKS, smem_address(s.a_scales[stage][rank]), p.a_scales, 0,
                     int(a + k) * 4, full);
    tma::copy(smem_address(s.b[stage]), p.b + (b + k) * TILE_BYTES, TILE_BYTES, full);
    tma::copy_box(smem_address(s.b_scales[stage]), p.b_scales, 0, int(b + k), full);
    pipeline.advance();
  }
}

// ---- the consumers

// The place of a thread among the consumers.
struct Consumer {
  int half;                                             // which 128 of the block's 256 rows: 0, 1
  int warp;                                             // of the warpgroup: 0 to 3
  int lane;                                             // of the warp
};

// Adds to `sum` the products of this consumer's 128 x 128 outputs over the tile's part of K. sum[h]
// belongs to rows 64 h to 64 h + 63; which row and column each of its 64 values has is said at
// wgmma::multiply.
__device__ __forceinline__ void multiply(float (&sum)[2][64], Shared& s, const ClusterTile& tile,
                                         const Consumer& consumer, Pipeline& pipeline) {
  const uint32_t first_a = wgmma::descriptor(s.a[0][consumer.half]);
  const uint32_t first_b = wgmma::descriptor(s.b[0]);
  const int first_row = 16 * consumer.warp + consumer.lane / 4;
  tma::wait(smem_address(&s.full[pipeline.stage]), pipeline.phase);
  for (int k = tile.k_begin; k < tile.k_end; k++) {
    const int stage = pipeline.stage;
    // Descriptors count in units of 16 bytes.
    const uint32_t a = first_a + stage * (2 * TILE_BYTES / 16);
    const uint32_t b = first_b + stage * (TILE_BYTES / 16);
    UNROLL
    for (int h = 0; h < 2; h++) {
      float partial[64];
      float scale[2][4];                                // of 2 rows, and of 4 times 32 columns
      UNROLL
      for (int j = 0; j < 8; j++) {
        const int row = 64 * h + first_row + 8 * (j / 4);
        scale[j / 4][j % 4] = s.a_scales[stage][consumer.half][row] * s.b_scales[stage][j % 4];
      }
      const uint32_t a_half = a + h * (64 * TILE_SIDE / 16);
      wgmma::begin();
      wgmma::multiply<false>(partial, a_half, b);
      UNROLL
      for (int j = 1; j < 4; j++)
        wgmma::multiply<true>(partial, a_half + 32 * j / 16, b + 32 * j / 16);
      wgmma::commit();
      if (h == 1) {
        pipeline.advance();
        // The next stage is awaited while the products run.
        if (k + 1 < tile.k_end)
          tma::wait(smem_address(&s.full[pipeline.stage]), pipeline.phase);
      }
      wgmma::wait(partial);
      if (h == 1) {
        __syncwarp();                                   // all lanes have read the scales, too
        if (consumer.lane == 0)
          cluster::arrive(smem_address(&s.empty[stage]));
      }
      UNROLL
      for (int j = 0; j < 64; j++)
        sum[h][j] = __fmaf_rn(partial[j], scale[j / 2 % 2][j / 16], sum[h][j]);
    }
  }
}

// ---- the kernel

template <class T>                                      // of the output: float or bfloat16
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1)
gemm_kernel(const __grid_constant__ Problem p) {        // TMA reads the tensor maps where they are
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  // The shuffle tells the compiler that all threads of a warp have the same value.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int thread = threadIdx.x % 128;
  const int rank = cluster::rank();
  const int n_clusters = gridDim.x / 2;
  const int n_tiles = p.cluster_rows * p.cluster_columns * p.splits;
  if (threadIdx.x == 0)
    init_barriers(s);
  cluster::sync();
  Pipeline pipeline;

  if (warpgroup == 0) {                                 // the producer
    wgmma::fewer_registers();
    if (thread == 0) {
      for (int i = blockIdx.x / 2; i < n_tiles; i += n_clusters)
        fill_stages(s, p, cluster_tile(i, p), rank, pipeline);
    }
    __syncwarp();
    cluster::sync();                                    // the other block may still write here
    return;
  }

  wgmma::more_registers();                              // the consumers
  const Consumer consumer = {warpgroup - 1, thread / 32, thread % 32};
  const int lane = consumer.lane;
  const int consumer_warp = 4 * consumer.half + consumer.warp;
  const int boxes_offset = consumer_warp * int(sizeof(epilogue::WarpBoxes));
  for (int i = blockIdx.x / 2; i < n_tiles; i += n_clusters) {
    const ClusterTile tile = cluster_tile(i, p);
    const int m0 = CLUSTER_TILE * tile.m + TILE_SIDE * consumer.half + 16 * consumer.warp;
    const int n0 = CLUSTER_TILE * tile.n + TILE_SIDE * rank;
    // The masks are needed only in the epilogue, but they are on their way from here on.
    int32_t mask[2][2];
    epilogue::load_masks(mask, p.mask, p.M, p.N, m0, n0, lane);
    float sum[2][64] = {};
    multiply(sum, s, tile, consumer, pipeline);

    // The epilogue. Its loop stands here because the compiler makes worse code of it as a function:
    // 0.7 % of the time of a product that is rotated back.
    //
    // The lane is hidden from the compiler, so that it computes the offsets here: before the main
    // loop they would take registers from it.
    int lane_here = lane;
    asm volatile("" : "+r"(lane_here));
    const epilogue::Offsets offsets = epilogue::thread_offsets<T>(boxes_offset, lane_here);
    UNROLL
    for (int chunk = 0; chunk < epilogue::CHUNKS; chunk++) {
      const int first_box = epilogue::first_box<T>(chunk);
      uint8_t* box = s.out[0][first_box];               // of warp 0: the offsets lead to the others
      if (lane == 0)
        epilogue::wait_for_boxes<T>(p.mask);
      __syncwarp();
      if (p.mask)
        epilogue::write_unrotated<T>(sum, chunk, mask[chunk / 2][chunk % 2], p.alpha, s.out,
                                     first_box, lane_here, offsets);
      else
        epilogue::write_summed<T>(sum, chunk, p.alpha, box, offsets);
      tma::writes_before_async();
      __syncwarp();
      const int m = m0 + 64 * (chunk / 2);
      const int n = n0 + epilogue::CHUNK_COLUMNS * (chunk % 2);
      if (lane == 0 && m < p.M) {                       // TMA leaves out columns beyond N
        for (int i = 0; i < epilogue::CHUNK_BOXES<T>; i++)
          tma::store_box(p.out, n * int(sizeof(T)) + epilogue::BOX_ROW_BYTES * i,
                         int(tile.split * p.padded_M) + m,
                         smem_address(box) + boxes_offset + epilogue::BOX_BYTES * i);
      }
      if (lane == 0)
        tma::commit();
    }
  }
  if (lane == 0)
    tma::wait_for_reads<0>();
  cluster::sync();
}

// out = alpha * the sum of the splits' partial matrices, un-rotated if there is a mask. Each thread
// has a block of 32 outputs.
template <class T>
__global__ void sum_kernel(const float* partial,        // [splits, padded_M, N]
                           int splits,
                           int64_t stride,              // padded_M * N
                           int64_t blocks,              // M * N / 32
                           float alpha,
                           const int32_t* mask,         // [M, N/32] or nullptr
                           T* out) {                    // [M, N]
  const int64_t block = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (block >= blocks)
    return;
  Block32 v;
  Block32 part;
  load(partial + 32 * block, v);
  for (int i = 1; i < splits; i++) {
    load(partial + i * stride + 32 * block, part);
    UNROLL
    for (int j = 0; j < 32; j++)
      v[j][0] += part[j][0];
  }
  if (mask) {
    unrotate(v, mask[block], alpha);
  } else {
    UNROLL
    for (int j = 0; j < 32; j++)
      v[j][0] *= alpha;
  }
  store(out + 32 * block, v);
}

// ---- launches

int max_clusters() { return multiprocessor_count() / 2; }

template <class T> void launch(Problem p, T* out, cudaStream_t stream) {
  const int64_t out_rows = p.splits > 1 ? p.splits * p.padded_M : p.M;
  p.out = tma::map(out, out_rows, p.N * sizeof(T), epilogue::BOX_ROWS);
  const int64_t n_tiles = int64_t(p.cluster_rows) * p.cluster_columns * p.splits;
  const unsigned clusters = unsigned(std::min(n_tiles, int64_t(max_clusters())));
  cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       int(sizeof(Shared)));
  gemm_kernel<T><<<2 * clusters, THREADS, sizeof(Shared), stream>>>(p);
}

}  // namespace

// Says into how many parts K is cut: more than one when the output has too few tiles to fill the
// GPU. Each part has at least 4 tiles of K. sum_kernel takes whole blocks of 32 columns, and an
// empty output has no tiles at all: both are left uncut.
int gemm_sm90_splits(int64_t M, int64_t N, int64_t K) {
  const int64_t n_tiles = ceil_div(M, CLUSTER_TILE) * ceil_div(N, CLUSTER_TILE);
  const int64_t k_tiles = ceil_div(K, TILE_SIDE);
  const int64_t clusters = max_clusters();
  const bool can_be_cut = n_tiles > 0 && N % 32 == 0;
  if (!can_be_cut || n_tiles > clusters / 2 || k_tiles < 8)
    return 1;
  return int(std::min(clusters / n_tiles, k_tiles / 4));
}

void gemm_sm90(const uint8_t* a,            // [ceil(M/128), ceil(K/128)] FP8 tiles, E4M3
               const float* a_scales,       // [ceil(M/128), ceil(K/128), 128]
               const uint8_t* b,            // [ceil(N/128), ceil(K/128)] FP8 tiles, E5M2
               const float* b_scales,       // [ceil(N/128), ceil(K/128), 4]
               int64_t M, int64_t N, int64_t K, float alpha,
               const int32_t* mask,         // [M, N/32]: un-rotate with it; nullptr: do not
               float* partial,              // [splits, M rounded up to 16, N] if splits > 1
               int splits,
               FloatMatrix out,             // [M, N]
               void* stream) {
  const auto cuda_stream = (cudaStream_t)stream;
  if (!M || !N)
    return;
  if (!K) {
    cudaMemsetAsync(out.data, 0, M * N * (out.is_bf16 ? 2 : 4), cuda_stream);
    return;
  }
  Problem p = {};
  p.a = a;
  p.b = b;
  p.M = M;
  p.N = N;
  p.padded_M = 16 * ceil_div(M, 16);
  p.a_tiles = int(ceil_div(M, TILE_SIDE));
  p.b_tiles = int(ceil_div(N, TILE_SIDE));
  p.cluster_rows = int(ceil_div(M, CLUSTER_TILE));
  p.cluster_columns = int(ceil_div(N, CLUSTER_TILE));
  p.k_tiles = int(ceil_div(K, TILE_SIDE));
  p.splits = splits;
  p.alpha = alpha;
  p.mask = mask;
  p.a_scales = tma::map(a_scales, int64_t(p.a_tiles) * p.k_tiles * 4, 128, 4, false);
  p.b_scales = tma::map(b_scales, int64_t(p.b_tiles) * p.k_tiles, 16, 1, false);
  if (splits == 1) {
    with_dtype(out, [=](auto* out) { launch(p, out, cuda_stream); });
    return;
  }
  p.alpha = 1;
  p.mask = nullptr;
  launch(p, partial, cuda_stream);
  const int64_t blocks = M * N / 32;
  const unsigned grid = unsigned(ceil_div(blocks, 128));
  with_dtype(out, [=](auto* out) {
    sum_kernel<<<grid, 128, 0, cuda_stream>>>(partial, splits, p.padded_M * N, blocks, alpha, mask,
                                              out);
  });
}
