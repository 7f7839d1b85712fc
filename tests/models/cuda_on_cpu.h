/*
Enough of CUDA to run our kernels on a CPU, slowly: one cluster of blocks after the other, a thread of the system a CUDA thread.
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
#define cudaGetDevice(device) (*(device) = 0)
#define cudaDeviceGetAttribute(value, which, device) (*(value) = (which) == cudaDevAttrMultiProcessorCount ? 4 : 1 << 18)     // few, so that a block takes many tiles
#define cudaGetErrorString(error) "no error"

using std::max, std::min;
struct Index { unsigned x, y, z; };
inline Index gridDim;
inline thread_local Index threadIdx, blockIdx;
inline thread_local int in_cluster;                            // which of its blocks
inline thread_local uint8_t* dynamic_shared;
inline int cluster_size = 1;
inline uint8_t* shared_of[2];
inline std::unique_ptr<std::barrier<>> all_blocks, blocks[2], warps[64];
inline uint32_t slots[2048];

inline size_t __cvta_generic_to_shared(const void* p) { return (const uint8_t*)p - dynamic_shared; }
inline void* __cvta_shared_to_generic(size_t address) { return dynamic_shared + address; }
inline int me() { return 1024 * in_cluster + threadIdx.x; }
inline void __syncthreads() { blocks[in_cluster]->arrive_and_wait(); }
inline void __syncwarp() { warps[me() / 32]->arrive_and_wait(); }
template <class T> T __shfl_xor_sync(unsigned, T x, int i) {
  memcpy(&slots[me()], &x, 4), __syncwarp();
  memcpy(&x, &slots[me() ^ i], 4), __syncwarp();
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
  std::vector<uint8_t> memory(cluster_size * (shared + 1024) + 1024);
  for (int rank = 0; rank < cluster_size; rank++) shared_of[rank] = memory.data() + -uintptr_t(memory.data()) % 1024 + rank * (shared + 1023) / 1024 * 1024;
  gridDim = {grid.x, grid.y, 1};
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x += cluster_size) {
      all_blocks = std::make_unique<std::barrier<>>(cluster_size * threads);
      std::vector<std::jthread> all;
      for (int rank = 0; rank < cluster_size; rank++) {
        blocks[rank] = std::make_unique<std::barrier<>>(threads);
        for (int w = 0; w < threads / 32; w++) warps[32 * rank + w] = std::make_unique<std::barrier<>>(32);
      }
      for (int rank = 0; rank < cluster_size; rank++)
        for (int t = 0; t < threads; t++) all.emplace_back([=] {
          threadIdx = {unsigned(t), 0, 0}, blockIdx = {x + rank, y, 0}, in_cluster = rank, dynamic_shared = shared_of[rank];
          kernel(), blocks[rank]->arrive_and_drop();
        });
    }
}
