/*
Lesson 7: 4-bit numbers on an 8-bit unit, exactly.

Why lesson 6 is not enough. Tensor cores multiply small matrices in one instruction, 30 times as
fast as float32 units. Those of Ada and Hopper know FP8, but not FP4.

The idea. An MXFP4 value is 2^e * E2M1, and FP8 E4M3 is a format with 4 bits of exponent: it holds
2^s * E2M1 without rounding for 15 neighbouring s, from -8 to 6. So take 128 values of a row, which
are four blocks, and let them share one float32 scale, such that the block with the largest e gets
s = 6. What is left of each block's exponent moves into its FP8 values. (A block that is 2^15 times
smaller than its neighbours rounds. fp4/window.py counts such blocks.) The tensor core sums 128
products, and only then is the sum multiplied by the scale of its row of a and of its row of b.

How the instruction sees a matrix. mma.m16n8k32 multiplies 16 x 32 values of a with 8 x 32 of b,
which the 32 threads of a warp hold together (../ptx/mma_fp8.cuh says who holds what).

What to expect. Each instruction does 16 x 8 x 32 products, and needs six reads of shared memory, a
clock each: at most 300 TFLOP/s. While a tile is unpacked, and while sums are scaled, the tensor
cores wait, for about as long again or longer. So 100 to 150 of them, or a millisecond and more.

    python -m pytest tests/test_lessons.py -k product_3        # is it right?
*/
#include "../fp8_tiles.cuh"
#include "../ptx/mma_fp8.cuh"

namespace {

constexpr int SIDE = 64;                    // of the outputs of a CUDA block: each of four warps
constexpr int THREADS = 128;                // computes 32 x 32 of them
constexpr int STEP = 128;                   // of K
constexpr int LINE = STEP + 16;             // bytes a row; with the padding rows meet other banks

struct Packed {
  const uint8_t* codes;                     // [rows, 16 * blocks]
  const uint8_t* scales;                    // [rows, blocks]
  int64_t rows;
};

struct alignas(16) Tile {
  uint8_t values[SIDE][LINE];
  float scales[SIDE];
  __device__ uint32_t four(int row, int k) const { return *(const uint32_t*)&values[row][k]; }
};

// Turns 64 rows x 128 of K into FP8. Four neighbouring threads take a row, each one block of it.
__device__ void unpack(const Packed& from, int64_t first_row, int64_t k, int64_t K, Tile& to) {
  for (int i = threadIdx.x; i < 4 * SIDE; i += THREADS) {
    const int64_t row = first_row + i / 4;
    const int64_t block = row * (K / 32) + k / 32 + i % 4;
    const bool inside = row < from.rows && k + 32 * (i % 4) < K;
    uint4 codes = make_uint4(0, 0, 0, 0);
    int byte = 0;
    if (inside) {
      codes = ((const uint4*)from.codes)[block];
      byte = from.scales[block];
    }
    const int e = byte - 127;
    const int counted_e = byte == 255 || all_zero(codes) ? NO_EXPONENT : e;
    const int scale = shared_scale_exponent<false>(counted_e, nullptr);   // of the four threads
    uint32_t words[8];
    e2m1_to_fp8<false>(codes, e - scale, byte != 255, words);
    memcpy(&to.values[i / 4][32 * (i % 4)], words, 32);
    to.scales[i / 4] = pow2(scale);
  }
}

// c [16, 8] += a [16, 32] b [8, 32].T, of the rows of the tiles from m and n on, and 32 of K.
__device__ void multiply(float (&c)[4], const Tile& a, int m, const Tile& b, int n, int k) {
  const int row = threadIdx.x % 32 / 4;
  const int column = k + threadIdx.x % 4 * 4;
  const uint32_t of_a[4] = {a.four(m + row, column), a.four(m + row + 8, column),
                            a.four(m + row, column + 16), a.four(m + row + 8, column + 16)};
  const uint32_t of_b[2] = {b.four(n + row, column), b.four(n + row, column + 16)};
  mma::multiply_e4m3(c, of_a, of_b);
}

__global__ void product_kernel(Packed a, Packed b, int64_t K, float* y) {
  __shared__ Tile a_tile;
  __shared__ Tile b_tile;
  const int64_t first_m = int64_t(blockIdx.y) * SIDE;
  const int64_t first_n = int64_t(blockIdx.x) * SIDE;
  const int warp_m = threadIdx.x / 64 * 32;             // of this warp's 32 x 32 outputs
  const int warp_n = threadIdx.x / 32 % 2 * 32;
  const int row = threadIdx.x % 32 / 4;                 // of this thread's outputs in 16 x 8
  const int column = threadIdx.x % 4 * 2;

  float sums[2][4][4] = {};
  for (int64_t k = 0; k < K; k += STEP) {
    unpack(a, first_m, k, K, a_tile);
    unpack(b, first_n, k, K, b_tile);
    __syncthreads();
    for (int i = 0; i < 8; i++) {
      const int m = warp_m + i / 4 * 16;
      const int n = warp_n + i % 4 * 8;
      float c[4] = {};
      UNROLL for (int j = 0; j < STEP; j += 32)
        multiply(c, a_tile, m, b_tile, n, j);
      UNROLL for (int j = 0; j < 4; j++)
        sums[i / 4][i % 4][j] +=
            c[j] * a_tile.scales[m + row + j / 2 * 8] * b_tile.scales[n + column + j % 2];
    }
    __syncthreads();
  }
  for (int i = 0; i < 32; i++) {
    const int64_t m = first_m + warp_m + i / 16 * 16 + row + i % 4 / 2 * 8;
    const int64_t n = first_n + warp_n + i / 4 % 4 * 8 + column + i % 2;
    if (m < a.rows && n < b.rows)
      y[m * b.rows + n] = sums[i / 16][i / 4 % 4][i % 4];
  }
}

}  // namespace

extern "C" void product_3(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                          const uint8_t* b_scales, int64_t M, int64_t N, int64_t K, float* y,
                          cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(N, SIDE)), unsigned(ceil_div(M, SIDE)));
  product_kernel<<<grid, THREADS, 0, stream>>>({a, a_scales, M}, {b, b_scales, N}, K, y);
}
