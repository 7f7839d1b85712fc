/*
y = x @ w.T of packed matrices for 1 to 8 rows of x. Decoding is this product: each text has one new
token, so that every weight is read once and used a few times. The matrix units of a GPU would have
nothing to do most of the time. What counts is to read the weight at the speed of the memory.

A warp computes 4 rows of w, the columns of y. Its threads take the blocks of 32 in turn: thread i
has the blocks i, i + 32, i + 64, ... of all 4 rows, and of the rows of x. So the 32 threads read
512 bytes in a row with one instruction, 16 a thread, of each row of w, and each byte of w once. A
block of x is decoded once for the 4 rows.

Twice an E2M1 value is an integer: 0, 1, 2, 3, 4, 6, 8 or 12. One instruction looks up four codes
as such bytes, and one (dp4a) adds four products of them. So the sum of a block is an integer, four
times the true one and exact, whatever its order. It becomes a float, exact as well, and takes the
two scales. Only adding up the blocks rounds: first those of a thread, one after the other, then
those of the 32 threads, neighbours first. That is the order of reference.py, and y has its bits.

Bytes: a weight takes 17/32 of one. At M = 1, N = 4096, K = 4096 that is 8.9 MB, and 3 us at the
2.9 TB/s of a copy on an H100; N = 22016, K = 4096 is 47.9 MB, and 16 us. In BF16 it is 3.8 times
as much. Lookups and dp4a, of which a multiprocessor does 64 a clock: a block of w takes 24 for
itself, 6 M for x, and 8 M for its products. A multiprocessor of an H100 gets a block of w in 1.3
clocks; these instructions take 0.6 of a clock at M = 1, 1.25 at 4, and 2.1 at 8. So memory should
limit it up to 4 rows, and these instructions from there on: 8 rows should take 1.6 times as long as
one. Not measured: no GPU has run this file yet.
*/
#include "block_io.cuh"
#include "ops.h"

namespace {

constexpr int WARPS = 4;                        // of a CUDA block
constexpr int ROWS = 4;                         // of w that a warp computes
constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

// The 32 values of a block without its scale, doubled: 8 words of four signed bytes.
struct Bytes {
  uint32_t word[8];
};

// Looks up four codes, in the lower half of a word.
__device__ uint32_t twice_e2m1(uint32_t four_codes) {
  const uint32_t magnitudes = four_codes & MAGNITUDES;
  const uint32_t positive = __byte_perm(0x03020100u, 0x0C080604u, magnitudes);
  const uint32_t negative = __byte_perm(0xFDFEFF00u, 0xF4F8FAFCu, magnitudes);
  // Byte n is byte n of the positive ones (digit n), or of the negative ones (digit n + 4).
  const uint32_t by_sign = ((four_codes >> 1) & 0x4444u) | 0x3210u;
  return __byte_perm(positive, negative, by_sign);
}

__device__ Bytes decode(uint4 codes) {
  uint32_t eight_codes[4];
  memcpy(eight_codes, &codes, 16);
  Bytes bytes;
  UNROLL for (int i = 0; i < 4; i++) {
    bytes.word[2 * i] = twice_e2m1(eight_codes[i]);
    bytes.word[2 * i + 1] = twice_e2m1(eight_codes[i] >> 16);
  }
  return bytes;
}

// The sum of the 32 products of two blocks, without their scales.
__device__ float dot(const Bytes& x, const Bytes& w) {
  int sum = 0;
  UNROLL for (int i = 0; i < 8; i++)
    sum = __dp4a(int(x.word[i]), int(w.word[i]), sum);
  return .25f * float(sum);
}

template <int M, class T>
__global__ void __launch_bounds__(32 * WARPS)
matvec_kernel(
    const uint4* __restrict__ x,                // [M, blocks] of 32 codes
    const uint8_t* __restrict__ x_scales,       // [M, blocks]
    const uint4* __restrict__ w,                // [N, blocks] of 32 codes
    const uint8_t* __restrict__ w_scales,       // [N, blocks]
    int64_t N,
    int64_t blocks,                             // K / 32
    T* __restrict__ y) {                        // [M, N]
  const int lane = threadIdx.x % 32;
  const int64_t warp = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  const int64_t first = warp * ROWS;
  if (first >= N)
    return;
  const int rows = int(min(N - first, int64_t(ROWS)));
  float sum[ROWS][M] = {};
  // For one row of x there are registers enough to have the loads of two turns on their way.
  constexpr int TURNS = M == 1 ? 2 : 1;
  _Pragma("unroll TURNS") for (int64_t block = lane; block < blocks; block += 32) {
    uint4 w_codes[ROWS];
    float w_scale[ROWS];
    UNROLL for (int r = 0; r < ROWS; r++) {
      // The last warp may have fewer rows. It reads the last one again, and does not store it.
      const int64_t n = first + min(r, rows - 1);
      w_codes[r] = w[n * blocks + block];
      w_scale[r] = e8m0_value(w_scales[n * blocks + block]);
    }
    Bytes x_bytes[M];
    float x_scale[M];
    UNROLL for (int m = 0; m < M; m++) {
      x_bytes[m] = decode(x[m * blocks + block]);
      x_scale[m] = e8m0_value(x_scales[m * blocks + block]);
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
      const Bytes w_bytes = decode(w_codes[r]);
      UNROLL for (int m = 0; m < M; m++)
        sum[r][m] += dot(x_bytes[m], w_bytes) * x_scale[m] * w_scale[r];
    }
  }
  UNROLL for (int r = 0; r < ROWS; r++) {
    UNROLL for (int m = 0; m < M; m++) {
      float total = sum[r][m];
      UNROLL for (int stride = 1; stride < 32; stride *= 2)
        total += __shfl_xor_sync(ALL_LANES, total, stride);
      if (lane == 0 && r < rows)
        store_float(y[m * N + first + r], total);
    }
  }
}

template <class T>
struct Arguments {
  const uint4* x;
  const uint8_t* x_scales;
  const uint4* w;
  const uint8_t* w_scales;
  int64_t N;
  int64_t blocks;
  T* y;
};

// Calls the kernel for M rows, which is one that is compiled for this number.
template <int M, class T>
void launch_matvec(int64_t rows, const Arguments<T>& a, cudaStream_t stream) {
  if constexpr (M < MATVEC_ROWS) {
    if (rows > M) {
      launch_matvec<M + 1, T>(rows, a, stream);
      return;
    }
  }
  const unsigned grid = unsigned(ceil_div(a.N, ROWS * WARPS));
  matvec_kernel<M, T><<<grid, 32 * WARPS, 0, stream>>>(
      a.x, a.x_scales, a.w, a.w_scales, a.N, a.blocks, a.y);
}

}  // namespace

void matvec_cuda(
    const uint8_t* x,           // [M, K/2] codes
    const uint8_t* x_scales,    // [M, K/32]
    const uint8_t* w,           // [N, K/2] codes
    const uint8_t* w_scales,    // [N, K/32]
    int64_t M,
    int64_t N,
    int64_t K,
    FloatMatrix y,              // [M, N]
    void* stream) {
  if (!M || !N)
    return;
  with_dtype(y, [=](auto* values) {
    using T = std::remove_reference_t<decltype(*values)>;
    const Arguments<T> arguments = {
        (const uint4*)x, x_scales, (const uint4*)w, w_scales, N, K / 32, values};
    launch_matvec<1, T>(M, arguments, (cudaStream_t)stream);
  });
}
