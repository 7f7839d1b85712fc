/*
A model of the functions of fp4/kernels/ptx/tcgen05.cuh for a GPU without them, written from the
PTX ISA's tables. TMEM is an array per multiprocessor, as in hardware. It is filled with NaN when
allocated, and the allocation does not begin at column 0, so no address is right by chance. Fields
of a descriptor are decoded from its bits. What the hardware would refuse, and what no test here
could vouch for, is a trap. The whole warp plays the one thread that issues, at once and
synchronously, so hazards of the asynchronous machine do not show here.
*/
#pragma once
#include "mma_mxf4_model.cuh"

namespace tcgen05 {

constexpr int ISSUERS = 32;
constexpr int LANES = 128;
constexpr int COLUMNS = 512;
constexpr int PROCESSORS = 160;
__device__ uint32_t memory[PROCESSORS][LANES][COLUMNS];

__device__ inline void require(bool condition) {
  if (!condition)
    __trap();
}

__device__ inline uint32_t& word(int lane, int column) {
  uint32_t processor;
  asm("mov.u32 %0, %%smid;" : "=r"(processor));
  require(processor < PROCESSORS && lane < LANES && column < COLUMNS);
  return memory[processor][lane][column];
}

__device__ inline uint32_t shared_word(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// Returns the bits low .. low + bits - 1 of a descriptor.
__device__ inline int field(uint64_t descriptor, int low, int bits) {
  return int((descriptor >> low) & ((1 << bits) - 1));
}

__device__ inline bool elect() { return true; }

__device__ inline void alloc(uint32_t to, int columns) {
  require(columns >= 32 && columns <= 512 && (columns & (columns - 1)) == 0);
  for (int i = threadIdx.x % 32; i < LANES * COLUMNS; i += 32)
    word(i / COLUMNS, i % COLUMNS) = ~0u;                   // a NaN as a float and as a scale
  const uint32_t first = columns <= 256 ? 64 : 0;
  if (threadIdx.x % 32 == 0)
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(to), "r"(first) : "memory");
  __threadfence_block();
}

__device__ inline void dealloc(uint32_t, int) {}

__device__ inline void copy_scales(uint32_t tmem, uint64_t descriptor) {
  require(field(descriptor, 61, 3) == 0 && field(descriptor, 46, 3) == 1 && tmem >> 16 == 0);
  const uint32_t address = field(descriptor, 0, 14) << 4;
  const uint32_t group_bytes = field(descriptor, 32, 14) << 4;
  const int line = threadIdx.x % 32;
  const uint32_t from = address + line / 8 * group_bytes + line % 8 * 16;
  for (int column = 0; column < 4; column++)
    for (int copy = 0; copy < 4; copy++)
      word(line + 32 * copy, tmem + column) = shared_word(from + 4 * column);
  __threadfence_block();
  __syncwarp();
}

// Returns word w of a row. The swizzle permutes 16-byte chunks: the chunk's number is combined, by
// exclusive or, with the number of the 128-byte row that the address lies in.
__device__ inline uint32_t operand_word(uint64_t descriptor, int row, int w) {
  require(field(descriptor, 61, 3) == 2);
  require(field(descriptor, 46, 3) == 1 && field(descriptor, 49, 3) == 0);
  const uint32_t address = field(descriptor, 0, 14) << 4;
  const uint32_t group_bytes = field(descriptor, 32, 14) << 4;
  const uint32_t linear = address + row / 8 * group_bytes + row % 8 * 128 + w * 4;
  return shared_word(linear ^ (((linear >> 7) & 7) << 4));
}

// Computes one output of an instruction in the model's arithmetic.
__device__ inline float multiply(double sum,
                                 const uint32_t (&a)[8],    // 64 codes
                                 uint64_t b,
                                 int column,
                                 uint32_t scale_a,          // two bytes that count, lowest first
                                 uint32_t scale_b) {
  for (int half = 0; half < 2; half++) {
    int quarters = 0;
    for (int w = 4 * half; w < 4 * half + 4; w++)
      quarters += model::dot(a[w], operand_word(b, column, w));
    sum += model::scaled(quarters, scale_a >> (8 * half), scale_b >> (8 * half));
  }
  return model::truncate(sum);
}

__device__ inline void mma(uint32_t sums,
                           uint64_t a,
                           uint64_t b,
                           uint32_t instruction,
                           uint32_t a_scales,
                           uint32_t b_scales,
                           bool accumulate) {
  const int M = field(instruction, 27, 2) * 128;
  const int N = field(instruction, 17, 6) * 8;
  const int byte_a = field(instruction, 29, 2);
  const int byte_b = field(instruction, 4, 2);
  require(M == 128 && N >= 8 && N <= 256 && byte_a % 2 == 0 && byte_b % 2 == 0);
  require(field(instruction, 7, 3) == 1 && field(instruction, 10, 2) == 1);  // E2M1 and E2M1
  require(field(instruction, 23, 1) == 1 && field(instruction, 31, 1) == 0);  // UE8M0, K = 64
  require(field(instruction, 0, 4) == 0 && field(instruction, 6, 1) == 0);  // These are reserved
  require(field(instruction, 12, 5) == 0 && field(instruction, 24, 3) == 0);  // or not for mxf4.
  for (int row = threadIdx.x % 32; row < M; row += 32) {
    uint32_t a_row[8];
    for (int w = 0; w < 8; w++)
      a_row[w] = operand_word(a, row, w);
    const uint32_t scale_a = word(row, a_scales + row / 32) >> (8 * byte_a);
    for (int column = 0; column < N; column++) {
      const int own_copy = row / 32 * 32 + column % 32;     // each warp reads the copy in its lanes
      const uint32_t scale_b = word(own_copy, b_scales + column / 32) >> (8 * byte_b);
      float& to = reinterpret_cast<float&>(word(row, sums + column));
      to = multiply(accumulate ? to : 0, a_row, b, column, scale_a, scale_b);
    }
  }
  __threadfence_block();
  __syncwarp();
}

__device__ inline void commit(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ inline void fence_before() { __threadfence_block(); }

__device__ inline void fence_after() {}

__device__ inline void load(uint32_t tmem, float (&v)[16]) {
  const uint32_t first_lane = tmem >> 16;
  const uint32_t column = tmem & 0xFFFF;
  require(first_lane == threadIdx.x / 32 % 4 * 32);
  for (int i = 0; i < 16; i++)
    v[i] = reinterpret_cast<volatile float&>(word(first_lane + threadIdx.x % 32, column + i));
}

}  // namespace tcgen05
