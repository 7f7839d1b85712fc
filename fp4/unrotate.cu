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

template <class T, class U>
__global__ void unrotate_kernel(const T* __restrict__ d, const int32_t* __restrict__ mask, int64_t blocks, U* __restrict__ x) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks) return;
  Vector v;
  load(d + 32 * block, v);
  unrotate(v, mask[block]);
  store(x + 32 * block, v);
}

unsigned groups(int64_t blocks) { return unsigned((blocks + THREADS - 1) / THREADS); }

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
