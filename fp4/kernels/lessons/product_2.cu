/*
Lesson 6: share what you fetch.

Why lesson 5 is slow. Every thread fetches and unpacks its own row of a and its own row of b, so
that each value of a is unpacked N times, and each of b M times. A sum costs one instruction; what
feeds it costs ten.

The idea. A CUDA block computes 64 x 64 outputs, with 256 threads. Step by step along K, 32 at a
time, 128 of the threads unpack a block of a row each, of 64 rows of a and 64 of b, into shared
memory. Then all of them multiply. So a value is unpacked for 64 outputs instead of one. A thread
computes 4 x 4 outputs: for these it reads 4 values of a and 4 of b, and multiplies each of a with
each of b. Eight reads feed sixteen multiplications, where one output would need two reads for one.

The banks of shared memory (lesson 4) are no trouble: at any time, threads read and write
neighbouring floats of a line, or the same one.

What to expect. For each k a warp reads shared memory 8 times, a clock each, and multiplies and adds
16 times, four in a clock. So the reads bound it, and at most half of 60 TFLOP/s are within reach:
5 ms. More there is not to be had here: tensor cores do 1,000 TFLOP/s in BF16 and 2,000 in FP8,
which is what lessons 7 and 8 are about.
../gemm_fp32.cu, which ships for GPUs without such units, is this file for outputs in BF16, too.

    python -m pytest tests/test_lessons.py -k product_2        # is it right?
*/
#include "../mxfp4.cuh"

using namespace mxfp4;

namespace {

constexpr int SIDE = 64;                    // of the outputs of a CUDA block
constexpr int THREADS = 256;

struct Packed {
  const uint8_t* codes;                     // [rows, 16 * blocks]
  const uint8_t* scales;                    // [rows, blocks]
  int64_t rows;
};

// Unpacks block `block` of a row into one column of `values`; zeros if there is no such row.
__device__ void unpack(
    const Packed& from, int64_t row, int64_t block, int64_t blocks, float (*values)[SIDE], int to) {
  uint4 codes = make_uint4(0, 0, 0, 0);
  float scale = 0;
  if (row < from.rows) {
    codes = reinterpret_cast<const uint4*>(from.codes)[row * blocks + block];
    scale = e8m0_value(from.scales[row * blocks + block]);
  }
  uint32_t words[4];
  memcpy(words, &codes, 16);
  UNROLL for (int i = 0; i < 32; i++)
    values[i][to] = e2m1_value(words[i / 8] >> (4 * (i % 8)) & 15) * scale;
}

__global__ void product_kernel(Packed a, Packed b, int64_t blocks, float* y) {
  __shared__ float a_values[32][SIDE];      // k, row
  __shared__ float b_values[32][SIDE];
  const int t = threadIdx.x;
  const int64_t first_m = int64_t(blockIdx.y) * SIDE;
  const int64_t first_n = int64_t(blockIdx.x) * SIDE;
  const int row = t / 16;                   // of the 4 x 4 outputs, which lie 16 apart
  const int column = t % 16;

  float sums[4][4] = {};
  for (int64_t block = 0; block < blocks; block++) {
    if (t < SIDE)
      unpack(a, first_m + t, block, blocks, a_values, t);
    else if (t < 2 * SIDE)
      unpack(b, first_n + t - SIDE, block, blocks, b_values, t - SIDE);
    __syncthreads();                        // All is there.
    for (int k = 0; k < 32; k++) {
      UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int j = 0; j < 4; j++)
          sums[i][j] = __fmaf_rn(a_values[k][row + 16 * i], b_values[k][column + 16 * j],
                                 sums[i][j]);
    }
    __syncthreads();                        // Nobody reads it any more.
  }

  for (int i = 0; i < 4; i++) {
    for (int j = 0; j < 4; j++) {
      const int64_t m = first_m + row + 16 * i;
      const int64_t n = first_n + column + 16 * j;
      if (m < a.rows && n < b.rows)
        y[m * b.rows + n] = sums[i][j];
    }
  }
}

}  // namespace

extern "C" void product_2(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                          const uint8_t* b_scales, int64_t M, int64_t N, int64_t K, float* y,
                          cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(N, SIDE)), unsigned(ceil_div(M, SIDE)));
  product_kernel<<<grid, THREADS, 0, stream>>>(
      {a, a_scales, M}, {b, b_scales, N}, K / 32, y);
}
