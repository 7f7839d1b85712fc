/*
Two simple kernels in which a thread owns a block of 32 and needs no other block:

    dequantize      packed -> values
    unrotate        a gradient d in the rotated basis -> (d * mask) H
*/
#include "block_io.cuh"
#include "ops.h"

namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void dequantize_kernel(
    const uint8_t* codes,           // [blocks, 16]
    const uint8_t* scales,          // [blocks]
    int64_t blocks,
    T* x) {                         // [blocks, 32]
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks)
    return;
  const float scale = e8m0_value(scales[block]);
  const uint4 chunk = reinterpret_cast<const uint4*>(codes)[block];
  uint32_t eight_codes[4];
  memcpy(eight_codes, &chunk, 16);
  Block32 v;
  UNROLL for (int i = 0; i < 32; i++) {
    const uint32_t code = (eight_codes[i / 8] >> (4 * (i % 8))) & 15;
    v[i][0] = e2m1_value(code) * scale;
  }
  store(x + 32 * block, v);
}

// A block of 32 is 64 or 128 bytes. If each thread read its own block from memory, 16 bytes at a
// time, a warp would touch 32 different lines with each instruction, and would write halves of
// sectors. So a warp reads and writes 512 bytes in a row instead, and its blocks wait in shared
// memory in between. There they are 16 bytes further apart than they are long, so that eight
// threads, 16 bytes each, meet all 32 banks.
template <class T>
constexpr int PITCH = 32 * sizeof(T) + 16;

// Calls copy(in memory, in shared memory) for each chunk of 16 bytes of the warp's n blocks that
// this thread copies.
template <class T, class Copy>
__device__ void for_each_chunk(
    T* x,                           // [n, 32]: the warp's blocks in memory
    int n,
    uint8_t* shared,                // [32, PITCH<T>]
    Copy copy) {
  constexpr int CHUNKS = 2 * sizeof(T);         // a block
  constexpr int VALUES = 16 / sizeof(T);        // a chunk
  UNROLL for (int i = 0; i < CHUNKS; i++) {
    const int chunk = 32 * i + threadIdx.x % 32;
    const int block = chunk / CHUNKS;
    if (block < n)
      copy(x + chunk * VALUES, shared + block * PITCH<T> + chunk % CHUNKS * 16);
  }
}

template <class T, class U>
__global__ void unrotate_kernel(
    const T* __restrict__ d,                    // [blocks, 32]
    const int32_t* __restrict__ mask,           // [blocks]: bit i is element i
    int64_t blocks,
    U* __restrict__ x) {                        // [blocks, 32]
  constexpr int MAX_PITCH = PITCH<T> > PITCH<U> ? PITCH<T> : PITCH<U>;
  __shared__ __align__(16) uint8_t memory[THREADS / 32][32 * MAX_PITCH];
  uint8_t* shared = memory[threadIdx.x / 32];   // of this warp
  const int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32;
  const int n = int(min(blocks - first, int64_t(32)));

  for_each_chunk(d + 32 * first, n, shared, [](const T* from, uint8_t* to) {
    *(uint4*)to = *(const uint4*)from;
  });
  const uint32_t block_mask = lane < n ? mask[first + lane] : 0;
  __syncwarp();

  Block32 v;
  load((const T*)(shared + lane * PITCH<T>), v);
  unrotate(v, block_mask);
  __syncwarp();

  store((U*)(shared + lane * PITCH<U>), v);
  __syncwarp();
  for_each_chunk(x + 32 * first, n, shared, [](U* to, const uint8_t* from) {
    *(uint4*)to = *(const uint4*)from;
  });
}

unsigned grid_size(int64_t blocks) { return unsigned(ceil_div(blocks, THREADS)); }

template <class T, class U>
void launch_unrotate(const T* d, const int32_t* mask, int64_t blocks, U* x, cudaStream_t stream) {
  unrotate_kernel<<<grid_size(blocks), THREADS, 0, stream>>>(d, mask, blocks, x);
}

}  // namespace

void dequantize_cuda(
    const uint8_t* codes,           // [M, K/2]
    const uint8_t* scales,          // [M, K/32]
    int64_t M,
    int64_t K,
    FloatMatrix x,                  // [M, K]
    void* stream) {
  const int64_t blocks = M * K / 32;
  if (!blocks)
    return;
  with_dtype(x, [=](auto* values) {
    dequantize_kernel<<<grid_size(blocks), THREADS, 0, (cudaStream_t)stream>>>(
        codes, scales, blocks, values);
  });
}

void unrotate_cuda(
    FloatMatrix d,                  // [M, K]
    const int32_t* mask,            // [M, K/32]
    int64_t M,
    int64_t K,
    FloatMatrix x,                  // [M, K]
    void* stream) {
  const int64_t blocks = M * K / 32;
  if (!blocks)
    return;
  with_dtype(d, [=](auto* from) {
    with_dtype(x, [=](auto* to) {
      launch_unrotate(from, mask, blocks, to, (cudaStream_t)stream);
    });
  });
}
