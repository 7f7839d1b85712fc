/*
out = alpha * A @ B.T of packed matrices on any GPU, in FP32 and without tensor cores: for GPUs that
know neither FP8 nor BF16.

A CUDA block of 256 threads computes 64 x 64 outputs, each thread 4 x 4 of them, 16 rows and
columns apart. Per step of 32 of K, which is one block of codes a row, 128 threads unpack 64 rows
of A and 64 of B into shared memory. FP32 holds an MXFP4 value exactly, and the product of two of
them as well.
*/
#include "block_io.cuh"
#include "ops.h"

namespace {

constexpr int TILE_SIDE = 64;
constexpr int THREADS = 256;
constexpr int PITCH = TILE_SIDE + 1;        // With 65 floats a line, threads meet no bank twice.

template <class T>
__global__ void __launch_bounds__(THREADS)
gemm_kernel(const uint8_t* __restrict__ a,                  // [M, K/2] codes
            const uint8_t* __restrict__ a_scales,           // [M, K/32]
            const uint8_t* __restrict__ b,                  // [N, K/2] codes
            const uint8_t* __restrict__ b_scales,           // [N, K/32]
            int64_t M,
            int64_t N,
            int64_t blocks,                                 // K / 32
            float alpha,
            T* out) {                                       // [M, N]
  __shared__ float values[2][32][PITCH];                    // of A and B: k, row
  const int t = threadIdx.x;
  const int x = t % 16;
  const int y = t / 16;
  const int64_t m0 = int64_t(blockIdx.x) * TILE_SIDE;
  const int64_t n0 = int64_t(blockIdx.y) * TILE_SIDE;
  float sum[4][4] = {};
  for (int64_t k = 0; k < blocks; k++) {
    if (t < 2 * TILE_SIDE) {
      const bool is_b = t >= TILE_SIDE;
      const int64_t row = t % TILE_SIDE + (is_b ? n0 : m0);
      const bool inside = row < (is_b ? N : M);
      const int64_t block = row * blocks + k;
      float scale = 0;
      uint4 codes = make_uint4(0, 0, 0, 0);
      if (inside) {
        scale = e8m0_value((is_b ? b_scales : a_scales)[block]);
        codes = reinterpret_cast<const uint4*>(is_b ? b : a)[block];
      }
      uint32_t word[4];
      memcpy(word, &codes, sizeof(word));
      UNROLL
      for (int i = 0; i < 32; i++)
        values[is_b][i][t % TILE_SIDE] = e2m1_value(word[i / 8] >> (4 * (i % 8)) & 15) * scale;
    }
    __syncthreads();
    UNROLL
    for (int i = 0; i < 32; i++) {
      UNROLL
      for (int r = 0; r < 4; r++) {
        UNROLL
        for (int c = 0; c < 4; c++)
          sum[r][c] = __fmaf_rn(values[0][i][y + 16 * r], values[1][i][x + 16 * c], sum[r][c]);
      }
    }
    __syncthreads();
  }
  UNROLL
  for (int r = 0; r < 4; r++) {
    UNROLL
    for (int c = 0; c < 4; c++) {
      const int64_t m = m0 + y + 16 * r;
      const int64_t n = n0 + x + 16 * c;
      if (m < M && n < N)
        store_float(out[m * N + n], alpha * sum[r][c]);
    }
  }
}

}  // namespace

void gemm_fp32(const uint8_t* a,            // [M, K/2] codes
               const uint8_t* a_scales,     // [M, K/32]
               const uint8_t* b,            // [N, K/2] codes
               const uint8_t* b_scales,     // [N, K/32]
               int64_t M, int64_t N, int64_t K, float alpha,
               FloatMatrix out,             // [M, N]
               void* stream) {
  if (!M || !N)
    return;
  const dim3 grid(unsigned(ceil_div(M, TILE_SIDE)), unsigned(ceil_div(N, TILE_SIDE)));
  with_dtype(out, [=](auto* out) {
    gemm_kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>(a, a_scales, b, b_scales, M, N, K / 32,
                                                            alpha, out);
  });
}
