/*
out = alpha * A @ B.T for MXFP4 matrices, on the FP4 tensor cores of RTX 50, RTX PRO and DGX Spark
(sm_120a, sm_121a).

An MXFP4 matrix is two arrays. Its codes are 4-bit numbers (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
their negatives), two in a byte. Its scales are powers of two, one byte for every 32 codes along K
(E8M0, the exponent of a float). The block-scaled instruction mma_mxf4 takes both and computes, for
every output,

    sum over blocks of 32 along K of  scale_A[m, block] * scale_B[n, block] * (codes_A . codes_B)

with FP32 sums, so no operand is ever expanded to a wider format.

A CTA (a block of threads) of 8 warps computes 256 x 128 outputs, and each warp keeps 64 x 64 of
them in registers. K is walked in steps of 128. Shared memory has three stages, each with room for
the operands of one step; cp.async fills two of them while the warps multiply out of the third:

    256 rows of A, then 128 rows of B   64 bytes each, in chunks of 16 bytes that are permuted (see
                                        chunk_offset)
    three tiles of scales               512 bytes each, as scale_tiles.cuh lays them out: two for
                                        A, one for B

Twice a step, for 64 values of K, each warp does 4 ldmatrix of A, 4 of B, and 32 mma_mxf4. An
ldmatrix knows nothing of 4-bit numbers. It gives lane (g, q) = (lane / 4, lane % 4) the four bytes
from 4q of row g, 16 bytes long, which are the eight codes from 8q: just those that mma_mxf4 wants
in that lane.

Matrices need not fill the tiles. For rows beyond M or N and codes beyond K, cp.async writes zeros
without reading memory. Scale bytes beyond K are cleared on their way into registers.

    nvcc -O3 -gencode=arch=compute_120a,code=sm_120a -c gemm_sm120.cu
*/
#include "ptx/cp_async.cuh"
#include "ptx/mma_mxf4.cuh"
#include "ops.h"
#include "scale_tiles.cuh"

namespace {

// What a CTA computes, and how much of K a stage holds.
constexpr int BM = 256;
constexpr int BN = 128;
constexpr int BK = 128;
constexpr int STAGES = 3;
constexpr int THREADS = 256;

// The layout of a stage in shared memory, in bytes: A's rows of codes, B's, then the scales.
constexpr int ROW = BK / 2;
constexpr int CHUNKS = ROW / 16;                            // a row is copied in chunks of 16 bytes
constexpr int SCALE_TILE = 512;                             // 128 rows x 4 blocks
constexpr int SCALES = (BM + BN) * ROW;
constexpr int STAGE_BYTES = SCALES + (BM + BN) / 128 * SCALE_TILE;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
static_assert(SHARED_BYTES <= 101376, "the shared memory that a block can have on sm_120");

// The operands of the product, and the first row and column of this CTA's tile.
struct Operands {
  const uint8_t* a;
  const uint8_t* a_scales;
  const uint8_t* b;
  const uint8_t* b_scales;
  int M, N, K;
  int m0, n0;
};

// Returns where a chunk (0 .. 3) of a row (A's 0 .. 255, then B's) lies in a stage. Two rows make
// 128 bytes, which are all 32 banks of shared memory. The permutation changes every two rows, so
// the 8 rows of an ldmatrix, and 8 threads of a copy, meet every bank once.
__device__ uint32_t chunk_offset(int row, int chunk) {
  return row * ROW + (chunk ^ (row / 2 % 4)) * 16;
}

// ---- memory to shared memory

// Starts the copies of a step's codes into a stage.
__device__ __forceinline__ void load_codes(const Operands& p, int step, uint32_t stage,
                                           int thread) {
  UNROLL for (int i = thread; i < (BM + BN) * CHUNKS; i += THREADS) {
    const int row = i / CHUNKS;
    const int chunk = i % CHUNKS;
    const int k = step * BK + chunk * 32;
    const bool is_a = row < BM;
    const int matrix_row = is_a ? p.m0 + row : p.n0 + row - BM;
    const bool is_inside = matrix_row < (is_a ? p.M : p.N) && k < p.K;
    const uint32_t to = stage + chunk_offset(row, chunk);
    const uint8_t* codes = is_a ? p.a : p.b;
    const int64_t offset = is_inside ? (int64_t(matrix_row) * p.K + k) / 2 : 0;
    cp_async_16(to, codes + offset, is_inside);
  }
}

// Starts the copies of a step's scales: a warp a tile, 16 bytes a lane.
__device__ __forceinline__ void load_scales(const Operands& p, int step, uint32_t stage,
                                            int thread) {
  if (thread < 96) {
    const int tile = thread / 32;
    const int lane = thread % 32;
    const bool is_a = tile < 2;
    const int row = is_a ? p.m0 + 128 * tile : p.n0;
    const bool is_inside = row < (is_a ? p.M : p.N);
    const uint8_t* scales = is_a ? p.a_scales : p.b_scales;
    const int64_t offset = is_inside ? mxfp4::scale_tile_index(row + lane, 4 * step, p.K / 32) : 0;
    cp_async_16(stage + SCALES + thread * 16, scales + offset, is_inside);
  }
}

// The copies that a thread has started since its last commit make a group. Groups end in order.
__device__ __forceinline__ void commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most n of this thread's groups are on their way.
template <int n> __device__ __forceinline__ void wait_group() {
  asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}

// ---- shared memory to registers

// Loads four matrices of 8 rows x 16 bytes. Lane l brings the address of row l % 8 of matrix l / 8.
__device__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Loads two words of four scale bytes each, and clears the bytes beyond K.
__device__ void load_scale_words(uint32_t (&words)[2], uint32_t address, uint32_t mask) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(address)
               : "memory");
  words[0] &= mask;
  words[1] &= mask;
}

// ---- the main loop's product

// Where this thread's warp works in the tile, 4 x 2 warps of 64 x 64, and this lane in the warp.
struct Position {
  int warp_m, warp_n;
  int lane, g, q;
};

// Adds the product of a step to the 64 x 64 sums of a warp: 4 x 8 tiles of 16 x 8.
__device__ __forceinline__ void multiply(float (&sum)[4][8][4],
                                         const Operands& p,
                                         const Position& position,
                                         int step,
                                         uint32_t stage) {
  const auto [warp_m, warp_n, lane, g, q] = position;

  // A scale word holds 4 blocks, which cover 128 of K. The last step may have fewer; what follows
  // them in the word is no data.
  const int blocks = p.K / 32 - 4 * step;
  const uint32_t mask = blocks < 4 ? (1u << (8 * blocks)) - 1 : ~0u;

  // Lane (g, q) takes row 8q + g of each 32 rows, which is what thread_a and thread_b expect. The
  // first of the two words belongs to the warp's rows 0 .. 31, the second to its rows 32 .. 63.
  const uint32_t line = stage + SCALES + (8 * q + g) * 16;
  uint32_t a_scales[2];
  uint32_t b_scales[2];
  load_scale_words(a_scales, line + warp_m / 2 * SCALE_TILE + warp_m % 2 * 8, mask);
  load_scale_words(b_scales, line + 2 * SCALE_TILE + warp_n * 8, mask);

  // Each half of the step is 64 of K: 32 bytes of a row, the chunks 2 half and 2 half + 1.
  UNROLL for (int half = 0; half < 2; half++) {
    uint32_t a[4][4];                                       // 4 tiles of 16 rows
    uint32_t b[4][4];                                       // 4 pairs of tiles of 8 columns
    UNROLL for (int i = 0; i < 4; i++)
      ldmatrix_x4(a[i], stage + chunk_offset(warp_m * 64 + i * 16 + lane % 16,
                                             2 * half + lane / 16));
    UNROLL for (int j = 0; j < 4; j++)
      ldmatrix_x4(b[j], stage + chunk_offset(BM + warp_n * 64 + j * 16 + lane % 8 + lane / 16 * 8,
                                             2 * half + lane / 8 % 2));
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int j = 0; j < 8; j++) {
        uint32_t b_tile[2];
        b_tile[0] = b[j / 2][j % 2 * 2];
        b_tile[1] = b[j / 2][j % 2 * 2 + 1];
        mma_mxf4(sum[i][j],
                 a[i],
                 b_tile,
                 a_scales[i / 2],
                 b_scales[j / 4],
                 2 * half, i % 2,                           // byte_a, thread_a
                 2 * half, j % 4);                          // byte_b, thread_b
      }
  }
}

// ---- the epilogue

__device__ void store_pair(float* to, float x, float y) {
  *reinterpret_cast<float2*>(to) = make_float2(x, y);
}

// Rounds both to nearest; x goes to the lower half, which is the lower address.
__device__ void store_pair(mxfp4::bfloat16* to, float x, float y) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  *reinterpret_cast<uint32_t*>(to) = pair;
}

// Stores alpha times a warp's sums. A lane has two neighbouring columns of two rows in every 16 x
// 8 tile.
template <class T>
__device__ __forceinline__ void store_tile(const float (&sum)[4][8][4],
                                           const Operands& p,
                                           const Position& position,
                                           float alpha,
                                           T* out) {
  UNROLL for (int i = 0; i < 4; i++)
    UNROLL for (int j = 0; j < 8; j++)
      UNROLL for (int h = 0; h < 2; h++) {
        const int row = p.m0 + position.warp_m * 64 + i * 16 + position.g + 8 * h;
        const int column = p.n0 + position.warp_n * 64 + j * 8 + 2 * position.q;
        const float x = alpha * sum[i][j][2 * h];
        const float y = alpha * sum[i][j][2 * h + 1];
        T* to = out + int64_t(row) * p.N + column;
        if (p.N % 2 == 0) {
          if (row < p.M && column < p.N)
            store_pair(to, x, y);
        } else if (row < p.M) {  // every other row begins between two words
          if (column < p.N)
            mxfp4::store_float(to[0], x);
          if (column + 1 < p.N)
            mxfp4::store_float(to[1], y);
        }
      }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
gemm_kernel(const uint8_t* a,                               // [M, K/2] codes
            const uint8_t* a_scales,                        // [M, K/32] in tiles
            const uint8_t* b,                               // [N, K/2] codes
            const uint8_t* b_scales,                        // [N, K/32] in tiles
            int M,
            int N,
            int K,
            float alpha,
            T* out) {                                       // [M, N]
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t smem = smem_address(shared);
  const int lane = threadIdx.x % 32;
  const int warp_m = threadIdx.x / 64;
  const int warp_n = threadIdx.x / 32 % 2;
  const Position position = {warp_m, warp_n, lane, lane / 4, lane % 4};
  const int m0 = blockIdx.y * BM;
  const int n0 = blockIdx.x * BN;
  const Operands p = {a, a_scales, b, b_scales, M, N, K, m0, n0};
  const int steps = (K + BK - 1) / BK;
  const auto stage = [&](int step) { return smem + step % STAGES * STAGE_BYTES; };
  const auto load = [&](int step) {
    load_codes(p, step, stage(step), threadIdx.x);
    load_scales(p, step, stage(step), threadIdx.x);
  };

  float sum[4][8][4] = {};

  // A group is committed in every step, even an empty one, so that counting groups counts steps.
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps)
      load(step);
    commit_group();
  }

  for (int step = 0; step < steps; step++) {
    // After the wait this thread's part of the step has come, after the barrier everyone's has.
    // The barrier also says that everyone has multiplied the last step, whose stage is filled
    // again now.
    wait_group<STAGES - 2>();
    __syncthreads();
    if (step + STAGES - 1 < steps)
      load(step + STAGES - 1);
    commit_group();
    multiply(sum, p, position, step, stage(step));
  }
  store_tile(sum, p, position, alpha, out);
}

}  // namespace

void gemm_sm120(const uint8_t* a,                           // [M, K/2]
                const uint8_t* a_scales,                    // [M, K/32], in tiles
                const uint8_t* b,                           // [N, K/2]
                const uint8_t* b_scales,                    // [N, K/32], in tiles
                int64_t M,
                int64_t N,
                int64_t K,
                float alpha,
                FloatMatrix out,                            // [M, N]
                void* stream) {
  if (!M || !N)
    return;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  with_dtype(out, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const dim3 grid(unsigned(mxfp4::ceil_div(N, BN)), unsigned(mxfp4::ceil_div(M, BM)));
    cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    gemm_kernel<T><<<grid, THREADS, SHARED_BYTES, cuda_stream>>>(
        a, a_scales, b, b_scales, int(M), int(N), int(K), alpha, to);
  });
}
