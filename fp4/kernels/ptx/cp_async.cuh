/*
Copies of 16 bytes from memory to shared memory that go on while the thread does something else:
cp.async, sm_80 and later. On an older GPU the thread copies the bytes itself.
*/
#pragma once
#include <cstdint>
#include <cuda_runtime.h>

// An address in shared memory, in the 32 bits that PTX wants.
__device__ inline uint32_t smem_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or writes 16 zeros if the source is not inside its matrix: then nothing is read.
__device__ inline void cp_async_16(uint32_t to,             // shared memory, a multiple of 16
                                   const void* from,        // global memory, a multiple of 16
                                   bool inside) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
#else
  *(uint4*)__cvta_shared_to_generic(to) = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

// Waits for all copies that this thread has started.
__device__ inline void cp_async_wait_all() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
