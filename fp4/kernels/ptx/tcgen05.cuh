/*
The instructions of sm_100a and sm_103a that gemm_sm100.cu uses, one function each.

This tensor core is a machine beside the threads. One thread tells it what to do. It finds operands
in shared memory through descriptors, 64-bit words that say where they lie and how. Sums and scales
live in its own tensor memory (TMEM): 128 lanes x 512 columns of 32 bits, addressed as
lane << 16 | column. It works asynchronously and in order, so a copy of scales needs no wait before
the product that uses them. A commit makes an mbarrier (see tma.cuh) receive an arrival when all
work before it is done.

-DFP4_MODEL replaces the instructions by tests/models/tcgen05_model.cuh, which keeps TMEM in
ordinary memory and decodes the descriptors bit by bit.
*/
#pragma once
#include <cstdint>

namespace tcgen05 {

// ---- descriptors

// A descriptor of shared memory counts in units of 16 bytes. Bits 0-13 hold the address, bits
// 32-45 the distance from one group of 8 rows to the next, bits 46-48 the constant 1, bits 61-63
// the swizzle.
__host__ __device__ constexpr uint64_t shared_descriptor(uint32_t address,
                                                         int group_bytes,
                                                         int swizzle) {
  return uint64_t((address >> 4) & 0x3FFF)
       | uint64_t(group_bytes >> 4) << 32
       | uint64_t(1) << 46
       | uint64_t(swizzle) << 61;
}

// Rows of A or B have 128 bytes, so 8 of them have 1024. The next 64 values of K are 32 bytes
// further in the same row: the swizzle (2 is TMA's SWIZZLE_128B) applies to the address after that
// addition.
__host__ __device__ constexpr uint64_t rows_descriptor(uint32_t address) {
  return shared_descriptor(address, 1024, 2);
}

// A tile of scales has 32 lines of 16 bytes, so 8 of them have 128. It is not swizzled.
__host__ __device__ constexpr uint64_t scales_descriptor(uint32_t address) {
  return shared_descriptor(address, 128, 0);
}

// Describes what to multiply, for kind::mxf4: an M x N product of E2M1 values with scales in UE8M0.
// scale_byte (0 or 2) is the first of the two bytes that count in each scale word, of A and of B.
__host__ __device__ constexpr uint32_t instruction(int M, int N, int scale_byte) {
  return uint32_t(scale_byte) << 4                          // of B
       | uint32_t(1) << 7                                   // A is E2M1
       | uint32_t(1) << 10                                  // B is E2M1
       | uint32_t(N / 8) << 17
       | uint32_t(1) << 23                                  // scales are UE8M0
       | uint32_t(M / 128) << 27
       | uint32_t(scale_byte) << 29;                        // of A
}

}  // namespace tcgen05

#ifdef FP4_MODEL
#include "tcgen05_model.cuh"
#else
namespace tcgen05 {

constexpr int ISSUERS = 1;                                  // threads that call commit

// Returns true in one lane of the warp.
__device__ inline bool elect() {
  uint32_t is_elected;
  asm volatile("{ .reg .pred p;\n"
               "elect.sync _|p, 0xffffffff;\n"
               "selp.u32 %0, 1, 0, p; }"
               : "=r"(is_elected));
  return is_elected;
}

// Allocates columns of TMEM, a power of two and at least 32, and writes the address of the first to
// shared memory. A whole warp calls it, and the same warp frees them.
__device__ inline void alloc(uint32_t to, int columns) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;"
               :: "r"(to), "r"(columns)
               : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}

__device__ inline void dealloc(uint32_t tmem, int columns) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;"
               :: "r"(tmem), "r"(columns));
}

// Copies a tile of scales from shared memory: the four words of line i go to four columns of the
// lanes i, i + 32, i + 64 and i + 96, because each quarter of the lanes needs its own copy.
__device__ inline void copy_scales(uint32_t tmem, uint64_t descriptor) {
  asm volatile("tcgen05.cp.cta_group::1.32x128b.warpx4 [%0], %1;"
               :: "r"(tmem), "l"(descriptor)
               : "memory");
}

// Multiplies over 64 values of K: sums[M, N] = or += (A * its scales) @ (B * its scales).T, where
// M and N are those of the instruction descriptor. The scale word of row r is in column r / 32.
__device__ inline void mma(uint32_t sums,                   // TMEM
                           uint64_t a,                      // rows_descriptor
                           uint64_t b,                      // rows_descriptor
                           uint32_t instruction,
                           uint32_t a_scales,               // TMEM
                           uint32_t b_scales,               // TMEM
                           bool accumulate) {
  asm volatile("{ .reg .pred p;\n"
               "setp.ne.b32 p, %6, 0;\n"
               "tcgen05.mma.cta_group::1.kind::mxf4.block_scale.block32"
               " [%0], %1, %2, %3, [%4], [%5], p; }"
               :: "r"(sums), "l"(a), "l"(b), "r"(instruction), "r"(a_scales), "r"(b_scales),
                  "r"(uint32_t(accumulate))
               : "memory");
}

// Makes the barrier receive an arrival when everything this thread has started is done.
__device__ inline void commit(uint32_t barrier) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];"
               :: "r"(barrier)
               : "memory");
}

// These stand around a barrier between threads. What this thread did in TMEM precedes fence_before;
// what it will do there follows fence_after.
__device__ inline void fence_before() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}

__device__ inline void fence_after() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

// Loads 16 columns: lane i of warp w (of four) gets those of TMEM lane 32 w + i. A warp sees no
// others.
__device__ inline void load(uint32_t tmem, float (&v)[16]) {
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x16.b32 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, [%16];\n"
               "tcgen05.wait::ld.sync.aligned;"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]),
                 "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]),
                 "=f"(v[8]), "=f"(v[9]), "=f"(v[10]), "=f"(v[11]),
                 "=f"(v[12]), "=f"(v[13]), "=f"(v[14]), "=f"(v[15])
               : "r"(tmem)
               : "memory");
}

}  // namespace tcgen05
#endif
