/*
The functions of fp4/tcgen05.cuh for a GPU without them, written from the PTX ISA's tables. TMEM is an array per multiprocessor,
as in hardware, filled with NaN when allocated, and not allocated from column 0, so that no address is right by chance. Fields of
a descriptor are decoded from its bits; what the hardware would refuse, or what no test here could vouch for, is a trap.
The whole warp plays the one thread that issues, at once and synchronously: asynchronous hazards do not show here.
*/
#pragma once
#include "mma_mxf4_model.cuh"

namespace tc {

constexpr int ISSUERS = 32, LANES = 128, COLUMNS = 512, PROCESSORS = 160;
__device__ uint32_t memory[PROCESSORS][LANES][COLUMNS];

__device__ inline void require(bool ok) { if (!ok) __trap(); }

__device__ inline uint32_t& word(int lane, int column) {
  uint32_t processor;
  asm("mov.u32 %0, %%smid;" : "=r"(processor));
  require(processor < PROCESSORS && lane < LANES && column < COLUMNS);
  return memory[processor][lane][column];
}

__device__ inline uint32_t shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ inline bool elect() { return true; }

__device__ inline void alloc(uint32_t to, int columns) {
  require(columns >= 32 && columns <= 512 && (columns & (columns - 1)) == 0);
  for (int i = threadIdx.x % 32; i < LANES * COLUMNS; i += 32) word(i / COLUMNS, i % COLUMNS) = ~0u;       // NaN, also as scales
  const uint32_t first = columns <= 256 ? 64 : 0;
  if (threadIdx.x % 32 == 0) asm volatile("st.shared.u32 [%0], %1;" :: "r"(to), "r"(first) : "memory");
  __threadfence_block();
}
__device__ inline void dealloc(uint32_t, int) {}

__device__ inline void copy_scales(uint32_t tmem, uint64_t from) {
  require(from >> 61 == 0 && (from >> 46 & 7) == 1 && tmem >> 16 == 0);
  const uint32_t address = uint32_t(from & 0x3FFF) << 4, distance = uint32_t(from >> 32 & 0x3FFF) << 4;
  const int line = threadIdx.x % 32;
  for (int c = 0; c < 4; c++)
    for (int copy = 0; copy < 4; copy++)
      word(line + 32 * copy, tmem + c) = shared_word(address + line / 8 * distance + line % 8 * 16 + 4 * c);
  __threadfence_block(), __syncwarp();
}

// word w of a row: the swizzle exchanges 16-byte chunks, exclusive or with the address's row of 128 bytes
__device__ inline uint32_t operand_word(uint64_t from, int row, int w) {
  require(from >> 61 == 2 && (from >> 46 & 7) == 1 && (from >> 49 & 7) == 0);
  const uint32_t address = uint32_t(from & 0x3FFF) << 4, distance = uint32_t(from >> 32 & 0x3FFF) << 4;
  const uint32_t linear = address + row / 8 * distance + row % 8 * 128 + w * 4;
  return shared_word(linear ^ (linear >> 7 & 7) << 4);
}

__device__ inline void mma(uint32_t sums, uint64_t a, uint64_t b, uint32_t what, uint32_t sa, uint32_t sb, bool add) {
  const auto field = [what](int low, int bits) { return int(what >> low & ((1 << bits) - 1)); };
  const int M = field(27, 2) * 128, N = field(17, 6) * 8, byte_a = field(29, 2), byte_b = field(4, 2);
  require(M == 128 && N >= 8 && N <= 256 && byte_a % 2 == 0 && byte_b % 2 == 0);
  require(field(7, 3) == 1 && field(10, 2) == 1 && field(23, 1) == 1 && field(31, 1) == 0);                // E2M1, E2M1, UE8M0, K = 64
  require(field(0, 4) == 0 && field(6, 1) == 0 && field(12, 5) == 0 && field(24, 3) == 0);                 // reserved or not for mxf4
  for (int row = threadIdx.x % 32; row < M; row += 32) {
    uint32_t x[8];
    for (int w = 0; w < 8; w++) x[w] = operand_word(a, row, w);
    const uint32_t scale_a = word(row, sa + row / 32);
    for (int column = 0; column < N; column++) {
      const uint32_t scale_b = word(row / 32 * 32 + column % 32, sb + column / 32);                        // the warp's own copy
      float* to = reinterpret_cast<float*>(&word(row, sums + column));
      double sum = add ? *to : 0;
      for (int half = 0; half < 2; half++) {
        int quarters = 0;
        for (int w = 4 * half; w < 4 * half + 4; w++) quarters += model::dot(x[w], operand_word(b, column, w));
        sum += model::product(quarters, scale_a >> 8 * (byte_a + half), scale_b >> 8 * (byte_b + half));
      }
      *to = model::truncated(sum);
    }
  }
  __threadfence_block(), __syncwarp();
}

__device__ inline void commit(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
__device__ inline void fence_before() { __threadfence_block(); }
__device__ inline void fence_after() {}

__device__ inline void load(uint32_t tmem, float (&v)[16]) {
  require(tmem >> 16 == threadIdx.x / 32 % 4 * 32);
  for (int i = 0; i < 16; i++) v[i] = *reinterpret_cast<volatile float*>(&word((tmem >> 16) + threadIdx.x % 32, (tmem & 0xFFFF) + i));
}

}  // namespace tc
