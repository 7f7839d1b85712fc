/*
out = alpha * A @ B.T of MXFP4 matrices on RTX 50, RTX PRO and DGX Spark (sm_120a, sm_121a). A CTA of 8 warps computes 256 x 128
outputs, a warp 64 x 64 of them in registers. Per step of 128 of K, shared memory gets (cp.async, three stages in flight)

    256 rows of A, then 128 rows of B      64 bytes each, as they lie in memory, 16-byte chunks permuted (see at())
    three tiles of scales                  512 bytes each, as scale_tiles.cuh lays them out: two for A, one for B

and each warp does twice, for 64 of K: 4 ldmatrix of A, 4 of B, 32 instructions mma_mxf4. An ldmatrix knows nothing of 4-bit
numbers: it gives lane (g, q) the bytes 4q .. 4q+3 of a 16-byte row g, which are the codes 8q .. 8q+7 that mma_mxf4 wants there.

Rows beyond M or N and values beyond K are zeros that cp.async writes without reading; scale bytes beyond K are cleared.

    nvcc -O3 -gencode=arch=compute_120a,code=sm_120a -c gemm_sm120.cu
*/
#include "copy.cuh"
#include "mma_mxf4.cuh"
#include "ops.h"
#include "scale_tiles.cuh"

namespace {

constexpr int BM = 256, BN = 128, BK = 128, STAGES = 3, THREADS = 256;
constexpr int ROW = BK / 2, SCALES = (BM + BN) * ROW, STAGE = SCALES + (BM + BN) / 128 * 512;      // bytes
static_assert(STAGES * STAGE <= 101376, "the shared memory a block can have on sm_120");

// Where the 16-byte chunk (0..3) of a row (A's 0..255, then B's) lies in a stage. Two rows make 128 bytes, all 32 banks; the
// permutation changes every two rows, so that the 8 rows of an ldmatrix, and 8 threads of a copy, meet every bank once
__device__ uint32_t at(int row, int chunk) { return row * ROW + (chunk ^ row / 2 % 4) * 16; }

__device__ void load_matrices(uint32_t (&r)[4], uint32_t from) {           // four 8 x 16 bytes; lane l gives row l % 8 of l / 8
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}

__device__ void load_words(uint32_t (&r)[2], uint32_t from, uint32_t mask) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  r[0] &= mask, r[1] &= mask;
}

__device__ void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }
__device__ void store_pair(mxfp4::bfloat16* to, float x, float y) {        // x to the lower half; both to nearest
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  *reinterpret_cast<uint32_t*>(to) = pair;
}

template <class T>
__global__ void __launch_bounds__(THREADS) gemm_kernel(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                                                       const uint8_t* b_scales, int M, int N, int K, float alpha, T* out) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t smem = address(shared);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warp_m = threadIdx.x / 64, warp_n = threadIdx.x / 32 % 2;      // 4 x 2 warps
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;

  const auto load = [&](int step) {
    const uint32_t to = smem + step % STAGES * STAGE;
    UNROLL for (int i = threadIdx.x; i < (BM + BN) * 4; i += THREADS) {
      const int row = i / 4, k = step * BK + i % 4 * 32, r = row < BM ? m0 + row : n0 + row - BM;
      const bool inside = r < (row < BM ? M : N) && k < K;
      copy16(to + at(row, i % 4), (row < BM ? a : b) + (inside ? (int64_t(r) * K + k) / 2 : 0), inside);
    }
    if (threadIdx.x < 96) {
      const int tile = threadIdx.x / 32, row = tile < 2 ? m0 + 128 * tile : n0;
      const bool inside = row < (tile < 2 ? M : N);
      copy16(to + SCALES + threadIdx.x * 16,
             (tile < 2 ? a_scales : b_scales) + (inside ? mxfp4::tiled(row + lane, 4 * step, K / 32) : 0), inside);
    }
  };

  float sum[4][8][4] = {};                                                 // 4 x 8 tiles of 16 x 8
  const auto multiply = [&](int step) {
    const uint32_t from = smem + step % STAGES * STAGE;
    // lane (g, q) takes row 8q + g of each 32: as thread_a and thread_b want it
    const int blocks = K / 32 - 4 * step;                                  // that there are; what follows in the word is no data
    const uint32_t mask = blocks < 4 ? (1u << 8 * blocks) - 1 : ~0u, line = from + SCALES + (8 * q + g) * 16;
    uint32_t sa[2], sb[2];
    load_words(sa, line + warp_m / 2 * 512 + warp_m % 2 * 8, mask);        // rows 0 .. 31 and 32 .. 63 of the warp's 64
    load_words(sb, line + 1024 + warp_n * 8, mask);
    UNROLL for (int half = 0; half < 2; half++) {                          // 64 of K each: 32 bytes of a row, chunks 2 half, +1
      uint32_t fa[4][4], fb[4][4];                                         // a register of fb: two for each of two columns' tiles
      UNROLL for (int i = 0; i < 4; i++)
        load_matrices(fa[i], from + at(warp_m * 64 + i * 16 + lane % 16, 2 * half + lane / 16));
      UNROLL for (int j = 0; j < 4; j++)
        load_matrices(fb[j], from + at(BM + warp_n * 64 + j * 16 + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
      UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int j = 0; j < 8; j++) {
          const uint32_t column[2] = {fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]};
          mma_mxf4(sum[i][j], fa[i], column, sa[i / 2], sb[j / 4], 2 * half, i % 2, 2 * half, j % 4);
        }
    }
  };

  const auto commit = [] { asm volatile("cp.async.commit_group;" ::: "memory"); };
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    commit();
  }
  for (int step = 0; step < steps; step++) {
    asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory"); // this thread's part of this step has come,
    __syncthreads();                                                       // everyone's has; and everyone is done with the last
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    commit();
    multiply(step);
  }

  UNROLL for (int i = 0; i < 4; i++)
    UNROLL for (int j = 0; j < 8; j++)
      UNROLL for (int h = 0; h < 2; h++) {
        const int row = m0 + warp_m * 64 + i * 16 + g + 8 * h, column = n0 + warp_n * 64 + j * 8 + 2 * q;
        const float x = alpha * sum[i][j][2 * h], y = alpha * sum[i][j][2 * h + 1];
        T* to = out + int64_t(row) * N + column;
        if (N % 2 == 0) {
          if (row < M && column < N) store_pair(to, x, y);
        } else if (row < M) {                                              // every other row begins between two words
          if (column < N) mxfp4::put(to[0], x);
          if (column + 1 < N) mxfp4::put(to[1], y);
        }
      }
}

}  // namespace

void gemm_sm120(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales,
                int64_t M, int64_t N, int64_t K, float alpha, Values out, void* stream) {
  if (!M || !N) return;
  typed(out, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const dim3 grid(unsigned(mxfp4::ceil_div(N, BN)), unsigned(mxfp4::ceil_div(M, BM)));
    cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, STAGES * STAGE);
    gemm_kernel<T><<<grid, THREADS, STAGES * STAGE, (cudaStream_t)stream>>>(a, a_scales, b, b_scales, int(M), int(N), int(K), alpha, to);
  });
}
