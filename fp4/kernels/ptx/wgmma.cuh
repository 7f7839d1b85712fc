/*
Hopper's instructions for a warpgroup (128 threads that multiply together) and for a cluster
(blocks that see each other's shared memory). One function an instruction, sm_90a. Copies and
barriers are in tma.cuh.
*/
#pragma once
#include "tma.cuh"

namespace cluster {

// The number of this block in its cluster.
__device__ inline int rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster.
__device__ inline void sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n"
               "barrier.cluster.wait.aligned;" ::: "memory");
}

// Arrives at the mbarrier of this address in both blocks of a cluster.
__device__ inline void arrive(uint32_t barrier) {
#pragma unroll
  for (int rank = 0; rank < 2; rank++)
    asm volatile("{ .reg .b32 remote;\n"
                 "mapa.shared::cluster.u32 remote, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [remote]; }"
                 :: "r"(barrier), "r"(rank) : "memory");
}

}  // namespace cluster

namespace wgmma {

// The registers of each thread of a warpgroup: 40 where a thread only copies, so that there are
// 232 for the threads of the two warpgroups that multiply.
__device__ inline void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
__device__ inline void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

// The lower half of the 64 bits by which wgmma finds a swizzled tile: its address in units of 16
// bytes, and 1 in bits 16 to 29, a distance that a swizzled tile does not use. The upper half is a
// constant, see multiply: 1024 bytes from one group of 8 rows to the next, and the 128-byte
// swizzle.
__device__ inline uint32_t descriptor(const void* p) { return smem_address(p) >> 4 | 1 << 16; }

// Comes before the first multiply, commit after the last.
__device__ inline void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all products of this thread. c holds their sums only after this.
__device__ inline void wait(float (&c)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 64; i++)
    asm volatile("" : "+f"(c[i]));          // so that the compiler reads c[i] no earlier
}

// c [64 x 128] = a [64 x 32] b [128 x 32].T, plus c if `add`; a is E4M3, b is E5M2. Thread t of
// 128 has two rows, 16 (t / 32) + t % 32 / 4 and the row 8 below, and of every 8 columns two, 8 j
// + 2 (t % 4) and the next: c[4 j] and c[4 j + 1] in the first row, c[4 j + 2] and c[4 j + 3] in
// the second.
template <bool add> __device__ void multiply(float (&c)[64], uint32_t a, uint32_t b) {
#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
  asm volatile("{ .reg .b64 a, b;\n"
               "mov.b64 a, {%64, 0x40000040};\n"
               "mov.b64 b, {%65, 0x40000040};\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e5m2 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "a, b, %66, 1, 1; }"
               : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
               : "r"(a), "r"(b), "n"(int(add)));
#undef SIXTEEN
#undef FOUR
}

}  // namespace wgmma
