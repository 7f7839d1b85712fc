/*
The parts of gemm_sm90.cu's epilogue, in which sums in registers become outputs in memory, scaled
and rounded. If they are a gradient, they are masked and rotated back (linear.py) before that.

Of each of its warpgroup's two wgmma a consumer warp has 16 rows x 128 columns. It stores them in
four chunks of 16 rows x 64 columns. The tensor cores leave a row of a chunk spread over four
lanes, each of which has two neighbours of every eight columns. So the outputs go through shared
memory, from where TMA stores them while the warp goes on.

To rotate 32 neighbours back, a thread must have all of them. The warp exchanges its FP32 sums by
way of the same shared memory, and then each lane has one of the chunk's 16 x 2 blocks.

TMA stores a box at a time: 16 rows of 128 bytes, in which the 16-byte pieces of row r are permuted
by r % 8 (the "128-byte swizzle"). A warp has four boxes of shared memory, which make its buffers:

    output    boxes a chunk    buffers
    BF16      1                4
    FP32      2                2
*/
#pragma once
#include "block_io.cuh"
#include "ptx/tma.cuh"

namespace epilogue {

constexpr int BOX_ROWS = 16;
constexpr int BOX_ROW_BYTES = 128;
constexpr int BOX_BYTES = BOX_ROWS * BOX_ROW_BYTES;
constexpr int BOXES = 4;                                // of a warp
constexpr int CHUNKS = 4;                               // of a warp's 2 x 16 x 128 outputs
constexpr int CHUNK_COLUMNS = 64;
using WarpBoxes = uint8_t[BOXES][BOX_BYTES];            // 1024-byte aligned

template <class T> constexpr int CHUNK_BOXES = CHUNK_COLUMNS * sizeof(T) / BOX_ROW_BYTES;
template <class T> constexpr int BUFFERS = BOXES / CHUNK_BOXES<T>;

// The first box of the buffer that a chunk takes.
template <class T> __device__ __forceinline__ int first_box(int chunk) {
  return chunk % BUFFERS<T> * CHUNK_BOXES<T>;
}

// Waits until TMA has read the boxes that the next chunk will overwrite.
template <class T> __device__ __forceinline__ void wait_for_boxes(bool unrotates) {
  // In BF16 an exchange takes the box of the next buffer as well.
  if (unrotates && BUFFERS<T> == 4)
    tma::wait_for_reads<2>();
  else
    tma::wait_for_reads<BUFFERS<T> - 1>();
}

// ---- places in shared memory

// The offset of a byte of one of 16 rows in swizzled boxes, the first of which is at `first`.
__device__ __forceinline__ int smem_offset(int first, int row, int byte) {
  const int box = byte / BOX_ROW_BYTES;
  const int swizzle = row % 8 * 16;
  return first + box * BOX_BYTES + row * BOX_ROW_BYTES + ((byte % BOX_ROW_BYTES) ^ swizzle);
}

// The same for FP32 sums that are exchanged: of a row's two blocks of 32 floats, 0 lies in one box
// and 1 in the next, which the caller adds. The 16-byte pieces are ordered so that eight
// neighbouring lanes, which read four rows of two blocks, meet no bank twice.
__device__ __forceinline__ int smem_offset_f32(int first, int row, int block, int byte) {
  return first + row * BOX_ROW_BYTES + (byte ^ (row % 4 * 32) ^ (block * 16));
}

// The address of what lies `bytes` after an offset. Before the swizzle, the offset and `bytes` have
// no bit in common, and the swizzle is an exclusive or: so is the sum of the two.
__device__ __forceinline__ uint8_t* smem_at(uint8_t* box, int offset, int bytes) {
  return box + bytes / BOX_ROW_BYTES * BOX_BYTES + (offset ^ (bytes % BOX_ROW_BYTES));
}

// Where a thread writes and reads in the boxes of its warp, counted from the first warp's boxes.
struct Offsets {
  int summed;                                           // two outputs that it has summed
  int unrotated;                                        // 32 outputs that it has rotated back
  int exchange_write;                                   // two FP32 sums that it has
  int exchange_read;                                    // 32 FP32 sums that it will rotate
};

// first: the offset of the warp's boxes.
template <class T> __device__ __forceinline__ Offsets thread_offsets(int first, int lane) {
  Offsets offsets;
  offsets.summed = smem_offset(first, lane / 4, lane % 4 * 2 * sizeof(T));
  offsets.unrotated = smem_offset(first, lane / 2, lane % 2 * 32 * sizeof(T));
  offsets.exchange_write = smem_offset_f32(first, lane / 4, 0, lane % 4 * 8);
  offsets.exchange_read = smem_offset_f32(first, lane / 2, lane % 2, 0);
  return offsets;
}

// ---- masks

// Loads the masks of the four blocks of 32 that this thread will rotate back, one a chunk:
// mask[h][i] belongs to row m0 + 64 h + lane / 2 and to the columns from n0 + 64 i + 32 (lane % 2)
// on.
__device__ __forceinline__ void load_masks(int32_t (&mask)[2][2],
                                           const int32_t* masks,    // [M, N/32] or nullptr
                                           int64_t M, int64_t N, int m0, int n0, int lane) {
  UNROLL
  for (int i = 0; i < 4; i++) {
    const int64_t m = m0 + 64 * (i / 2) + lane / 2;
    const int64_t n = n0 + CHUNK_COLUMNS * (i % 2) + lane % 2 * 32;
    const bool inside = masks && m < M && n < N;
    mask[i / 2][i % 2] = inside ? masks[(m * N + n) / 32] : 0;
  }
}

// ---- a chunk: registers -> shared memory

// Two neighbours of a chunk, in row lane / 4 + 8 r and columns 8 j + 2 (lane % 4) and the next.
__device__ __forceinline__ float2 sum_pair(const float (&sum)[2][64], int chunk, int j, int r) {
  const int first = chunk % 2 * 32 + 4 * j + 2 * r;
  return make_float2(sum[chunk / 2][first], sum[chunk / 2][first + 1]);
}

__device__ __forceinline__ void store_pair(uint8_t* to, float a, float b, bfloat16) {
  *(uint32_t*)to = pack_bf16x2(a, b);
}
__device__ __forceinline__ void store_pair(uint8_t* to, float a, float b, float) {
  *(float2*)to = make_float2(a, b);
}

// Writes the chunk's outputs where they belong, scaled and rounded.
template <class T>
__device__ __forceinline__ void write_summed(const float (&sum)[2][64], int chunk, float alpha,
                                             uint8_t* box, const Offsets& offsets) {
  UNROLL
  for (int j = 0; j < 8; j++) {
    UNROLL
    for (int r = 0; r < 2; r++) {
      const float2 pair = sum_pair(sum, chunk, j, r);
      uint8_t* to = smem_at(box + 8 * BOX_ROW_BYTES * r, offsets.summed, 8 * j * sizeof(T));
      store_pair(to, alpha * pair.x, alpha * pair.y, T());
    }
  }
}

// Exchanges the chunk's FP32 sums among the lanes of the warp, by way of box number `first_box` and
// the next: v becomes this thread's block of 32 neighbours.
__device__ __forceinline__ void exchange(const float (&sum)[2][64], int chunk, WarpBoxes* boxes,
                                         int first_box, int lane, const Offsets& offsets,
                                         Block32& v) {
  UNROLL
  for (int j = 0; j < 8; j++) {
    const int block = j / 4;
    uint8_t* box = (*boxes)[(first_box + block) % BOXES];
    UNROLL
    for (int r = 0; r < 2; r++) {
      uint8_t* to = smem_at(box + 8 * BOX_ROW_BYTES * r, offsets.exchange_write,
                            (j % 4 * 32) ^ (block * 16));
      *(float2*)to = sum_pair(sum, chunk, j, r);
    }
  }
  __syncwarp();
  UNROLL
  for (int j = 0; j < 8; j++) {
    uint8_t* box = (*boxes)[(first_box + lane % 2) % BOXES];
    const float4 four = *(const float4*)smem_at(box, offsets.exchange_read, 16 * j);
    v[4 * j][0] = four.x;
    v[4 * j + 1][0] = four.y;
    v[4 * j + 2][0] = four.z;
    v[4 * j + 3][0] = four.w;
  }
  __syncwarp();
}

// Gives each thread a block of 32 neighbours, which it masks, rotates back and writes where it
// belongs.
template <class T>
__device__ __forceinline__ void write_unrotated(const float (&sum)[2][64], int chunk, uint32_t mask,
                                                float alpha, WarpBoxes* boxes, int first_box,
                                                int lane, const Offsets& offsets) {
  Block32 v;
  exchange(sum, chunk, boxes, first_box, lane, offsets, v);
  unrotate(v, mask, alpha);
  __align__(16) T rounded[32];
  store(rounded, v);
  uint8_t* box = (*boxes)[first_box];
  UNROLL
  for (int j = 0; j < 2 * int(sizeof(T)); j++)
    *(uint4*)smem_at(box, offsets.unrotated, 16 * j) = ((const uint4*)rounded)[j];
}

}  // namespace epilogue
