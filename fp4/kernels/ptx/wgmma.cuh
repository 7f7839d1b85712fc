/*
Hopper's instructions for a warpgroup, 128 threads that multiply together, and for a cluster, blocks that see each other's shared
memory: one function an instruction, sm_90a. For copies and barriers: tma.cuh.
*/
#pragma once
#include "tma.cuh"

namespace cluster {

__device__ inline int rank() { int rank; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)); return rank; }
__device__ inline void sync() {
  asm volatile("barrier.cluster.arrive.aligned;\n"
               "barrier.cluster.wait.aligned;" ::: "memory");
}
// at the mbarrier of this address in both blocks
__device__ inline void arrive(uint32_t barrier) {
#pragma unroll
  for (int rank = 0; rank < 2; rank++)
    asm volatile("{ .reg .b32 there;\n"
                 "mapa.shared::cluster.u32 there, %0, %1;\n"
                 "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier), "r"(rank) : "memory");
}

}  // namespace cluster

namespace wgmma {

// of a warpgroup's threads: 40 for one that copies, 232 for two that multiply
__device__ inline void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
__device__ inline void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }

// how a swizzled tile is found: address / 16 (and, constant, 1024 bytes from one group of 8 rows to the next, 128-byte swizzle)
__device__ inline uint32_t descriptor(const void* p) { return address(p) >> 4 | 1 << 16; }

__device__ inline void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wait(float (&c)[64]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < 64; i++) asm volatile("" : "+f"(c[i]));             // read no earlier
}

// c [64 x 128] (+)= a [64 x 32] b [128 x 32].T, E4M3 times E5M2: thread t of 128 has row 16 (t / 32) + t % 32 / 4 and the row 8
// below, columns 8 j + 2 (t % 4) and the next: c[4 j .. 4 j + 3]
template <bool add> __device__ void multiply(float (&c)[64], uint32_t a, uint32_t b) {
#define C(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
  asm volatile("{ .reg .b64 a, b;\n"
               "mov.b64 a, {%64, 0x40000040};\n"
               "mov.b64 b, {%65, 0x40000040};\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e5m2 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "
               "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
               "a, b, %66, 1, 1; }"
               : C(0), C(8), C(16), C(24), C(32), C(40), C(48), C(56) : "r"(a), "r"(b), "n"(int(add)));
#undef C
}

}  // namespace wgmma
