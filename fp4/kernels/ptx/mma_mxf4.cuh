/*
One instruction of sm_120a and sm_121a: a warp computes, in MXFP4,

    D[16, 8] += (A[16, 64] * its scales) @ (B[8, 64] * its scales).T

Every lane brings a piece of each matrix, its fragment. With g = lane / 4, q = lane % 4, and
element i in the bits 4i .. 4i + 3 of a register:

    a[r]   row g + 8 (r % 2)     k = 8q + i + 32 (r / 2)     four registers of 8 codes
    b[r]   column g              k = 8q + i + 32 r           two
    d[i]   row g + 8 (i / 2)     column 2q + i % 2           four floats

Scales come as one word of four bytes a lane for A and one for B. The instruction takes two of the
bytes, byte_a and byte_a + 1 (byte_a is 0 or 2), for k < 32 and k >= 32; likewise byte_b. Only some
lanes' words count. thread_a (0 or 1) says that lane q = 2 thread_a of each four scales row g and
the next lane scales row g + 8; thread_b (0 .. 3) says that lane q = thread_b scales column g. So
one word a lane, for 32 consecutive rows, serves two instructions as A or four as B, and two steps
of k, without being moved.

-DFP4_MODEL replaces it by tests/models/mma_mxf4_model.cuh, which any GPU runs.
*/
#pragma once
#include <cstdint>

#ifdef FP4_MODEL
#include "mma_mxf4_model.cuh"
#else
__device__ __forceinline__ void mma_mxf4(float (&d)[4],
                                         const uint32_t (&a)[4],
                                         const uint32_t (&b)[2],
                                         uint32_t a_scales,
                                         uint32_t b_scales,
                                         uint16_t byte_a,
                                         uint16_t thread_a,
                                         uint16_t byte_b,
                                         uint16_t thread_b) {
  asm volatile("mma.sync.aligned.m16n8k64.row.col"
               ".kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, "
               "%10, {%12, %13}, %11, {%14, %15};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),
                 "r"(a_scales), "r"(b_scales),
                 "h"(byte_a), "h"(thread_a), "h"(byte_b), "h"(thread_b));
}
#endif
