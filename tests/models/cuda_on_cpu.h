/*
Enough of CUDA to run our kernels on a CPU, slowly. test_cuda_on_cpu.py includes this before a .cu
and turns each kernel launch into a call of launch(). No PTX is known here: where a kernel asks for
__CUDA_ARCH__, its plain branch runs.

One cluster of blocks runs after another (a cluster is one block, unless sm90_on_cpu.h is in use).
Its CUDA threads are fibers: each has a stack, and all take turns on one thread of the system. A
fiber runs until it has to wait for others. The turns go from the first to the last thread, then
back from the last to the first, so that what lacks a barrier goes wrong in one of the directions.
*/
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __launch_bounds__(...)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

// Static shared memory belongs to a kernel, because only one block at a time has any.
#define __shared__ static

// The GPU has few multiprocessors, so that a block takes many tiles.
constexpr int MULTIPROCESSORS = 4;
constexpr int SHARED_MEMORY_PER_MULTIPROCESSOR = 1 << 18;

inline int attribute_value(cudaDeviceAttr attribute) {
  if (attribute == cudaDevAttrMultiProcessorCount)
    return MULTIPROCESSORS;
  return SHARED_MEMORY_PER_MULTIPROCESSOR;
}

#define cudaFuncSetAttribute(...)
#define cudaGetLastError() cudaSuccess
#define cudaGetDevice(device) (*(device) = 0)
#define cudaDeviceGetAttribute(value, attribute, device) (*(value) = attribute_value(attribute))
#define cudaGetErrorString(error) "no error"
#define cudaMemsetAsync(p, byte, size, stream) memset(p, byte, size)

using std::isfinite;
using std::max;
using std::min;
using std::signbit;

// ---- fibers

constexpr int MAX_BLOCKS = 2;               // of a cluster
constexpr int MAX_THREADS = 1024;           // of a block
constexpr int STACK_BYTES = 1 << 16;

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

struct Fiber {
  std::unique_ptr<uint8_t[]> stack;
  ucontext_t entry;                         // where it begins
  jmp_buf state;                            // where it goes on, once it has begun
  bool has_begun = false;
  bool is_done = false;
  int rank;                                 // of its block in the cluster
  Index thread;
  Index block;
};

// What a kernel sees, of the fiber whose turn it is.
inline Index gridDim;
inline Index blockDim;
inline Index blockIdx;
inline Index threadIdx;
inline int block_rank;
inline uint8_t* dynamic_shared;

inline Fiber fibers[MAX_BLOCKS * MAX_THREADS];
inline Fiber* current;
inline jmp_buf scheduler;
inline std::function<void()> kernel_call;
inline int cluster_size = 1;
inline uint8_t* shared_of[MAX_BLOCKS];      // the dynamic shared memory of each block

// Lets the others run. It must not be inlined, because setjmp returns twice.
__attribute__((noinline)) inline void yield() {
  if (_setjmp(current->state) == 0)
    _longjmp(scheduler, 1);
}

// ---- barriers

struct Barrier {
  int size = 0;
  int waiting = 0;
  unsigned phase = 0;

  void release_if_complete() {
    if (waiting == size) {
      waiting = 0;
      phase++;
    }
  }
  void arrive_and_wait() {
    const unsigned my_phase = phase;
    waiting++;
    release_if_complete();
    while (phase == my_phase)
      yield();
  }
  void drop() {
    size--;
    if (size > 0)
      release_if_complete();
  }
};

inline Barrier cluster_barrier;
inline Barrier block_barriers[MAX_BLOCKS];
inline Barrier warp_barriers[MAX_BLOCKS * MAX_THREADS / 32];

inline int thread_number() { return MAX_THREADS * block_rank + int(threadIdx.x); }
inline void __syncthreads() { block_barriers[block_rank].arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[thread_number() / 32].arrive_and_wait(); }

// ---- launches

inline void fiber_main() {
  for (;;) {
    kernel_call();
    block_barriers[block_rank].drop();
    current->is_done = true;
    yield();
  }
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block;
  block_rank = fiber.rank;
  dynamic_shared = shared_of[fiber.rank];
  if (_setjmp(scheduler) != 0)
    return;                                 // The fiber has yielded.
  if (fiber.has_begun)
    _longjmp(fiber.state, 1);
  fiber.has_begun = true;
  fiber.stack = std::make_unique_for_overwrite<uint8_t[]>(STACK_BYTES);
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack.get();
  fiber.entry.uc_stack.ss_size = STACK_BYTES;
  makecontext(&fiber.entry, fiber_main, 0);
  setcontext(&fiber.entry);
}

// Runs the blocks of a cluster, of which the first is block (x, y).
inline void run_cluster(unsigned x, unsigned y, int threads) {
  std::vector<Fiber*> running;
  cluster_barrier.size = cluster_size * threads;
  for (int rank = 0; rank < cluster_size; rank++) {
    block_barriers[rank].size = threads;
    for (int t = 0; t < threads; t++) {
      Fiber& fiber = fibers[MAX_THREADS * rank + t];
      fiber.is_done = false;
      fiber.rank = rank;
      fiber.thread.x = t;
      fiber.block.x = x + rank;
      fiber.block.y = y;
      running.push_back(&fiber);
      warp_barriers[(MAX_THREADS * rank + t) / 32].size = 32;
    }
  }
  while (!running.empty()) {
    for (Fiber* fiber : running)
      resume(*fiber);
    std::erase_if(running, [](Fiber* fiber) { return fiber->is_done; });
    std::reverse(running.begin(), running.end());
  }
}

template <class Kernel>
void launch(dim3 grid, int threads, int shared_bytes, cudaStream_t, Kernel kernel) {
  const int stride = (shared_bytes + 1023) / 1024 * 1024;
  std::vector<uint8_t> memory(cluster_size * stride + 1024);
  uint8_t* aligned = memory.data() + -uintptr_t(memory.data()) % 1024;
  for (int rank = 0; rank < cluster_size; rank++)
    shared_of[rank] = aligned + rank * stride;
  kernel_call = kernel;
  gridDim.x = grid.x;
  gridDim.y = grid.y;
  blockDim.x = threads;
  for (unsigned y = 0; y < grid.y; y++) {
    for (unsigned x = 0; x < grid.x; x += cluster_size)
      run_cluster(x, y, threads);
  }
}

// ---- functions of CUDA

inline size_t __cvta_generic_to_shared(const void* p) { return (const uint8_t*)p - dynamic_shared; }
inline void* __cvta_shared_to_generic(size_t address) { return dynamic_shared + address; }

inline uint32_t shuffle_slots[MAX_BLOCKS * MAX_THREADS];

// Every thread of a warp hands in x and gets that of the thread with this number.
template <class T> T shuffle(T x, int from) {
  static_assert(sizeof(T) == 4);
  memcpy(&shuffle_slots[thread_number()], &x, 4);
  __syncwarp();
  memcpy(&x, &shuffle_slots[from], 4);
  __syncwarp();
  return x;
}
template <class T> T __shfl_xor_sync(unsigned, T x, int i) {
  return shuffle(x, thread_number() ^ i);
}

inline int atomicMax(int* p, int x) {
  const int before = *p;
  *p = max(before, x);
  return before;
}

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const int selector = selectors >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (selector & 7)) & 255;
    if (selector & 8)
      byte = byte >> 7 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// Adds the four products of signed bytes to c.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++)
    c += int8_t(a >> (8 * i)) * int8_t(b >> (8 * i));
  return c;
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, int n) {
  n &= 31;
  return n ? high << n | low >> (32 - n) : high;
}

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
