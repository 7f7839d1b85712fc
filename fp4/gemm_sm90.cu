/*
alpha * A @ B.T on Hopper's FP8 tensor cores, operands in the FP8 tiles of tiles.cuh: MXFP4's exact values.

A CUDA block of 3 warpgroups stays on its multiprocessor and takes one 256 x 128 tile of the output after the other. One thread
of the first warpgroup keeps three stages of shared memory filled, 128 of K each, by bulk copies; the other two own
128 x 128 outputs each, as two wgmma of 64 x 128. `full` and `empty` are mbarriers, a pair a stage. Two blocks, a cluster,
work side by side on 256 x 256: each copies half of A for both, or else the L2 cache would be the limit.

Hopper's FP8 unit keeps 13 fractional bits of the largest addend, so it sums only 128 of K; then the partial sum is multiplied
by the scale of its row of A (a power of two: exact) and added in FP32. While one warpgroup does that, the other's products
run: they take turns at the tensor cores. B has one scale a row, which waits until the end: scales for both would double
the instructions here, and they, not the products, are the limit.

Before it is stored, a gradient is masked and rotated back (linear.py): outputs go through shared memory, where a thread
finds a block of 32 neighbours. When there are too few tiles for the GPU, K is split, and a second kernel sums the parts, always
in the same order.

    nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c gemm_sm90.cu
*/
#include <type_traits>
#include "cuda.cuh"
#include "ops.h"
#include "tiles.cuh"

namespace {

constexpr int STAGES = 3, TILE_BYTES = SIDE * SIDE, THREADS = 384, PITCH = SIDE + 4;      // PITCH: 8 rows in different banks

struct Shared {
  uint8_t a[STAGES][2][TILE_BYTES], b[STAGES][TILE_BYTES];                // 1024-byte aligned
  float a_scales[STAGES][2][SIDE];
  float out[2][64][PITCH], columns[2][SIDE];                              // half of a warpgroup's output; the columns' scales
  uint64_t full[STAGES], empty[STAGES];
};

// ---- instructions that have no name in CUDA C++

__device__ uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ void init(uint64_t* barrier, int arrivals) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(barrier)), "r"(arrivals)); }
// tells both blocks of the cluster
__device__ void arrive(uint64_t* barrier) {
  UNROLL for (int rank = 0; rank < 2; rank++)
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(address(barrier)), "r"(rank) : "memory");
}
__device__ void expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
__device__ void wait(uint64_t* barrier, int phase) {
  asm volatile("{ .reg .pred done;\n"
               "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(address(barrier)), "r"(phase) : "memory");
}

// global -> shared memory, of this block or at the same place in both; the barrier there counts the bytes as they arrive
__device__ void copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)) : "memory");
}
__device__ void copy_to_both(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(barrier)), "h"(uint16_t(3)) : "memory");
}

__device__ int cluster_rank() { int rank; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)); return rank; }
__device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n"
               "barrier.cluster.wait.aligned;" ::: "memory");
}

// how wgmma finds a swizzled tile: address / 16, 1024 bytes from one group of 8 rows to the next, 128-byte swizzle
__device__ uint64_t descriptor(const void* p) { return uint64_t(address(p) >> 4) | 1ull << 16 | uint64_t(1024 >> 4) << 32 | 1ull << 62; }

// c [64 x 128] (+)= a [64 x 32] b [128 x 32].T, by the 128 threads of a warpgroup: thread t has row 16 (t / 32) + t % 32 / 4
// and the row 8 below, columns 8 j + 2 (t % 4) and the next: c[4 j .. 4 j + 3]
__device__ void wgmma(float (&c)[64], uint64_t a, uint64_t b, bool add) {
#define C(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
  asm volatile("{ .reg .pred add;\n"
               "setp.ne.b32 add, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e5m2 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "
               "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "%64, %65, add, 1, 1; }"
               : C(0), C(8), C(16), C(24), C(32), C(40), C(48), C(56) : "l"(a), "l"(b), "r"(int(add)));
#undef C
}

// ---- which tile

struct Work { int m, n, first, last, split; };                            // 256 x 256 outputs at (m, n), k-tiles first ... last - 1

// neighbours in time share operands: 4 along n, then the next m
__device__ Work work(int64_t i, int rows, int columns, int depth, int splits) {
  const int split = int(i / (int64_t(rows) * columns)), at = int(i % (int64_t(rows) * columns));
  const int group = at / (4 * rows), width = min(4, columns - 4 * group), in = at - 4 * rows * group;
  return {in / width, 4 * group + in % width, int(int64_t(depth) * split / splits), int(int64_t(depth) * (split + 1) / splits), split};
}

struct Problem {
  const uint8_t *a, *b;
  const float *a_scales, *b_scales;
  int64_t M, N;
  int a_tiles, b_tiles, rows, columns, depth, splits;                     // of 128, 128, 256, 256, 128
  float alpha;
  const int32_t* mask;
};

template <class T>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(THREADS, 1) gemm_kernel(const Problem p, T* out) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int group = threadIdx.x / 128, t = threadIdx.x % 128, rank = cluster_rank(), clusters = gridDim.x / 2;
  const int64_t all = int64_t(p.rows) * p.columns * p.splits;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init(&s.full[i], 1), init(&s.empty[i], 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  int stage = 0, phase = 0;
  const auto next = [&] { if (++stage == STAGES) stage = 0, phase ^= 1; };

  if (group == 0) {                                                       // ---- copies
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (t == 0)
      for (int64_t i = blockIdx.x / 2; i < all; i += clusters) {
        const Work w = work(i, p.rows, p.columns, p.depth, p.splits);
        // the last tiles may not exist: those outputs are not stored
        const int64_t a = int64_t(min(2 * w.m + rank, p.a_tiles - 1)) * p.depth, b = int64_t(min(2 * w.n + rank, p.b_tiles - 1)) * p.depth;
        for (int k = w.first; k < w.last; k++, next()) {
          wait(&s.empty[stage], phase ^ 1);
          expect(&s.full[stage], 3 * TILE_BYTES + 2 * SIDE * 4);
          copy_to_both(s.a[stage][rank], p.a + (a + k) * TILE_BYTES, TILE_BYTES, &s.full[stage]);
          copy_to_both(s.a_scales[stage][rank], p.a_scales + (a + k) * SIDE, SIDE * 4, &s.full[stage]);
          copy(s.b[stage], p.b + (b + k) * TILE_BYTES, TILE_BYTES, &s.full[stage]);
        }
      }
    __syncwarp();
    cluster_sync();                                                       // the other block may still write here
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");                   // ---- products
  const int half = group - 1, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  const auto meet = [&] { asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory"); };        // this warpgroup only
  const auto my_turn = [&] { asm volatile("bar.sync %0, 256;" ::"r"(3 + half) : "memory"); };
  const auto your_turn = [&] { asm volatile("bar.arrive %0, 256;" ::"r"(4 - half) : "memory"); };
  if (half == 1) your_turn();
  for (int64_t i = blockIdx.x / 2; i < all; i += clusters) {
    const Work w = work(i, p.rows, p.columns, p.depth, p.splits);
    const int64_t m0 = 256 * int64_t(w.m) + 128 * half, n0 = 256 * int64_t(w.n) + 128 * rank;
    // what the end needs is on its way from now on: a column's scale, and the mask of the four blocks this thread will rotate
    const float scale = p.alpha * p.b_scales[min(2 * w.n + rank, p.b_tiles - 1) * SIDE + t];
    int32_t mask[2][2];
    UNROLL for (int h = 0; h < 2; h++)
      UNROLL for (int j = 0; j < 2; j++) {
        const int64_t m = m0 + 64 * h + t % 64, n = n0 + 32 * (t / 64 + 2 * j);
        mask[h][j] = p.mask && m < p.M && n < p.N ? p.mask[(m * p.N + n) / 32] : 0;
      }
    float sum[2][64] = {};
    for (int k = w.first; k < w.last; k++, next()) {
      wait(&s.full[stage], phase);
      const uint64_t a = descriptor(s.a[stage][half]), b = descriptor(s.b[stage]);
      UNROLL for (int h = 0; h < 2; h++) {                                // rows 0 .. 63, then 64 .. 127
        float part[64];
        const float a0 = s.a_scales[stage][half][64 * h + row], a1 = s.a_scales[stage][half][64 * h + row + 8];
        my_turn();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        UNROLL for (int j = 0; j < 4; j++) wgmma(part, a + (h * 64 * SIDE + 32 * j >> 4), b + (32 * j >> 4), j > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        your_turn();
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        UNROLL for (int j = 0; j < 64; j++) {
          asm volatile("" : "+f"(part[j]));                               // not before the wait
          sum[h][j] = __fmaf_rn(part[j], j % 4 < 2 ? a0 : a1, sum[h][j]);
        }
      }
      meet();
      if (t == 0) arrive(&s.empty[stage]);
    }
    s.columns[half][t] = scale;
    UNROLL for (int h = 0; h < 2; h++) {                                  // ---- 64 rows of output
      float(*rows)[PITCH] = s.out[half];
      meet();
      UNROLL for (int j = 0; j < 16; j++) {
        const float2 c = *reinterpret_cast<const float2*>(&s.columns[half][8 * j + column]);
        *reinterpret_cast<float2*>(&rows[row][8 * j + column]) = make_float2(c.x * sum[h][4 * j], c.y * sum[h][4 * j + 1]);
        *reinterpret_cast<float2*>(&rows[row + 8][8 * j + column]) = make_float2(c.x * sum[h][4 * j + 2], c.y * sum[h][4 * j + 3]);
      }
      meet();
      Vector v[2];                                                        // blocks t / 64 and two further of row t % 64
      UNROLL for (int j = 0; j < 2; j++) {
        load(&rows[t % 64][32 * (t / 64 + 2 * j)], v[j]);
        if (p.mask) unrotate(v[j], mask[h][j]);
      }
      meet();
      UNROLL for (int j = 0; j < 2; j++) store((T*)rows[t % 64] + 32 * (t / 64 + 2 * j), v[j]);
      meet();
      constexpr int CHUNKS = SIDE * sizeof(T) / 16;                       // 16 bytes a thread: neighbours write neighbours
      UNROLL for (int j = 0; j < CHUNKS / 2; j++) {
        const int r = (128 * j + t) / CHUNKS, chunk = t % CHUNKS;
        const int64_t m = m0 + 64 * h + r, n = n0 + chunk * (16 / sizeof(T));
        if (m < p.M && n < p.N) *reinterpret_cast<uint4*>(out + (w.split * p.M + m) * p.N + n) = reinterpret_cast<const uint4*>(rows[r])[chunk];
      }
    }
  }
  cluster_sync();
}

template <class T>
__global__ void sum_kernel(const float* partial, int splits, int64_t blocks, float alpha, const int32_t* mask, T* out) {
  const int64_t block = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (block >= blocks) return;
  Vector v, part;
  load(partial + 32 * block, v);
  for (int i = 1; i < splits; i++) {
    load(partial + 32 * (i * blocks + block), part);
    UNROLL for (int j = 0; j < 32; j++) v[j][0] += part[j][0];
  }
  UNROLL for (int j = 0; j < 32; j++) v[j][0] *= alpha;
  if (mask) unrotate(v, mask[block]);
  store(out + 32 * block, v);
}

int processors() {
  int device, count;
  cudaGetDevice(&device), cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <class T> void launch(const Problem& p, T* out, cudaStream_t stream) {
  const int64_t works = int64_t(p.rows) * p.columns * p.splits, clusters = processors() / 2;
  cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared)));
  gemm_kernel<<<2 * unsigned(works < clusters ? works : clusters), THREADS, sizeof(Shared), stream>>>(p, out);
}

}  // namespace

// into how many parts K is cut: when there is less work than the GPU has room for
int gemm_sm90_splits(int64_t M, int64_t N, int64_t K) {
  const int64_t works = ((M + 255) / 256) * ((N + 255) / 256), depth = (K + 127) / 128, clusters = processors() / 2;
  return int(works > clusters / 2 || depth < 8 ? 1 : clusters / works < depth / 4 ? clusters / works : depth / 4);
}

void gemm_sm90(const uint8_t* a, const float* a_scales, const uint8_t* b, const float* b_scales, int64_t M, int64_t N, int64_t K, float alpha,
               const int32_t* mask, float* partial, int splits, Values out, void* stream) {
  if (!M || !N) return;
  const auto over = [](int64_t n, int64_t size) { return int((n + size - 1) / size); };
  Problem p = {a, b, a_scales, b_scales, M, N, over(M, 128), over(N, 128), over(M, 256), over(N, 256), over(K, 128), splits, alpha, mask};
  if (splits == 1) return typed(out, [=](auto* out) { launch(p, out, (cudaStream_t)stream); });
  p.alpha = 1, p.mask = nullptr;
  launch(p, partial, (cudaStream_t)stream);
  const int64_t blocks = M * N / 32;
  typed(out, [=](auto* out) { sum_kernel<<<unsigned((blocks + 127) / 128), 128, 0, (cudaStream_t)stream>>>(partial, splits, blocks, alpha, mask, out); });
}
