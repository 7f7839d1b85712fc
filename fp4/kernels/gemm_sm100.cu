/*
out = alpha * A @ B.T of MXFP4 matrices on B200 and B300 (sm_100a, sm_103a). A CTA computes 128 x 256 outputs; their sums are
256 columns of tensor memory. Per step of 256 of K, one of four stages of shared memory gets, by TMA,

    128 rows of A, then 256 rows of B      128 bytes each
    2 tiles of scales of A, 4 of B         512 bytes each: the step's first and second 128 of K, for each 128 rows

Four warps. The first waits for an empty stage and has it filled; the second waits for a full one and tells the tensor core to
copy the scales to TMEM, multiply 4 times 64 of K, and then to empty the stage. The third allocates TMEM. When the last product is
done all four read the sums, a lane a row, and store them.

    first:   wait empty[s] -> TMA into stage s, its bytes arrive at full[s]
    second:  wait full[s]  -> copy scales, 4 products, commit arrives at empty[s]; after the last step at done

TMA makes zeros of rows beyond M or N and of values beyond K; scale bytes beyond K are cleared, tiles of scales beyond K or N
are neither loaded nor used.

    nvcc -O3 -gencode=arch=compute_100a,code=sm_100a -c gemm_sm100.cu
*/
#include "ops.h"
#include "scale_tiles.cuh"
#include "tcgen05.cuh"
#include "tma.cuh"

namespace {

constexpr int BM = 128, BN = 256, BK = 256, STAGES = 4, THREADS = 128;
constexpr int TILE = 512, B = BM * BK / 2, SCALES = B + BN * BK / 2, STAGE = SCALES + 3 * 2 * TILE;        // bytes
constexpr int SHARED = STAGES * STAGE + 1024;                              // a stage begins at a multiple of 1024
constexpr int SA = 0, SB = 8, SCALE_COLUMNS = 24;                          // TMEM, a stage: 4 columns a tile, 2 of A and 4 of B
static_assert(STAGE % 1024 == 0 && SHARED <= 232448 - 1024 && BN + STAGES * SCALE_COLUMNS <= 512);

template <class T>
__device__ void store(T* to, const float (&v)[16], float alpha, int n, bool aligned) {                     // n of 16 values
  __align__(16) T x[16];
  UNROLL for (int i = 0; i < 16; i++) mxfp4::put(x[i], alpha * v[i]);
  if (n >= 16 && aligned)
    UNROLL for (int i = 0; i < int(sizeof(T)); i++) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(x)[i];
  else
    UNROLL for (int i = 0; i < 16; i++)
      if (i < n) to[i] = x[i];
}

template <class T>
__global__ void __launch_bounds__(THREADS) gemm_kernel(const __grid_constant__ CUtensorMap a, const uint8_t* a_scales,
                                                       const __grid_constant__ CUtensorMap b, const uint8_t* b_scales,
                                                       int M, int N, int K, float alpha, T* out) {
  extern __shared__ uint8_t dynamic[];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES + 1];
  __shared__ uint32_t first_column;
  const uint32_t smem = (address(dynamic) + 1023) / 1024 * 1024;
  const auto full = [&](int s) { return address(barriers + s); };
  const auto empty = [&](int s) { return address(barriers + STAGES + s); };
  const uint32_t done = address(barriers + 2 * STAGES);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;
  const int row_tiles = n0 + 128 < N ? 3 : 2;                              // of scales: one for A, one or two for B
  const auto k_tiles = [&](int step) { return K - step * BK > 128 ? 2 : 1; };

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) tma::init(full(s), 1), tma::init(empty(s), tc::ISSUERS);
    tma::init(done, tc::ISSUERS);
    tma::init_done();
  }
  if (warp == 2) tc::alloc(address(&first_column), 512);
  tc::fence_before(), __syncthreads(), tc::fence_after();
  const uint32_t sums = first_column, scales = sums + BN;

  if (warp == 0 && lane == 0) {
    for (int step = 0; step < steps; step++) {
      const int s = step % STAGES, bytes = k_tiles(step) * TILE;
      const uint32_t to = smem + s * STAGE;
      tma::wait(empty(s), step / STAGES % 2 ^ 1);                          // at once the first time round
      tma::expect(full(s), SCALES + row_tiles * bytes);
      tma::copy_box(to, a, step * BK / 2, m0, full(s));
      tma::copy_box(to + B, b, step * BK / 2, n0, full(s));
      for (int t = 0; t < row_tiles; t++) {                                // tiles of one row of tiles follow each other
        const uint8_t* from = (t ? b_scales : a_scales) + mxfp4::tiled(t ? n0 + 128 * (t - 1) : m0, step * BK / 32, K / 32);
        tma::copy(to + SCALES + t * 2 * TILE, from, bytes, full(s));
      }
    }
  } else if (warp == 1) {
    const bool issues = tc::elect();
    const int columns = min(BN, (N - n0 + 15) / 16 * 16);
    for (int step = 0; step < steps; step++) {
      const int s = step % STAGES, tiles = k_tiles(step);
      const uint32_t from = smem + s * STAGE, to = scales + s * SCALE_COLUMNS;
      tma::wait(full(s), step / STAGES % 2);
      if (step == steps - 1 && K % 64) {                                   // a product takes two scale bytes, and one is no data
        const uint32_t mask = (1u << K / 32 % 4 * 8) - 1;                  // but 0 will do: its codes are 0
        for (int t = 0; t < row_tiles; t++)
          for (int i = 0; i < 4; i++) {
            const uint32_t word = from + SCALES + (2 * t + tiles - 1) * TILE + lane * 16 + i * 4;
            asm volatile("{ .reg .u32 x; ld.shared.u32 x, [%0]; and.b32 x, x, %1; st.shared.u32 [%0], x; }" :: "r"(word), "r"(mask) : "memory");
          }
        tma::writes_before_async();
        __syncwarp();
      }
      tc::fence_after();
      if (issues) {
        for (int half = 0; half < tiles; half++) {
          const uint32_t tile = from + SCALES + half * TILE;
          tc::copy_scales(to + SA + 4 * half, tc::scales_descriptor(tile));
          for (int t = 1; t < row_tiles; t++)
            tc::copy_scales(to + SB + 8 * half + 4 * (t - 1), tc::scales_descriptor(tile + t * 2 * TILE));
        }
        for (int i = 0; i < 4 && step * BK + i * 64 < K; i++)              // 64 of K: 32 bytes of a row, two bytes of a scale word
          tc::mma(sums, tc::rows_descriptor(from + 32 * i), tc::rows_descriptor(from + B + 32 * i),
                  tc::instruction(BM, columns, i % 2 * 2), to + SA + i / 2 * 4, to + SB + i / 2 * 8, step || i);
        tc::commit(empty(s));
      }
      __syncwarp();
    }
    if (issues) tc::commit(done);
  }

  tma::wait(done, 0);
  tc::fence_after();
  const int row = m0 + threadIdx.x;
  const bool aligned = N % (16 / sizeof(T)) == 0;
  for (int column = 0; column < BN && n0 + column < N; column += 16) {
    float v[16];
    __syncwarp();                                                          // a warp loads together
    tc::load(sums + (warp * 32 << 16) + column, v);
    if (row < M) store(out + int64_t(row) * N + n0 + column, v, alpha, N - n0 - column, aligned);
  }
  tc::fence_before(), __syncthreads();
  if (warp == 2) tc::dealloc(sums, 512);
}

}  // namespace

void gemm_sm100(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales,
                int64_t M, int64_t N, int64_t K, float alpha, Values out, void* stream) {
  if (!M || !N) return;
  if (!K) return (void)cudaMemsetAsync(out.data, 0, M * N * (out.bf16 ? 2 : 4), (cudaStream_t)stream);
  const CUtensorMap a_map = tma::map(a, M, K / 2, BM), b_map = tma::map(b, N, K / 2, BN);
  typed(out, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const dim3 grid(unsigned(mxfp4::ceil_div(N, BN)), unsigned(mxfp4::ceil_div(M, BM)));
    cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED);
    gemm_kernel<T><<<grid, THREADS, SHARED, (cudaStream_t)stream>>>(a_map, a_scales, b_map, b_scales, int(M), int(N), int(K), alpha, to);
  });
}
