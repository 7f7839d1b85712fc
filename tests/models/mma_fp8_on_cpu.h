/*
The instruction of ptx/mma_fp8.cuh on a CPU, for cuda_on_cpu.h: the threads of a warp put their
parts of a and b into a place that all can read, and each sums its own outputs in double.
*/
#pragma once
#include "sm90_on_cpu.h"

namespace mma {

inline uint8_t a_of[MAX_THREADS * MAX_BLOCKS / 32][16][32];
inline uint8_t b_of[MAX_THREADS * MAX_BLOCKS / 32][8][32];

inline void multiply_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const int warp = thread_number() / 32;
  const int row = thread_number() % 32 / 4;
  const int column = thread_number() % 4 * 4;
  for (int i = 0; i < 4; i++)
    memcpy(&a_of[warp][row + i % 2 * 8][column + i / 2 * 16], &a[i], 4);
  for (int i = 0; i < 2; i++)
    memcpy(&b_of[warp][row][column + i * 16], &b[i], 4);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    double sum = c[i];
    for (int k = 0; k < 32; k++)
      sum += wgmma::e4m3_values[a_of[warp][row + i / 2 * 8][k]] *
             wgmma::e4m3_values[b_of[warp][column / 2 + i % 2][k]];
    c[i] = float(sum);
  }
  __syncwarp();
}

}  // namespace mma
