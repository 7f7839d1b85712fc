/*
Lesson 1: quantising to MXFP4, the way one would write it down.

What it does. A matrix x [M, K] is cut into blocks of 32 neighbours in a row. Each is rotated, which
is a product with a Hadamard matrix, gets a scale, a power of two, and its values, divided by the
scale, are rounded to +-0, .5, 1, 1.5, 2, 3, 4, 6. fp4/reference.py is the definition, to the byte.

The idea. A GPU runs thousands of threads that all execute the same function, a kernel; each asks
which thread it is and does its own small part. So give each value a thread, and do one thing after
the other, in three kernels:

    rotate      a thread a value    x -> rotated, a matrix of floats
    scale       a thread a block    rotated -> scales and masks
    round       a thread a byte     rotated, scales -> codes, of which a byte holds two

What to expect. An H100 moves 3e12 bytes a second, and its threads execute 29e12 instructions. A
value costs some 20 bytes, as the rotated matrix travels to memory and back between the kernels, and
some 250 instructions, as the 32 threads of a block all do the whole rotation, of which each keeps
one number: 0.45 ms to move 16384 x 4096 values, and 0.6 to compute. README.md has the words.

    python -m pytest tests/test_lessons.py -k quantize_1        # is it right?
*/
#include <cstdint>

namespace {

constexpr int THREADS = 256;                // of a CUDA block, a group of threads on one processor
constexpr float NORM = 0.17677669529663687f;                // 32^-0.5
constexpr float SCALE_PER_STD = 2.92247856 / 6;             // QuEST: the least error of a Gaussian

__device__ int64_t thread_number() { return int64_t(blockIdx.x) * THREADS + threadIdx.x; }

// Replaces pairs (a, b) by (a + b, a - b) five times; the pairs are 1, 2, 4, 8 and 16 apart.
__device__ void hadamard(float (&v)[32]) {
  for (int stride = 1; stride < 32; stride *= 2) {
    for (int i = 0; i < 32; i++) {
      if (i & stride)
        continue;
      const float a = v[i];
      const float b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
}

__global__ void rotate_kernel(const float* x, int64_t values, float* rotated) {
  const int64_t i = thread_number();
  if (i >= values)
    return;
  float v[32];
  for (int j = 0; j < 32; j++)
    v[j] = x[i / 32 * 32 + j];
  hadamard(v);
  rotated[i] = v[i % 32] * NORM;
}

// Adds up 32 numbers in the order of the definition, which decides how the sum is rounded.
__device__ float sum(float (&v)[32]) {
  for (int stride = 1; stride < 32; stride *= 2) {
    for (int i = 0; i < 32; i += 2 * stride)
      v[i] += v[i + stride];
  }
  return v[0];
}

__global__ void scale_kernel(
    const float* rotated, int64_t blocks, uint8_t* scales, int32_t* mask) {
  const int64_t block = thread_number();
  if (block >= blocks)
    return;
  float v[32];
  float squares[32];
  for (int i = 0; i < 32; i++) {
    v[i] = rotated[32 * block + i];
    squares[i] = v[i] * v[i];
  }
  const float mean = sum(v) / 32;
  float variance = sum(squares) / 32 - mean * mean;
  variance = variance < 0 ? 0 : variance;               // Rounding can leave it below 0.
  const float best = sqrtf(variance) * SCALE_PER_STD + 1e-8f;
  const bool finite = isfinite(best);
  const int e = finite ? ilogbf(best) : 0;              // the power of two below
  uint32_t inside = 0;
  for (int i = 0; i < 32; i++)
    inside |= uint32_t(fabsf(rotated[32 * block + i]) < 6 * ldexpf(1, e)) << i;
  scales[block] = finite ? e + 127 : 255;               // 255 is NaN
  mask[block] = finite ? inside : 0;
}

// The nearest code: how many midpoints lie below. A tie goes to the even code.
__device__ uint32_t code_of(float u) {
  const float a = fabsf(u);
  const int code = (a > .25f) + (a >= .75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) +
                   (a >= 3.5f) + (a > 5);
  return code | (signbit(u) ? 8 : 0);
}

__global__ void round_kernel(
    const float* rotated, const uint8_t* scales, int64_t bytes, uint8_t* codes) {
  const int64_t i = thread_number();
  if (i >= bytes)
    return;
  const int scale = scales[i / 16];
  const float unit = ldexpf(1, 127 - scale);
  const uint32_t even = code_of(rotated[2 * i] * unit);
  const uint32_t odd = code_of(rotated[2 * i + 1] * unit);
  codes[i] = scale == 255 ? 0 : even | odd << 4;
}

unsigned blocks_for(int64_t threads) { return unsigned((threads + THREADS - 1) / THREADS); }
}  // namespace

extern "C" void quantize_1(const float* x, int64_t M, int64_t K, uint8_t* codes, uint8_t* scales,
                           int32_t* mask, float* rotated, cudaStream_t stream) {
  const int64_t n = M * K;
  rotate_kernel<<<blocks_for(n), THREADS, 0, stream>>>(x, n, rotated);
  scale_kernel<<<blocks_for(n / 32), THREADS, 0, stream>>>(rotated, n / 32, scales, mask);
  round_kernel<<<blocks_for(n / 2), THREADS, 0, stream>>>(rotated, scales, n / 2, codes);
}
