/*
The ops on a GPU, byte for byte those of reference.py. A thread owns a block of 32 values, from the first load to
the packed bytes: 16 of codes, one of scale, 4 of mask. All are bound by memory; -fmad=false, see mxfp4.cuh.

    quantize_forward    x -> codes, scales, mask                     one read of x
    quantize_backward   dy -> codes, scales, and those of dy.T       one read of dy: a tile of 32 rows waits in shared memory,
                                                                     each thread takes a block of a row, then one of a column
    requantize          packed x -> packed x.T                       the same for packed input; nothing wider than a byte is stored
    unrotate            (d * mask) H
    fold                packed -> FP8, exactly, for tensor cores without FP4

    nvcc -O3 -fmad=false -gencode arch=compute_90a,code=sm_90a -c quantize.cu
*/
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <type_traits>
#include "mxfp4.cuh"
#include "ops.h"

using namespace mxfp4;

namespace {

constexpr int THREADS = 256, TILE = 256;                                   // TILE columns of 32 rows, one a thread

// ---- 32 values of memory <-> registers, 16 bytes at a time

__device__ void load(const bfloat16* x, Block<1>& v) {
  UNROLL for (int i = 0; i < 4; i++) {
    const uint4 q = reinterpret_cast<const uint4*>(x)[i];
    const uint32_t pair[4] = {q.x, q.y, q.z, q.w};
    UNROLL for (int j = 0; j < 4; j++)
      v[8 * i + 2 * j][0] = float_of(pair[j] << 16), v[8 * i + 2 * j + 1][0] = float_of(pair[j] & 0xFFFF0000u);
  }
}

__device__ void load(const float* x, Block<1>& v) {
  UNROLL for (int i = 0; i < 8; i++) {
    const float4 q = reinterpret_cast<const float4*>(x)[i];
    v[4 * i][0] = q.x, v[4 * i + 1][0] = q.y, v[4 * i + 2][0] = q.z, v[4 * i + 3][0] = q.w;
  }
}

__device__ void store(float* x, const Block<1>& v) {
  UNROLL for (int i = 0; i < 8; i++)
    reinterpret_cast<float4*>(x)[i] = make_float4(v[4 * i][0], v[4 * i + 1][0], v[4 * i + 2][0], v[4 * i + 3][0]);
}

__device__ void store(bfloat16* x, const Block<1>& v) {
  UNROLL for (int i = 0; i < 4; i++) {
    uint32_t pair[4];
    UNROLL for (int j = 0; j < 4; j++) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(v[8 * i + 2 * j][0], v[8 * i + 2 * j + 1][0]);
      memcpy(&pair[j], &two, 4);
    }
    reinterpret_cast<uint4*>(x)[i] = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
}

// ---- a block: registers -> packed

__device__ void pack(const Block<1>& u, bool keep, uint4* codes) {         // RTN; 0 where not kept
  uint32_t word[4] = {};
  UNROLL for (int i = 0; i < 32; i++) word[i / 8] |= uint32_t(round_nearest(u[i][0]) | sign_bit(u[i][0])) << 4 * (i % 8);
  *codes = keep ? make_uint4(word[0], word[1], word[2], word[3]) : make_uint4(0, 0, 0, 0);
}

__device__ void pack_stochastic(const Block<1>& u, bool keep, uint64_t seed, int64_t block, uint4* codes) {
  uint32_t word[4] = {}, noise[2][4];
  philox(seed, 2 * block, noise[0]), philox(seed, 2 * block + 1, noise[1]);
  UNROLL for (int i = 0; i < 32; i++) {
    const int byte = noise[i / 16][i / 4 % 4] >> 8 * (i % 4) & 255;
    word[i / 8] |= uint32_t(round_stochastic(u[i][0], byte) | sign_bit(u[i][0])) << 4 * (i % 8);
  }
  *codes = keep ? make_uint4(word[0], word[1], word[2], word[3]) : make_uint4(0, 0, 0, 0);
}

template <bool stochastic>
__device__ void absmax(Block<1>& v, const Backward& how, uint64_t seed, int64_t block, uint8_t* codes, uint8_t* scales) {
  const uint32_t signs = uint32_t(*how.signs);
  float m[1];
  if (!how.signs_after) flip(v, signs);
  hadamard(v);
  if (how.signs_after) flip(v, signs);
  largest(v, m);
  const int e = absmax_exponent(m[0]);
  const float factor = .75f * pow2(-e);
  UNROLL for (int i = 0; i < 32; i++) v[i][0] *= factor;
  const bool keep = m[0] > 0 && finite(m[0]);
  uint4* to = reinterpret_cast<uint4*>(codes) + block;
  if (stochastic) pack_stochastic(v, keep, seed, block, to); else pack(v, keep, to);
  scales[block] = finite(m[0]) ? e + 127 : 255;
}

// ---- kernels

template <class T>
__global__ void forward_kernel(const T* x, int64_t blocks, bool nearest, uint8_t* codes, uint8_t* scales, int32_t* mask) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks) return;
  Block<1> v;
  float t[1];
  load(x + 32 * block, v);
  hadamard(v);
  quest(v, t);
  const bool ok = finite(t[0]);
  const int e = quest_exponent(t[0], nearest);
  const float inverse = pow2(-e);
  uint32_t inside = 0;
  UNROLL for (int i = 0; i < 32; i++) {
    v[i][0] *= inverse;
    inside = inside >> 1 | (bits_of(fabsf(v[i][0]) - 6) & 0x80000000u);    // the sign of |u| - 6; bit i after 32 steps
  }
  pack(v, ok, reinterpret_cast<uint4*>(codes) + block);
  scales[block] = ok ? e + 127 : 255;
  mask[block] = ok ? inside : 0;
}

template <class T, bool stochastic>
__global__ void backward_kernel(const T* x, int64_t M, int64_t K, Backward how, const int64_t* seeds,
                                uint8_t* codes, uint8_t* scales, uint8_t* codes_t, uint8_t* scales_t) {
  constexpr int N = 16 / sizeof(T), VECTORS = TILE / N;                    // 16 bytes are N values
  __shared__ __align__(16) T tile[32][TILE + N];                           // N more, so that 8 rows lie in different banks
  const int64_t m0 = int64_t(blockIdx.x) * 32, k0 = int64_t(blockIdx.y) * TILE;
  for (int i = threadIdx.x; i < 32 * VECTORS; i += THREADS) {
    const int row = i / VECTORS, at = i % VECTORS * N;
    uint4 q = make_uint4(0, 0, 0, 0);                                      // rows beyond M are 0
    if (m0 + row < M && k0 + at < K) q = *reinterpret_cast<const uint4*>(x + (m0 + row) * K + k0 + at);
    *reinterpret_cast<uint4*>(&tile[row][at]) = q;
  }
  __syncthreads();
  Block<1> v;
  const int row = threadIdx.x % 32, at = threadIdx.x / 32 * 32;
  if (m0 + row < M && k0 + at < K) {
    load(&tile[row][at], v);
    absmax<stochastic>(v, how, seeds[0], ((m0 + row) * K + k0 + at) / 32, codes, scales);
  }
  const int64_t k = k0 + threadIdx.x;
  if (k < K) {
    UNROLL for (int i = 0; i < 32; i++) v[i][0] = get(tile[i][threadIdx.x]);
    absmax<stochastic>(v, how, seeds[1], k * gridDim.x + blockIdx.x, codes_t, scales_t);
  }
}

template <bool stochastic>
__global__ void requantize_kernel(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how,
                                  const int64_t* seed, uint8_t* codes_t, uint8_t* scales_t) {
  __shared__ __align__(16) uint8_t tile[32][TILE / 2];
  __shared__ float scale[32][TILE / 32];
  const int64_t m0 = int64_t(blockIdx.x) * 32, k0 = int64_t(blockIdx.y) * TILE;
  const int row = threadIdx.x / 8, at = threadIdx.x % 8;                   // a thread loads a block
  const bool inside = m0 + row < M && k0 + 32 * at < K;
  const int64_t block = ((m0 + row) * K + k0) / 32 + at;
  const uint4 q = inside ? reinterpret_cast<const uint4*>(codes)[block] : make_uint4(0, 0, 0, 0);
  *reinterpret_cast<uint4*>(&tile[row][16 * at]) = q;
  scale[row][at] = inside ? scale_of(scales[block]) : 0;
  __syncthreads();
  const int64_t k = k0 + threadIdx.x;
  if (k >= K) return;
  Block<1> v;
  UNROLL for (int i = 0; i < 32; i++)
    v[i][0] = value(tile[i][threadIdx.x / 2] >> 4 * (threadIdx.x % 2) & 15) * scale[i][threadIdx.x / 32];
  absmax<stochastic>(v, how, *seed, k * gridDim.x + blockIdx.x, codes_t, scales_t);
}

template <class T>
__global__ void dequantize_kernel(const uint8_t* codes, const uint8_t* scales, int64_t blocks, T* x) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks) return;
  const float s = scale_of(scales[block]);
  const uint4 q = reinterpret_cast<const uint4*>(codes)[block];
  const uint32_t word[4] = {q.x, q.y, q.z, q.w};
  Block<1> v;
  UNROLL for (int i = 0; i < 32; i++) v[i][0] = value(word[i / 8] >> 4 * (i % 8) & 15) * s;
  store(x + 32 * block, v);
}

template <class T, class U>
__global__ void unrotate_kernel(const T* d, const int32_t* mask, int64_t blocks, U* x) {
  const int64_t block = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (block >= blocks) return;
  Block<1> v;
  load(d + 32 * block, v);
  const uint32_t inside = mask[block];
  UNROLL for (int i = 0; i < 32; i++) v[i][0] *= inside >> i & 1 ? 1.f : 0.f;   // not a selection: NaN * 0 stays NaN
  hadamard(v);
  store(x + 32 * block, v);
}

// A row's largest block exponent goes into the row's scale; what is left, 2^s * E2M1, is E4M3 without rounding for s in
// [-8, 6]. Blocks more than 14 octaves below the largest round. A CUDA block takes a row
__global__ void fold_kernel(const uint8_t* codes, const uint8_t* scales, int64_t K, float alpha, uint8_t* fp8, float* row_scales) {
  __shared__ int top;
  const int64_t first = int64_t(blockIdx.x) * (K / 32), end = first + K / 32;
  if (threadIdx.x == 0) top = 0;
  __syncthreads();
  for (int64_t b = first + threadIdx.x; b < end; b += blockDim.x) {
    const uint4 q = reinterpret_cast<const uint4*>(codes)[b];
    const bool zero = ((q.x | q.y | q.z | q.w) & 0x77777777u) == 0;        // its scale byte says nothing
    if (scales[b] != 255 && !zero) atomicMax(&top, scales[b]);
  }
  __syncthreads();
  for (int64_t b = first + threadIdx.x; b < end; b += blockDim.x) {
    const uint4 q = reinterpret_cast<const uint4*>(codes)[b];
    const uint32_t word[4] = {q.x, q.y, q.z, q.w};
    const float s = scales[b] == 255 ? scale_of(255) : pow2(clamp_exponent(min(scales[b] - top, 0) + 6));
    uint32_t out[8];
    UNROLL for (int i = 0; i < 8; i++) {
      const auto v = [&](int j) { return value(word[i / 2] >> 4 * (4 * (i % 2) + j) & 15) * s; };
      out[i] = __nv_cvt_float2_to_fp8x2(make_float2(v(0), v(1)), __NV_SATFINITE, __NV_E4M3) |
               uint32_t(__nv_cvt_float2_to_fp8x2(make_float2(v(2), v(3)), __NV_SATFINITE, __NV_E4M3)) << 16;
    }
    reinterpret_cast<uint4*>(fp8)[2 * b] = make_uint4(out[0], out[1], out[2], out[3]);
    reinterpret_cast<uint4*>(fp8)[2 * b + 1] = make_uint4(out[4], out[5], out[6], out[7]);
  }
  if (threadIdx.x == 0) row_scales[blockIdx.x] = ldexpf(alpha, top - 127 - 6);
}

// ---- launches

template <class F> void typed(Values x, F f) { x.bf16 ? f((bfloat16*)x.data) : f((float*)x.data); }
unsigned groups(int64_t n, int64_t size) { return unsigned((n + size - 1) / size); }

void quantize_forward(Values x, int64_t M, int64_t K, bool nearest, uint8_t* codes, uint8_t* scales, int32_t* mask, void* stream) {
  const int64_t blocks = M * K / 32;
  if (!blocks) return;
  typed(x, [=](auto* x) { forward_kernel<<<groups(blocks, THREADS), THREADS, 0, (cudaStream_t)stream>>>(x, blocks, nearest, codes, scales, mask); });
}

void quantize_backward(Values x, int64_t M, int64_t K, Backward how, const int64_t* seeds,
                       uint8_t* codes, uint8_t* scales, uint8_t* codes_t, uint8_t* scales_t, void* stream) {
  const dim3 grid(groups(M, 32), groups(K, TILE));
  if (!M || !K) return;
  typed(x, [=](auto* x) {
    using T = std::remove_pointer_t<decltype(x)>;
    auto kernel = how.stochastic ? backward_kernel<T, true> : backward_kernel<T, false>;
    kernel<<<grid, THREADS, 0, (cudaStream_t)stream>>>(x, M, K, how, seeds, codes, scales, codes_t, scales_t);
  });
}

void requantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how, const int64_t* seed,
                uint8_t* codes_t, uint8_t* scales_t, void* stream) {
  if (!M || !K) return;
  auto kernel = how.stochastic ? requantize_kernel<true> : requantize_kernel<false>;
  kernel<<<dim3(groups(M, 32), groups(K, TILE)), THREADS, 0, (cudaStream_t)stream>>>(codes, scales, M, K, how, seed, codes_t, scales_t);
}

void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x, void* stream) {
  const int64_t blocks = M * K / 32;
  if (!blocks) return;
  typed(x, [=](auto* x) { dequantize_kernel<<<groups(blocks, THREADS), THREADS, 0, (cudaStream_t)stream>>>(codes, scales, blocks, x); });
}

void unrotate(Values d, const int32_t* mask, int64_t M, int64_t K, Values x, void* stream) {
  const int64_t blocks = M * K / 32;
  if (!blocks) return;
  typed(d, [=](auto* d) { typed(x, [=](auto* x) {
    unrotate_kernel<<<groups(blocks, THREADS), THREADS, 0, (cudaStream_t)stream>>>(d, mask, blocks, x);
  }); });
}

}  // namespace

const Ops cuda = {quantize_forward, quantize_backward, requantize, dequantize, unrotate};

void fold(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, float alpha, uint8_t* fp8, float* row_scales, void* stream) {
  if (M) fold_kernel<<<unsigned(M), 128, 0, (cudaStream_t)stream>>>(codes, scales, K, alpha, fp8, row_scales);
}
