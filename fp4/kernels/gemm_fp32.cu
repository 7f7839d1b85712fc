/*
alpha * A @ B.T of packed matrices on any GPU, in FP32 and without tensor cores: for those that know neither FP8 nor BF16.

A CUDA block of 256 threads owns 64 x 64 outputs, a thread 4 x 4 of them, 16 apart. Per step of 32 of K, one block of codes a row,
128 threads unpack the 64 rows of A and of B into shared memory; FP32 holds an MXFP4 value exactly, and their product, too.
*/
#include "cuda.cuh"
#include "ops.h"

namespace {

constexpr int SIDE = 64, THREADS = 256, PITCH = SIDE + 1;                 // then no bank is met twice

template <class T>
__global__ void __launch_bounds__(THREADS) gemm_kernel(const uint8_t* __restrict__ a, const uint8_t* __restrict__ a_scales, const uint8_t* __restrict__ b,
                                                       const uint8_t* __restrict__ b_scales, int64_t M, int64_t N, int64_t blocks, float alpha, T* out) {
  __shared__ float values[2][32][PITCH];                                  // of A and B: k, row
  const int t = threadIdx.x, x = t % 16, y = t / 16;
  const int64_t m0 = int64_t(blockIdx.x) * SIDE, n0 = int64_t(blockIdx.y) * SIDE;
  float sum[4][4] = {};
  for (int64_t k = 0; k < blocks; k++) {
    if (t < 2 * SIDE) {
      const bool right = t >= SIDE;
      const int64_t row = t % SIDE + (right ? n0 : m0), block = row * blocks + k;
      const bool inside = row < (right ? N : M);
      const float scale = inside ? scale_of((right ? b_scales : a_scales)[block]) : 0;
      const uint4 q = inside ? reinterpret_cast<const uint4*>(right ? b : a)[block] : make_uint4(0, 0, 0, 0);
      const uint32_t word[4] = {q.x, q.y, q.z, q.w};
      UNROLL for (int i = 0; i < 32; i++) values[right][i][t % SIDE] = value(word[i / 8] >> 4 * (i % 8) & 15) * scale;
    }
    __syncthreads();
    UNROLL for (int i = 0; i < 32; i++)
      UNROLL for (int r = 0; r < 4; r++)
        UNROLL for (int c = 0; c < 4; c++) sum[r][c] = __fmaf_rn(values[0][i][y + 16 * r], values[1][i][x + 16 * c], sum[r][c]);
    __syncthreads();
  }
  UNROLL for (int r = 0; r < 4; r++)
    UNROLL for (int c = 0; c < 4; c++) {
      const int64_t m = m0 + y + 16 * r, n = n0 + x + 16 * c;
      if (m < M && n < N) put(out[m * N + n], alpha * sum[r][c]);
    }
}

}  // namespace

void gemm_plain(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales, int64_t M, int64_t N, int64_t K,
                float alpha, Values out, void* stream) {
  const dim3 grid(unsigned(ceil_div(M, SIDE)), unsigned(ceil_div(N, SIDE)));
  if (M && N) typed(out, [=](auto* out) {
    gemm_kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>(a, a_scales, b, b_scales, M, N, K / 32, alpha, out);
  });
}
