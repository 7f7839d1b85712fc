/*
mma.sync in FP8: the 32 threads of a warp multiply two small matrices together, sm_89 and later.
*/
#pragma once
#include <cstdint>

namespace mma {

// c [16 x 8] += a [16 x 32] b [8 x 32].T, both in E4M3. Lane l of the warp holds, four values in a
// register, columns k = 4 (l % 4) to k + 3 and k + 16 to k + 19: of rows l / 4 and l / 4 + 8 of a,
// and of row l / 4 of b. Of c it has columns 2 (l % 4) and the next, in rows l / 4 and l / 4 + 8.
__device__ inline void multiply_e4m3(
    float (&c)[4],                  // row l / 4: c[0] and c[1]; row l / 4 + 8: c[2] and c[3]
    const uint32_t (&a)[4],         // both rows at k, then both rows at k + 16
    const uint32_t (&b)[2]) {       // at k, and at k + 16
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace mma
