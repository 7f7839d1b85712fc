/*
Lesson 5: a product of two packed matrices, the way one would write it down.

What it does. y = a b.T, of a [M, K] and b [N, K] in MXFP4: the sum over k of a[m, k] * b[n, k]. Two
codes share a byte, and 32 values a scale, which is a power of two.

The idea. Each output is a sum of its own, so give each a thread. It walks along a row of a and a
row of b, a block of 32 at a time: the codes' values are multiplied and summed in float32, and the
two scales multiply the sum of the block. That is exact up to the rounding of sums: an E2M1 value
has two significant bits, so that a product has four, and a block's sum fits in a float without any
rounding at all.

What to expect. An H100 can do 60 TFLOP/s in float32, which would be 2.3 ms for 4096 x 4096 x 4096.
But the 32 threads of a warp read 16 rows of b, and so 16 lines of the cache, one in each clock. A
byte is two k: 9 clocks for each k and warp, with the 2 rows of a. There are 4096^3 / 32 of these,
132 processors, and 1.75e9 clocks a second. (80 ms.)

    python -m pytest tests/test_lessons.py -k product_1        # is it right?
*/
#include "../mxfp4.cuh"

using namespace mxfp4;

namespace {

constexpr int SIDE = 16;                    // a CUDA block computes 16 x 16 outputs

__global__ void product_kernel(
    const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales,
    int64_t M, int64_t N, int64_t K, float* y) {
  const int64_t m = int64_t(blockIdx.y) * SIDE + threadIdx.x / SIDE;
  const int64_t n = int64_t(blockIdx.x) * SIDE + threadIdx.x % SIDE;
  if (m >= M || n >= N)
    return;

  float sum = 0;
  for (int64_t block = 0; block < K / 32; block++) {
    const uint8_t* a_codes = a + m * (K / 2) + 16 * block;
    const uint8_t* b_codes = b + n * (K / 2) + 16 * block;
    float of_block = 0;
    for (int i = 0; i < 16; i++) {
      of_block += e2m1_value(a_codes[i] & 15) * e2m1_value(b_codes[i] & 15);
      of_block += e2m1_value(a_codes[i] >> 4) * e2m1_value(b_codes[i] >> 4);
    }
    const float a_scale = e8m0_value(a_scales[m * (K / 32) + block]);
    const float b_scale = e8m0_value(b_scales[n * (K / 32) + block]);
    sum += of_block * a_scale * b_scale;
  }
  y[m * N + n] = sum;
}

}  // namespace

extern "C" void product_1(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                          const uint8_t* b_scales, int64_t M, int64_t N, int64_t K, float* y,
                          cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(N, SIDE)), unsigned(ceil_div(M, SIDE)));
  product_kernel<<<grid, SIDE * SIDE, 0, stream>>>(a, a_scales, b, b_scales, M, N, K, y);
}
