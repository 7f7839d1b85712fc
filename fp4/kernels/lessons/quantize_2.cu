/*
Lesson 2: a block in the registers of one thread.

Why lesson 1 is slow. What one kernel computes, the next one reads back from memory, and memory is
slow: while an H100 moves 3 bytes, it can execute 29 instructions. And 32 threads do the
same rotation.

The idea. Registers are the memory that costs nothing, and a thread has up to 255 of 4 bytes. So let
one thread own a block of 32 values, from the load to the packed bytes: one kernel, nothing in
between, and each number is computed once. For v[i] to be in a register, the compiler has to know i.
So loops over a block are unrolled: 32 copies of the line, each with its own number.

The arithmetic is in ../mxfp4.cuh, which the shipped kernels and the CPU's use as well: the
rotation, the scale and the rounding of lesson 1, in fewer instructions.

What to expect. 4.7 bytes a value have to be moved: 0.1 ms, if nothing else mattered. But the way in
which they are read is bad, as lesson 3 will say: at the worst, 32 bytes are fetched for 4, which
would take 0.75 ms. The truth lies between.

    python -m pytest tests/test_lessons.py -k quantize_2        # is it right?
*/
#include "../mxfp4.cuh"

using namespace mxfp4;

namespace {

constexpr int THREADS = 256;

__global__ void quantize_kernel(
    const float* x, int64_t blocks, uint8_t* codes, uint8_t* scales, int32_t* mask) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks)
    return;
  Block<1> v;                               // float[32][1]: mxfp4.cuh can do several side by side
  UNROLL for (int i = 0; i < 32; i++)
    v[i][0] = x[32 * block + i];

  float best[1];
  hadamard(v);
  quest_scale(v, best);
  const bool finite = is_finite(best[0]);
  const int e = quest_exponent(best[0], false);
  const float unit = pow2(-e);

  uint32_t inside = 0;
  UNROLL for (int i = 0; i < 32; i += 2) {
    const float even = v[i][0] * unit;
    const float odd = v[i + 1][0] * unit;
    inside |= uint32_t(fabsf(even) < 6) << i | uint32_t(fabsf(odd) < 6) << (i + 1);
    const int low = round_nearest(even) | sign_bit(even);
    const int high = round_nearest(odd) | sign_bit(odd);
    codes[16 * block + i / 2] = finite ? low | high << 4 : 0;
  }
  scales[block] = finite ? e + 127 : 255;
  mask[block] = finite ? inside : 0;
}

}  // namespace

extern "C" void quantize_2(const float* x, int64_t M, int64_t K, uint8_t* codes, uint8_t* scales,
                           int32_t* mask, float*, cudaStream_t stream) {
  const int64_t blocks = M * K / 32;
  quantize_kernel<<<unsigned(ceil_div(blocks, THREADS)), THREADS, 0, stream>>>(
      x, blocks, codes, scales, mask);
}
