/*
Lesson 4: rows and columns of one matrix, through shared memory.

What it does. The backward pass needs a gradient dy [M, K] twice: quantised in blocks along its
rows, and, for the other product, in blocks along its columns. Each block is multiplied by 32 random
signs, rotated, and divided by the power of two that brings its largest value into [4, 8); 3/4 of
that are rounded (absmax in fp4/reference.py). The scale does not undo the 3/4: the caller does.

The problem. A block of a column is 32 values that lie a whole row apart, each in another sector: of
32 bytes that are fetched, 4 are used (lesson 3). And dy would be read twice.

The idea. Shared memory, which the threads of a CUDA block have in common, is as fast for columns as
for rows. So 128 threads copy a tile of 32 x 128 values into it, in whole rows. Then each thread
takes a block of a row from there, and after that a block of a column.

The catch. Shared memory has 32 banks, and float i lies in bank i % 32. If the 32 threads of a warp
read from one bank, they wait for one another. Thread t reads row t % 32 of the tile; were the rows
128 floats long, all of these would begin in bank 0. So a row has 129, one of them unused: now row r
begins in bank r. Columns are no trouble, because neighbouring threads read neighbouring floats.

What to expect. 5.1 bytes a value, and two rotations and roundings of about 25 instructions: 0.11 ms
to move, and 0.11 to compute. Where a CUDA block waits at the barrier, neither hides the other.
../quantize_backward.cuh, which ships, has tiles of 128 x 128, copies the next one while it works on
this one, and fills the sectors that it writes: here the 16 bytes of a thread fill half of one.

    python -m pytest tests/test_lessons.py -k quantize_4        # is it right?
*/
#include "../mxfp4.cuh"

using namespace mxfp4;

namespace {

constexpr int ROWS = 32;                    // of a tile
constexpr int COLUMNS = 128;
constexpr int THREADS = 128;                // a thread for each block of a row, and of a column

// Rotates, scales and rounds a block, and stores it as block number `to` of the output.
__device__ void quantize_block(
    Block<1>& v, uint32_t signs, uint8_t* codes, uint8_t* scales, int64_t to) {
  float largest[1];
  apply_signs(v, signs);
  hadamard(v);
  max_magnitude(v, largest);
  const bool finite = is_finite(largest[0]);
  const int e = absmax_exponent(largest[0]);
  const float unit = .75f * pow2(-e);       // the largest value comes to lie in [3, 6)

  uint32_t words[4] = {};
  UNROLL for (int i = 0; i < 32; i++) {
    const float u = v[i][0] * unit;
    words[i / 8] |= uint32_t(round_nearest(u) | sign_bit(u)) << (4 * (i % 8));
  }
  const bool has_codes = finite && largest[0] != 0;
  const uint4 packed = make_uint4(words[0], words[1], words[2], words[3]);
  reinterpret_cast<uint4*>(codes)[to] = has_codes ? packed : make_uint4(0, 0, 0, 0);
  scales[to] = finite ? e + 127 : 255;
}

__global__ void quantize_kernel(
    const float* dy, int64_t M, int64_t K, const int64_t* signs, uint8_t* codes, uint8_t* scales,
    uint8_t* codes_t, uint8_t* scales_t) {
  __shared__ float tile[ROWS][COLUMNS + 1];
  const int t = threadIdx.x;
  const int64_t first_row = int64_t(blockIdx.y) * ROWS;
  const int64_t first_column = int64_t(blockIdx.x) * COLUMNS;
  const uint32_t sign_bits = uint32_t(*signs);

  const bool in_columns = first_column + t < K;
  for (int r = 0; r < ROWS; r++) {
    const bool inside = in_columns && first_row + r < M;
    tile[r][t] = inside ? dy[(first_row + r) * K + first_column + t] : 0;
  }
  __syncthreads();                          // Nobody reads before everybody has written.

  Block<1> v;
  const int row = t % ROWS;
  const int quarter = t / ROWS;             // which of the four blocks of this row
  if (first_row + row < M && first_column + 32 * quarter < K) {
    UNROLL for (int i = 0; i < 32; i++)
      v[i][0] = tile[row][32 * quarter + i];
    const int64_t block = (first_row + row) * (K / 32) + first_column / 32 + quarter;
    quantize_block(v, sign_bits, codes, scales, block);
  }
  if (in_columns) {
    UNROLL for (int i = 0; i < 32; i++)
      v[i][0] = tile[i][t];
    const int64_t block = (first_column + t) * ceil_div(M, 32) + blockIdx.y;
    quantize_block(v, sign_bits, codes_t, scales_t, block);
  }
}

}  // namespace

extern "C" void quantize_4(const float* dy, int64_t M, int64_t K, const int64_t* signs,
                           uint8_t* codes, uint8_t* scales, uint8_t* codes_t, uint8_t* scales_t,
                           cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(K, COLUMNS)), unsigned(ceil_div(M, ROWS)));
  quantize_kernel<<<grid, THREADS, 0, stream>>>(dy, M, K, signs, codes, scales, codes_t, scales_t);
}
