/*
What mma_mxf4 (fp4/mma_mxf4.cuh) is, for a GPU without it, and for a CPU that plays a warp (tests/warp.cpp): the tables of
the PTX ISA for .m16n8k64 with .kind::mxf4 written down, read from the receiving side. Slow; every element moves by a shuffle.
*/
#pragma once
#include <cmath>
#include <cstdint>
#include "../fp4/mxfp4.cuh"

namespace model {

FN int dot(uint32_t x, uint32_t y) {                                       // of 8 codes each, in quarters: exact
  int sum = 0;
  for (int i = 0; i < 32; i += 4) sum += int(4 * mxfp4::value(x >> i & 15) * mxfp4::value(y >> i & 15));
  return sum;
}

FN double product(int quarters, uint32_t sa, uint32_t sb) {                // exact, or NaN
  return .25 * quarters * double(mxfp4::scale_of(sa & 255)) * double(mxfp4::scale_of(sb & 255));
}

// the tensor core truncates its sum to FP32 (measured on Blackwell by MMA-Sim, arXiv 2511.10909), once per instruction
FN float truncated(double x) {
  const float y = float(x);
  return fabs(double(y)) > fabs(x) ? nextafterf(y, 0) : y;
}

}  // namespace model

#ifdef __CUDACC__
__noinline__
#endif
__device__ void mma_mxf4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t sa, uint32_t sb,
                         int byte_a, int thread_a, int byte_b, int thread_b) {
  const int lane = threadIdx.x % 32, groupID = lane >> 2, threadID_in_group = lane % 4;
  for (int i = 0; i < 4; i++) {
    // c_i: row = groupID for i < 2, groupID + 8 for i >= 2; col = threadID_in_group * 2 + (i & 1)
    const int row = i < 2 ? groupID : groupID + 8, column = threadID_in_group * 2 + (i & 1);
    double sum = d[i];
    for (int half = 0; half < 2; half++) {
      int quarters = 0;
      for (int k = 32 * half; k < 32 * half + 32; k += 8) {
        // a_j, register j / 8: row = groupID for j < 8 and 16 <= j < 24, else groupID + 8
        //                      col = threadID_in_group * 8 + (j & 7), + 32 for j >= 16
        // b_j, register j / 8: row = threadID_in_group * 8 + (j & 7), + 32 for j >= 8; col = groupID
        const uint32_t x = __shfl_sync(~0u, a[(i < 2 ? 0 : 1) + (k < 32 ? 0 : 2)], row % 8 * 4 + k % 32 / 8);
        const uint32_t y = __shfl_sync(~0u, b[k < 32 ? 0 : 1], column * 4 + k % 32 / 8);
        quarters += model::dot(x, y);
      }
      // scale of A, thread-id 0: the first pair of each four lanes, 1: the second; the pair's first lane for rows 0..7
      // scale of B, thread-id t: lane t of each four. byte-id 0: bytes 0, 1 of the word, 2: bytes 2, 3
      const uint32_t xa = __shfl_sync(~0u, sa, row % 8 * 4 + thread_a * 2 + row / 8) >> 8 * (byte_a + half);
      const uint32_t xb = __shfl_sync(~0u, sb, column * 4 + thread_b) >> 8 * (byte_b + half);
      sum += model::product(quarters, xa, xb);
    }
    d[i] = model::truncated(sum);
  }
}
