/*
out = alpha * A @ B.T for MXFP4 matrices, on the FP4 tensor cores of B200 and B300 (sm_100a,
sm_103a).

An MXFP4 matrix is two arrays. Its codes are 4-bit numbers (E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
their negatives), two in a byte. Its scales are powers of two, one byte for every 32 codes along K
(E8M0, the exponent of a float). A block-scaled matrix instruction takes both and computes, for
every output,

    sum over blocks of 32 along K of  scale_A[m, block] * scale_B[n, block] * (codes_A . codes_B)

with FP32 sums, so no operand is ever expanded to a wider format.

A CTA (a block of threads) computes 128 x 256 outputs. Their sums occupy 256 columns of tensor
memory (TMEM), which only the tensor core writes. K is walked in steps of 256. Shared memory has
four stages, each with room for the operands of one step, which TMA fetches:

    128 rows of A, then 256 rows of B      128 bytes each
    2 tiles of scales of A, 4 of B         512 bytes each: for every 128 rows, one tile for the
                                           step's first 128 values of K and one for the second

Four warps divide the work. Barriers in shared memory pass the stages between the first two:

    warp 0, producer:  wait empty[s] -> start the copies into stage s; their bytes arrive at full[s]
    warp 1, issuer:    wait full[s]  -> start the copies of the scales to TMEM, then 4 products of
                       64 along K; when they are done, empty[s] gets an arrival, and after the
                       last step so does done
    warp 2             allocates and frees TMEM
    all, epilogue:     wait done     -> read the sums, one row a lane, and store them

Matrices need not fill the tiles. TMA writes zeros for rows beyond M or N and for codes beyond K.
Scale bytes beyond K are cleared here. Tiles of scales that lie beyond K or N as a whole are
neither loaded nor used.

    nvcc -O3 -gencode=arch=compute_100a,code=sm_100a -c gemm_sm100.cu
*/
#include "ops.h"
#include "scale_tiles.cuh"
#include "ptx/tcgen05.cuh"
#include "ptx/tma.cuh"

namespace {

// What a CTA computes, and how much of K a stage holds.
constexpr int BM = 128;
constexpr int BN = 256;
constexpr int BK = 256;
constexpr int STAGES = 4;
constexpr int THREADS = 128;

// The layout of a stage in shared memory, in bytes: A's codes at 0, B's codes, then the scales.
constexpr int SCALE_TILE = 512;                             // 128 rows x 4 blocks
constexpr int SCALE_ROW = 2 * SCALE_TILE;                   // 128 rows x a step of K
constexpr int B_CODES = BM * BK / 2;
constexpr int SCALES = B_CODES + BN * BK / 2;
constexpr int STAGE_BYTES = SCALES + 3 * SCALE_ROW;
constexpr int SHARED_BYTES = STAGES * STAGE_BYTES + 1024;   // to align the first stage
static_assert(STAGE_BYTES % 1024 == 0, "the swizzle needs stages that begin at multiples of 1024");
static_assert(SHARED_BYTES <= 232448 - 1024, "the shared memory that a block can have on sm_100");

// The layout of TMEM: the sums, then the scales of every stage. A tile of scales takes 4 columns,
// and a stage has 2 tiles of A and 4 of B.
constexpr int A_SCALES = 0;
constexpr int B_SCALES = 8;
constexpr int STAGE_COLUMNS = 24;
constexpr int TMEM_COLUMNS = 512;
static_assert(BN + STAGES * STAGE_COLUMNS <= TMEM_COLUMNS);

struct Barriers {
  uint64_t full[STAGES];                                    // the stage's bytes have come
  uint64_t empty[STAGES];                                   // its products are done
  uint64_t done;                                            // the last product is done
};

// The output tile of this CTA, and how the operands' edges cut it.
struct Tile {
  int M, N, K;
  int m0, n0;                                               // its first row and column
  int steps;                                                // steps of BK along K
  int scale_rows;                                           // 1 of A, and 1 or 2 of B

  // How many of the step's two tiles of scales hold anything, for each 128 rows.
  __device__ int scale_tiles(int step) const { return K - step * BK > 128 ? 2 : 1; }
};

// One thread keeps the stages filled.
__device__ __forceinline__ void produce(const Tile& tile,
                                        const CUtensorMap& a,
                                        const uint8_t* a_scales,
                                        const CUtensorMap& b,
                                        const uint8_t* b_scales,
                                        uint32_t smem,
                                        const Barriers& barriers) {
  for (int step = 0; step < tile.steps; step++) {
    const int s = step % STAGES;
    const int scale_bytes = tile.scale_tiles(step) * SCALE_TILE;
    const uint32_t stage = smem + s * STAGE_BYTES;
    const uint32_t full = smem_address(&barriers.full[s]);

    // In the first round nothing has been multiplied yet; the odd phase lets it pass at once.
    tma::wait(smem_address(&barriers.empty[s]), (step / STAGES % 2) ^ 1);
    tma::expect(full, SCALES + tile.scale_rows * scale_bytes);
    tma::copy_box(stage, a, step * BK / 2, tile.m0, full);
    tma::copy_box(stage + B_CODES, b, step * BK / 2, tile.n0, full);

    // In memory the two tiles of a step are neighbours, so one copy brings both.
    for (int i = 0; i < tile.scale_rows; i++) {
      const uint8_t* scales = i ? b_scales : a_scales;
      const int row = i ? tile.n0 + 128 * (i - 1) : tile.m0;
      const int64_t offset = mxfp4::scale_tile_index(row, step * BK / 32, tile.K / 32);
      tma::copy(stage + SCALES + i * SCALE_ROW, scales + offset, scale_bytes, full);
    }
  }
}

__device__ __forceinline__ void and_shared_word(uint32_t address, uint32_t mask) {
  asm volatile("{ .reg .u32 x;\n"
               "ld.shared.u32 x, [%0];\n"
               "and.b32 x, x, %1;\n"
               "st.shared.u32 [%0], x; }"
               :: "r"(address), "r"(mask)
               : "memory");
}

// Clears the scale bytes beyond K in the last tile of the last step. A product reads two scale
// bytes for its 64 values of K. If K ends between them, the second byte is whatever lies in
// memory, perhaps a NaN. Its codes are zeros, so a scale of any finite value will do: byte 0,
// which is 2^-127.
__device__ __forceinline__ void clear_scales_beyond_k(const Tile& tile, uint32_t stage,
                                                      int scale_tiles, int lane) {
  const uint32_t mask = (1u << (tile.K / 32 % 4 * 8)) - 1;
  for (int row = 0; row < tile.scale_rows; row++)
    for (int i = 0; i < 4; i++) {
      const uint32_t last = stage + SCALES + (2 * row + scale_tiles - 1) * SCALE_TILE;
      and_shared_word(last + lane * 16 + i * 4, mask);
    }
  tma::writes_before_async();
  __syncwarp();
}

// Starts the copies of a stage's scales from shared memory to TMEM.
__device__ __forceinline__ void copy_scales(const Tile& tile, uint32_t stage, int scale_tiles,
                                            uint32_t scale_columns) {
  for (int half = 0; half < scale_tiles; half++) {
    const uint32_t a_tile = stage + SCALES + half * SCALE_TILE;
    tcgen05::copy_scales(scale_columns + A_SCALES + 4 * half,
                         tcgen05::scales_descriptor(a_tile));
    for (int row = 1; row < tile.scale_rows; row++)
      tcgen05::copy_scales(scale_columns + B_SCALES + 8 * half + 4 * (row - 1),
                           tcgen05::scales_descriptor(a_tile + row * SCALE_ROW));
  }
}

// Starts the products of a step, each over 64 values of K: 32 bytes of a row, and two of the four
// bytes of a scale word.
__device__ __forceinline__ void multiply(const Tile& tile, uint32_t stage, int step, int columns,
                                         uint32_t sums, uint32_t scale_columns) {
  for (int i = 0; i < 4 && step * BK + i * 64 < tile.K; i++) {
    const int scale_byte = i % 2 * 2;
    tcgen05::mma(sums,
                 tcgen05::rows_descriptor(stage + 32 * i),
                 tcgen05::rows_descriptor(stage + B_CODES + 32 * i),
                 tcgen05::instruction(BM, columns, scale_byte),
                 scale_columns + A_SCALES + i / 2 * 4,
                 scale_columns + B_SCALES + i / 2 * 8,
                 step > 0 || i > 0);                        // else it overwrites the sums
  }
}

// The main loop: one warp waits for each stage, and one of its threads instructs the tensor core.
__device__ __forceinline__ void issue(const Tile& tile,
                                      uint32_t smem,
                                      const Barriers& barriers,
                                      uint32_t sums,
                                      uint32_t scales,
                                      int lane) {
  const bool is_issuer = tcgen05::elect();
  const int columns = min(BN, (tile.N - tile.n0 + 15) / 16 * 16);
  for (int step = 0; step < tile.steps; step++) {
    const int s = step % STAGES;
    const int scale_tiles = tile.scale_tiles(step);
    const uint32_t stage = smem + s * STAGE_BYTES;
    const uint32_t scale_columns = scales + s * STAGE_COLUMNS;
    tma::wait(smem_address(&barriers.full[s]), step / STAGES % 2);
    if (step == tile.steps - 1 && tile.K % 64)
      clear_scales_beyond_k(tile, stage, scale_tiles, lane);
    tcgen05::fence_after();
    if (is_issuer) {
      copy_scales(tile, stage, scale_tiles, scale_columns);
      multiply(tile, stage, step, columns, sums, scale_columns);
      tcgen05::commit(smem_address(&barriers.empty[s]));
    }
    __syncwarp();
  }
  if (is_issuer)
    tcgen05::commit(smem_address(&barriers.done));
}

// Stores alpha times the first n of 16 sums. If all 16 count and the place is aligned to 16 bytes,
// it stores 16 bytes at a time.
template <class T>
__device__ void store(T* to, const float (&sums)[16], float alpha, int n, bool aligned) {
  __align__(16) T x[16];
  UNROLL for (int i = 0; i < 16; i++)
    mxfp4::store_float(x[i], alpha * sums[i]);
  if (n >= 16 && aligned) {
    UNROLL for (int i = 0; i < int(sizeof(T)); i++)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(x)[i];
  } else {
    UNROLL for (int i = 0; i < 16; i++)
      if (i < n)
        to[i] = x[i];
  }
}

// The epilogue: each thread reads one row of the tile from TMEM and stores it. Lane i of warp w
// sees TMEM lane 32 w + i.
template <class T>
__device__ __forceinline__ void store_tile(const Tile& tile,
                                           uint32_t sums,
                                           int thread,
                                           float alpha,
                                           T* out) {
  const int row = tile.m0 + thread;
  const uint32_t lane_group = thread / 32 * 32 << 16;
  const bool aligned = tile.N % (16 / sizeof(T)) == 0;
  for (int column = 0; column < BN && tile.n0 + column < tile.N; column += 16) {
    float v[16];
    __syncwarp();                                           // a warp loads together
    tcgen05::load(sums + lane_group + column, v);
    T* to = out + int64_t(row) * tile.N + tile.n0 + column;
    if (row < tile.M)
      store(to, v, alpha, tile.N - tile.n0 - column, aligned);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS)
gemm_kernel(const __grid_constant__ CUtensorMap a,          // [M, K/2] codes
            const uint8_t* a_scales,                        // [M, K/32] in tiles
            const __grid_constant__ CUtensorMap b,          // [N, K/2] codes
            const uint8_t* b_scales,                        // [N, K/32] in tiles
            int M,
            int N,
            int K,
            float alpha,
            T* out) {                                       // [M, N]
  extern __shared__ uint8_t dynamic[];
  __shared__ Barriers barriers;
  __shared__ uint32_t first_column;
  const uint32_t smem = (smem_address(dynamic) + 1023) / 1024 * 1024;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int m0 = blockIdx.y * BM;
  const int n0 = blockIdx.x * BN;
  const Tile tile = {M, N, K, m0, n0, (K + BK - 1) / BK, n0 + 128 < N ? 3 : 2};

  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      tma::init(smem_address(&barriers.full[s]), 1);
      tma::init(smem_address(&barriers.empty[s]), tcgen05::ISSUERS);
    }
    tma::init(smem_address(&barriers.done), tcgen05::ISSUERS);
    tma::init_done();
  }
  if (warp == 2)
    tcgen05::alloc(smem_address(&first_column), TMEM_COLUMNS);
  tcgen05::fence_before();
  __syncthreads();
  tcgen05::fence_after();
  const uint32_t sums = first_column;
  const uint32_t scales = sums + BN;

  if (warp == 0 && lane == 0)
    produce(tile, a, a_scales, b, b_scales, smem, barriers);
  else if (warp == 1)
    issue(tile, smem, barriers, sums, scales, lane);

  tma::wait(smem_address(&barriers.done), 0);
  tcgen05::fence_after();
  store_tile(tile, sums, threadIdx.x, alpha, out);
  tcgen05::fence_before();
  __syncthreads();
  if (warp == 2)
    tcgen05::dealloc(sums, TMEM_COLUMNS);
}

}  // namespace

void gemm_sm100(const uint8_t* a,                           // [M, K/2]
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
  if (!K) {
    cudaMemsetAsync(out.data, 0, M * N * (out.is_bf16 ? 2 : 4), cuda_stream);
    return;
  }
  const CUtensorMap a_map = tma::map(a, M, K / 2, BM);
  const CUtensorMap b_map = tma::map(b, N, K / 2, BN);
  with_dtype(out, [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    const dim3 grid(unsigned(mxfp4::ceil_div(N, BN)), unsigned(mxfp4::ceil_div(M, BM)));
    cudaFuncSetAttribute(gemm_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    gemm_kernel<T><<<grid, THREADS, SHARED_BYTES, cuda_stream>>>(
        a_map, a_scales, b_map, b_scales, int(M), int(N), int(K), alpha, to);
  });
}
