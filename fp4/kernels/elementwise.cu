/*
Two plain passes, a thread a block of 32: packed -> values, and a gradient (d * mask) H back from the rotated basis.
*/
#include "cuda.cuh"
#include "ops.h"

namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void dequantize_kernel(const uint8_t* codes, const uint8_t* scales, int64_t blocks, T* x) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks) return;
  const float s = scale_of(scales[block]);
  const uint4 q = reinterpret_cast<const uint4*>(codes)[block];
  const uint32_t word[4] = {q.x, q.y, q.z, q.w};
  Vector v;
  UNROLL for (int i = 0; i < 32; i++) v[i][0] = value(word[i / 8] >> 4 * (i % 8) & 15) * s;
  store(x + 32 * block, v);
}

// A thread's block is 64 or 128 bytes: 16 of them at a time, a warp would touch 32 lines, and write halves of sectors. So it reads and
// writes 512 bytes in a row, and blocks wait in its part of shared memory, 16 bytes apart so that 8 threads meet 32 banks
template <class T> constexpr int PITCH = 32 * sizeof(T) + 16;

// 16 bytes of the n blocks from x on, of a thread and step: f(where in memory, where in shared memory)
template <class T, class F> __device__ void chunks(T* x, int n, uint8_t* shared, F f) {
  constexpr int CHUNKS = 2 * sizeof(T);
  UNROLL for (int i = 0; i < CHUNKS; i++) {
    const int at = 32 * i + threadIdx.x % 32, block = at / CHUNKS;
    if (block < n) f(x + at * (16 / int(sizeof(T))), shared + block * PITCH<T> + at % CHUNKS * 16);
  }
}

template <class T, class U>
__global__ void unrotate_kernel(const T* __restrict__ d, const int32_t* __restrict__ mask, int64_t blocks, U* __restrict__ x) {
  __shared__ __align__(16) uint8_t waiting[THREADS / 32][32 * (PITCH<T> > PITCH<U> ? PITCH<T> : PITCH<U>)];
  uint8_t* shared = waiting[threadIdx.x / 32];
  const int64_t first = int64_t(blockIdx.x) * THREADS + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32, n = int(min(blocks - first, int64_t(32)));
  Vector v;
  chunks(d + 32 * first, n, shared, [](const T* from, uint8_t* to) { *(uint4*)to = *(const uint4*)from; });
  const uint32_t inside = lane < n ? mask[first + lane] : 0;
  __syncwarp();
  load((const T*)(shared + lane * PITCH<T>), v);
  unrotate(v, inside);
  __syncwarp();
  store((U*)(shared + lane * PITCH<U>), v);
  __syncwarp();
  chunks(x + 32 * first, n, shared, [](U* to, const uint8_t* from) { *(uint4*)to = *(const uint4*)from; });
}

unsigned groups(int64_t blocks) { return unsigned(ceil_div(blocks, THREADS)); }

}  // namespace

void dequantize_cuda(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x, void* stream) {
  const int64_t blocks = M * K / 32;
  if (blocks) typed(x, [=](auto* x) {
    dequantize_kernel<<<groups(blocks), THREADS, 0, (cudaStream_t)stream>>>(codes, scales, blocks, x);
  });
}

void unrotate_cuda(Values d, const int32_t* mask, int64_t M, int64_t K, Values x, void* stream) {
  const int64_t blocks = M * K / 32;
  if (blocks) typed(d, [=](auto* d) { typed(x, [=](auto* x) {
    unrotate_kernel<<<groups(blocks), THREADS, 0, (cudaStream_t)stream>>>(d, mask, blocks, x);
  }); });
}
