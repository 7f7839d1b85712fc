/*
One instruction of sm_120a and sm_121a: a warp's D[16, 8] += (A[16, 64] * its scales) @ (B[8, 64] * its scales).T in MXFP4.
Each lane brings a piece of every matrix. With g = lane / 4, q = lane % 4, and element i in bits 4i .. 4i+3 of a register:

    a[r]   row g + 8 (r % 2)     k = 8q + i + 32 (r / 2)          four registers of 8 codes
    b[r]   column g              k = 8q + i + 32 r                two
    d[i]   row g + 8 (i / 2)     column 2q + i % 2                four floats

    sa, sb: four scale bytes a lane, of which an instruction takes two: byte_a and byte_a + 1 (0 or 2), for k < 32 and k >= 32.
    Only some lanes' words count: thread_a (0, 1) says that row g is scaled by lane q = 2 thread_a of its four and row g + 8
    by the next one; thread_b (0..3) that column g is scaled by lane q = thread_b. So the 32 words of 32 consecutive rows,
    one a lane, serve two instructions' A, or four instructions' B, and two steps of k, without moving.

-DFP4_MODEL replaces it by tests/mma_mxf4_model.cuh, which any GPU runs.
*/
#pragma once
#include <cstdint>

#ifdef FP4_MODEL
#include "mma_mxf4_model.cuh"
#else
__device__ __forceinline__ void mma_mxf4(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], uint32_t sa, uint32_t sb,
                                         uint16_t byte_a, uint16_t thread_a, uint16_t byte_b, uint16_t thread_b) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {%12, %13}, %11, {%14, %15};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(sa), "r"(sb),
                 "h"(byte_a), "h"(thread_a), "h"(byte_b), "h"(thread_b));
}
#endif
