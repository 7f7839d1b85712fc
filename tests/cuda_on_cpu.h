/*
Enough of CUDA to run our kernels on a CPU, slowly: one CUDA block after the other, a thread of the system a CUDA thread.
test_cuda_on_cpu.py puts this before a .cu and turns each launch into a call of launch(). PTX is not known here: of
#if __CUDA_ARCH__ the plain branch runs.
*/
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#define __launch_bounds__(...)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#define __shared__ static                                      // of a kernel: one block runs at a time
#define cudaFuncSetAttribute(...)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "no error"

using std::max, std::min;
struct Index { unsigned x, y, z; };
inline thread_local Index threadIdx;
inline Index blockIdx, gridDim;
inline uint8_t* dynamic_shared;
inline std::unique_ptr<std::barrier<>> block, warps[32];
inline uint32_t slots[1024];

inline void __syncthreads() { block->arrive_and_wait(); }
inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }
template <class T> T __shfl_xor_sync(unsigned, T x, int i) {
  std::barrier<>& warp = *warps[threadIdx.x / 32];
  memcpy(&slots[threadIdx.x], &x, 4), warp.arrive_and_wait();
  memcpy(&x, &slots[threadIdx.x ^ i], 4), warp.arrive_and_wait();
  return x;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const int selector = selectors >> 4 * i & 15, byte = int(bytes >> 8 * (selector & 7)) & 255;
    result |= uint32_t(selector & 8 ? byte >> 7 ? 255 : 0 : byte) << 8 * i;
  }
  return result;
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int n) { return n &= 31, n ? high << n | low >> (32 - n) : high; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

template <class Kernel> void launch(dim3 grid, int threads, int shared, cudaStream_t, Kernel kernel) {
  std::vector<uint8_t> memory(shared + 16);
  dynamic_shared = memory.data() + -uintptr_t(memory.data()) % 16;
  gridDim = {grid.x, grid.y, 1};
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      blockIdx = {x, y, 0}, block = std::make_unique<std::barrier<>>(threads);
      for (int w = 0; w < threads / 32; w++) warps[w] = std::make_unique<std::barrier<>>(32);
      std::vector<std::jthread> all;
      for (int t = 0; t < threads; t++) all.emplace_back([=] { threadIdx = {unsigned(t), 0, 0}, kernel(), block->arrive_and_drop(); });
    }
}
