/*
A model of mma_mxf4 (fp4/kernels/ptx/mma_mxf4.cuh) for a GPU without it, and for a CPU that plays a
warp (warp.cpp). It writes down the tables of the PTX ISA for .m16n8k64 with .kind::mxf4, as the
lane that receives an element reads them. It is slow: a shuffle moves every element.
*/
#pragma once
#include <cmath>
#include <cstdint>
#include "../../fp4/kernels/mxfp4.cuh"

namespace model {

// Returns the dot product of 8 codes and 8 codes, in quarters, which is exact.
HOST_DEVICE int dot(uint32_t x, uint32_t y) {
  int sum = 0;
  for (int i = 0; i < 32; i += 4) {
    const float product = mxfp4::e2m1_value((x >> i) & 15) * mxfp4::e2m1_value((y >> i) & 15);
    sum += int(4 * product);
  }
  return sum;
}

// Returns a block's dot product times its two scales: exact, or NaN.
HOST_DEVICE double scaled(int quarters, uint32_t scale_a, uint32_t scale_b) {
  const double a = mxfp4::e8m0_value(scale_a & 255);
  const double b = mxfp4::e8m0_value(scale_b & 255);
  return .25 * quarters * a * b;
}

// Rounds to FP32 towards zero, as the tensor core does with its sum once per instruction (measured
// on Blackwell by MMA-Sim, arXiv 2511.10909).
HOST_DEVICE float truncate(double x) {
  const float y = float(x);
  return fabs(double(y)) > fabs(x) ? nextafterf(y, 0) : y;
}

}  // namespace model

#ifdef __CUDACC__
__noinline__
#endif
__device__ void mma_mxf4(float (&d)[4],
                         const uint32_t (&a)[4],
                         const uint32_t (&b)[2],
                         uint32_t sa,
                         uint32_t sb,
                         int byte_a,
                         int thread_a,
                         int byte_b,
                         int thread_b) {
  const int lane = threadIdx.x % 32;
  const int groupID = lane >> 2;
  const int threadID_in_group = lane % 4;
  for (int i = 0; i < 4; i++) {
    // c_i: row = groupID for i < 2, groupID + 8 for i >= 2; col = threadID_in_group * 2 + (i & 1)
    const int row = i < 2 ? groupID : groupID + 8;
    const int column = threadID_in_group * 2 + (i & 1);
    double sum = d[i];
    for (int half = 0; half < 2; half++) {
      int quarters = 0;
      for (int k = 32 * half; k < 32 * half + 32; k += 8) {
        // a_j, register j / 8: row = groupID for j < 8 and 16 <= j < 24, else groupID + 8
        //                      col = threadID_in_group * 8 + (j & 7), + 32 for j >= 16
        // b_j, register j / 8: row = threadID_in_group * 8 + (j & 7), + 32 for j >= 8; col =
        // groupID
        const int a_register = (i < 2 ? 0 : 1) + (k < 32 ? 0 : 2);
        const uint32_t x = __shfl_sync(~0u, a[a_register], row % 8 * 4 + k % 32 / 8);
        const uint32_t y = __shfl_sync(~0u, b[k < 32 ? 0 : 1], column * 4 + k % 32 / 8);
        quarters += model::dot(x, y);
      }
      // Scale of A, thread-id 0: the first pair of each four lanes, 1: the second; the pair's
      // first lane has rows 0 .. 7. Scale of B, thread-id t: lane t of each four. byte-id 0: bytes
      // 0 and 1 of the word, 2: bytes 2 and 3.
      const int a_lane = row % 8 * 4 + thread_a * 2 + row / 8;
      const int b_lane = column * 4 + thread_b;
      const uint32_t scale_a = __shfl_sync(~0u, sa, a_lane) >> (8 * (byte_a + half));
      const uint32_t scale_b = __shfl_sync(~0u, sb, b_lane) >> (8 * (byte_b + half));
      sum += model::scaled(quarters, scale_a, scale_b);
    }
    d[i] = model::truncate(sum);
  }
}
