/*
Copies of 16 bytes, memory -> shared memory, that go on while the thread does (cp.async, sm_80 and later; before that it waits).
*/
#pragma once
#include <cstdint>
#include <cuda_runtime.h>

// a place in shared memory, as PTX wants it
__device__ inline uint32_t address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ inline void copy16(uint32_t to, const void* from, bool inside) {        // zeros if not inside: then nothing is read
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
#else
  *(uint4*)__cvta_shared_to_generic(to) = inside ? *(const uint4*)from : make_uint4(0, 0, 0, 0);
#endif
}

__device__ inline void wait_for_copies() {                                 // of this thread
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
