/*
Lesson 3: read and write memory in pieces that it is made of.

Why lesson 2 is slow. A GPU does not fetch a float: it fetches 32 bytes that lie together, a sector,
and the 32 threads of a warp, which execute an instruction together, can ask for many of them at a
time. In lesson 2 the threads of a warp read x[0], x[32], x[64], ...: 32 sectors, of which they use
4 bytes each. The other 28 bytes wait in a cache for the next instruction, if they are not pushed
out before. Codes are worse: a byte at a time is written into 32 different sectors.

The idea. The same threads own the same blocks, but each load brings 16 bytes, and codes are stored
16 at a time: a float4 or a uint4. A sector takes two loads instead of eight, and the 16 bytes of
codes of a block go out in one store, so that the warp writes 512 bytes in a row.

What to expect. Nothing is computed otherwise, so what is gained shows how much lesson 2 waited.
With 4.7 bytes a value, and about 30 instructions, memory should be all it waits for: 0.1 ms.
The shipped quantiser, ../quantize.cu, is this lesson with three things more: it reads BF16, it
rounds with fewer instructions (../round.cuh), and it writes what the FP8 product reads.

    python -m pytest tests/test_lessons.py -k quantize_3        # is it right?
*/
#include "../mxfp4.cuh"

using namespace mxfp4;

namespace {

constexpr int THREADS = 256;

__device__ void load(const float* x, Block<1>& v) {
  UNROLL for (int i = 0; i < 8; i++) {
    const float4 four = reinterpret_cast<const float4*>(x)[i];
    v[4 * i][0] = four.x;
    v[4 * i + 1][0] = four.y;
    v[4 * i + 2][0] = four.z;
    v[4 * i + 3][0] = four.w;
  }
}

__global__ void quantize_kernel(
    const float* x, int64_t blocks, uint8_t* codes, uint8_t* scales, int32_t* mask) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks)
    return;
  Block<1> v;
  load(x + 32 * block, v);

  float best[1];
  hadamard(v);
  quest_scale(v, best);
  const bool finite = is_finite(best[0]);
  const int e = quest_exponent(best[0], false);
  const float unit = pow2(-e);

  uint32_t inside = 0;
  uint32_t words[4] = {};                   // 32 codes of 4 bits, the first in the lowest bits
  UNROLL for (int i = 0; i < 32; i++) {
    const float u = v[i][0] * unit;
    inside |= uint32_t(fabsf(u) < 6) << i;
    words[i / 8] |= uint32_t(round_nearest(u) | sign_bit(u)) << (4 * (i % 8));
  }
  const uint4 packed = make_uint4(words[0], words[1], words[2], words[3]);
  reinterpret_cast<uint4*>(codes)[block] = finite ? packed : make_uint4(0, 0, 0, 0);
  scales[block] = finite ? e + 127 : 255;
  mask[block] = finite ? inside : 0;
}

}  // namespace

extern "C" void quantize_3(const float* x, int64_t M, int64_t K, uint8_t* codes, uint8_t* scales,
                           int32_t* mask, float*, cudaStream_t stream) {
  const int64_t blocks = M * K / 32;
  quantize_kernel<<<unsigned(ceil_div(blocks, THREADS)), THREADS, 0, stream>>>(
      x, blocks, codes, scales, mask);
}
