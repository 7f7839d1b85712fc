/*
The instructions of sm_100a and sm_103a that gemm_sm100.cu uses, one function each. The tensor core is a machine beside the
threads: one thread tells it what to do, operands come from shared memory by descriptors, sums and scales live in tensor memory
(TMEM): 128 lanes x 512 columns of 32 bits, addressed lane << 16 | column. Its work is asynchronous and in order: copies of
scales before the products that use them; a commit makes an mbarrier arrive when all of it before is done.

-DFP4_MODEL replaces the instructions by tests/tcgen05_model.cuh: a TMEM in memory, descriptors decoded bit by bit.
*/
#pragma once
#include <cstdint>

namespace tc {

// ---- descriptors

// Shared memory seen by the tensor core, in units of 16 bytes: address in bits 0-13, distance from 8 rows to the next 8 in bits
// 32-45, 1 in bits 46-48, swizzle in bits 61-63. Rows of A and B are 128 bytes, 8 of them 1024; a step of 64 of K is 32 bytes
// further in the same row, the swizzle (2: TMA's SWIZZLE_128B) applies to the address after the addition
__host__ __device__ constexpr uint64_t rows_descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3FFF) | uint64_t(1024 >> 4) << 32 | 1ull << 46 | 2ull << 61;
}
__host__ __device__ constexpr uint64_t scales_descriptor(uint32_t address) {                   // a tile of scales: 8 lines of 16 bytes, not swizzled
  return uint64_t(address >> 4 & 0x3FFF) | uint64_t(128 >> 4) << 32 | 1ull << 46;
}

// What to multiply: kind::mxf4, E2M1 (1) in bits 7-9 and 10-12, UE8M0 in bit 23, N / 8 in bits 17-22, M / 128 in bits 27-28.
// scale_byte (0 or 2) is the first of the two bytes of each scale word that count, for B in bits 4-5, for A in bits 29-30
__host__ __device__ constexpr uint32_t instruction(int M, int N, int scale_byte) {
  return uint32_t(scale_byte) << 4 | 1u << 7 | 1u << 10 | uint32_t(N / 8) << 17 | 1u << 23 | uint32_t(M / 128) << 27 | uint32_t(scale_byte) << 29;
}

}  // namespace tc

#ifdef FP4_MODEL
#include "tcgen05_model.cuh"
#else
namespace tc {

constexpr int ISSUERS = 1;                                                 // threads that talk to the tensor core

__device__ inline bool elect() {                                           // true in one lane of the warp
  uint32_t one;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(one));
  return one;
}

// by a whole warp: columns of TMEM (a power of two, at least 32), the address of the first goes to shared memory
__device__ inline void alloc(uint32_t to, int columns) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" :: "r"(to), "r"(columns) : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}
__device__ inline void dealloc(uint32_t tmem, int columns) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" :: "r"(tmem), "r"(columns));
}

// a tile of scales from shared memory: line i to lanes i, i + 32, i + 64, i + 96, its 4 words to 4 columns
__device__ inline void copy_scales(uint32_t tmem, uint64_t from) {
  asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;" :: "r"(tmem), "l"(from) : "memory");
}

// sums[M, N] (= or +=) (A * its scales) @ (B * its scales).T over 64 of K. The scale word of row r is in column r / 32
__device__ inline void mma(uint32_t sums, uint64_t a, uint64_t b, uint32_t what, uint32_t sa, uint32_t sb, bool add) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %6, 0;\n"
               "  tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32 [%0], %1, %2, %3, [%4], [%5], p; }"
               :: "r"(sums), "l"(a), "l"(b), "r"(what), "r"(sa), "r"(sb), "r"(uint32_t(add)) : "memory");
}

__device__ inline void commit(uint32_t barrier) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" :: "r"(barrier) : "memory");
}

// around a barrier between threads: what this one did in TMEM is before, what it will do is after
__device__ inline void fence_before() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
__device__ inline void fence_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// lane i of warp w (of four) reads 16 columns of TMEM lane 32w + i; a warp sees no other lanes
__device__ inline void load(uint32_t tmem, float (&v)[16]) {
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x16.b32 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, [%16];\n"
               "tcgen05.wait::ld.sync.aligned;"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]), "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]), "=f"(v[8]),
                 "=f"(v[9]), "=f"(v[10]), "=f"(v[11]), "=f"(v[12]), "=f"(v[13]), "=f"(v[14]), "=f"(v[15]) : "r"(tmem) : "memory");
}

}  // namespace tc
#endif
