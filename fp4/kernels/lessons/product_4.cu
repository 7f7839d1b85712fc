/*
Lesson 8: let the tensor cores read shared memory, and let a copy engine fill it.

Why lesson 7 is slow. Its threads are busy with carrying: they fetch codes, make FP8 of them, store
it in shared memory, and load it into registers again for each instruction. An H100 has units that
do the carrying. TMA copies a whole tile with one instruction of one thread. wgmma multiplies, by
the four warps of a warpgroup together, 64 x 32 values of a with 128 x 32 of b, and takes both from
shared memory.

The idea. First, two kernels make FP8 of both operands, as lesson 7 does (but of b E5M2, whose
window is wider, so that 32 rows of b can share a scale), and store it in the very order in which
wgmma reads it (../fp8_tiles.cuh: tiles of 128 x 128 bytes, whose 16-byte chunks are permuted so
that no bank is met twice). Then 128 threads compute 128 x 128 outputs, step by step along K, 128 at
a time:

    one thread      starts two copies of 16 KB, which arrive at a barrier in shared memory
    all             wait at the barrier until the bytes are there; then multiply
    all             multiply the sums by the scales of their rows, and add them to their own

What to expect. A step is 2 x 128^3 operations, 0.3 us at the full speed of a processor, and before
it a copy is awaited, about 0.7 us. A processor has registers for two CUDA blocks, and one may
multiply while the other waits: 0.13 to 0.25 ms in all, 0.03 for making FP8, and what scaling costs.
../gemm_sm90.cu has three stages that a thread fills in advance, two warpgroups that take turns, two
CUDA blocks that share what they copy, and outputs that leave by TMA.

    python -m pytest tests/test_lessons.py -k product_4        # is it right?
*/
#include "../ops.h"
#include "../ptx/wgmma.cuh"

namespace {

constexpr int SIDE = 128;
constexpr int TILE_BYTES = SIDE * SIDE;
constexpr int THREADS = 128;

struct Shared {
  uint8_t a[TILE_BYTES];                    // E4M3, 128 rows of 128 of K
  uint8_t b[TILE_BYTES];                    // E5M2
  uint64_t arrived;                         // the barrier: it counts bytes that are to come, and
                                            // each time that none is left, a phase ends: 0, 1, 0
};

struct Operand {
  const uint8_t* values;                    // tiles [rows / 128, K / 128], rounded up
  const float* scales;                      // of each tile: 128 if it is a's, 4 if it is b's
};

__global__ void __launch_bounds__(THREADS)
product_kernel(Operand a, Operand b, int64_t M, int64_t N, int steps, float* y) {
  extern __shared__ __align__(1024) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const uint32_t arrived = smem_address(&shared.arrived);
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int first_row = 16 * warp + lane / 4;           // of this thread's outputs: see wgmma.cuh
  if (threadIdx.x == 0) {
    tma::init(arrived, 1);
    tma::init_done();
  }
  __syncthreads();

  float sums[2][64] = {};                               // rows 0 to 63 of the tile, and 64 to 127
  for (int step = 0; step < steps; step++) {
    const int64_t a_tile = int64_t(blockIdx.y) * steps + step;
    const int64_t b_tile = int64_t(blockIdx.x) * steps + step;
    if (threadIdx.x == 0) {
      tma::expect(arrived, 2 * TILE_BYTES);
      tma::copy(smem_address(shared.a), a.values + a_tile * TILE_BYTES, TILE_BYTES, arrived);
      tma::copy(smem_address(shared.b), b.values + b_tile * TILE_BYTES, TILE_BYTES, arrived);
    }
    tma::wait(arrived, step % 2);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float partial[64];
      // Descriptors count in units of 16 bytes.
      const uint32_t a_half = wgmma::descriptor(shared.a) + half * (64 * SIDE / 16);
      const uint32_t b_rows = wgmma::descriptor(shared.b);
      wgmma::begin();
      wgmma::multiply<false>(partial, a_half, b_rows);
#pragma unroll
      for (int k = 32; k < SIDE; k += 32)
        wgmma::multiply<true>(partial, a_half + k / 16, b_rows + k / 16);
      wgmma::commit();
      wgmma::wait(partial);
#pragma unroll
      for (int i = 0; i < 64; i++) {
        const int row = 64 * half + first_row + 8 * (i / 2 % 2);
        const float scale = a.scales[a_tile * SIDE + row] * b.scales[b_tile * 4 + i / 16];
        sums[half][i] += partial[i] * scale;
      }
    }
    __syncthreads();                        // All have read the tiles, which are filled again.
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
#pragma unroll
    for (int i = 0; i < 64; i++) {
      const int64_t m = int64_t(blockIdx.y) * SIDE + 64 * half + first_row + 8 * (i / 2 % 2);
      const int64_t n = int64_t(blockIdx.x) * SIDE + i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (m < M && n < N)
        y[m * N + n] = sums[half][i];
    }
  }
}

}  // namespace

extern "C" void product_4(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                          const uint8_t* b_scales, int64_t M, int64_t N, int64_t K, float* y,
                          uint8_t* a_tiles, float* a_tile_scales, uint8_t* b_tiles,
                          float* b_tile_scales, cudaStream_t stream) {
  packed_to_fp8_tiles(a, a_scales, M, K, false, a_tiles, a_tile_scales, stream);
  packed_to_fp8_tiles(b, b_scales, N, K, true, b_tiles, b_tile_scales, stream);
  const dim3 grid(unsigned((N + SIDE - 1) / SIDE), unsigned((M + SIDE - 1) / SIDE));
  const int steps = int((K + SIDE - 1) / SIDE);
  product_kernel<<<grid, THREADS, sizeof(Shared), stream>>>(
      {a_tiles, a_tile_scales}, {b_tiles, b_tile_scales}, M, N, steps, y);
}
