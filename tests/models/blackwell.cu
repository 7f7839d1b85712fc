/*
A GEMM of Blackwell as a library for test_blackwell.py (ctypes), and as a program that multiplies
small matrices under compute-sanitizer. GEMM names the function.

    nvcc -DGEMM=gemm_sm120 -DFP4_MODEL -Itests/models -gencode=arch=compute_90a,code=sm_90a \
        tests/models/blackwell.cu fp4/kernels/gemm_sm120.cu fp4/kernels/scale_tiles.cu

The library is built with -shared -Xcompiler -fPIC.
*/
#include <cstdio>
#include <cstring>
#include <vector>
#include "../../fp4/kernels/ops.h"
#include "../../fp4/kernels/scale_tiles.cuh"

extern "C" {

// Both functions return CUDA's message, which is "no error" if all is well.
const char* gemm(const uint8_t* a,                          // [M, K/2]
                 const uint8_t* a_scales,                   // [M, K/32], in tiles
                 const uint8_t* b,                          // [N, K/2]
                 const uint8_t* b_scales,                   // [N, K/32], in tiles
                 int64_t M,
                 int64_t N,
                 int64_t K,
                 float alpha,
                 void* out,                                 // [M, N]
                 bool bf16,
                 void* stream) {
  static char message[200];
  try {
    GEMM(a, a_scales, b, b_scales, M, N, K, alpha, {out, bf16}, stream);
  } catch (const std::exception& error) {
    return strncpy(message, error.what(), sizeof message - 1);
  }
  return cudaGetErrorString(cudaGetLastError());
}

const char* swizzle(const uint8_t* scales,                  // [rows, blocks]
                    int64_t rows,
                    int64_t blocks,
                    uint8_t* out,
                    void* stream) {
  swizzle_scales(scales, rows, blocks, out, stream);
  return cudaGetErrorString(cudaGetLastError());
}

// Applies cvt.rn.satfinite.e2m1x2, the instruction itself, to every BF16 number i: out[i] has its
// code in the lower half and that of -i in the upper half. Without the instruction it does
// nothing.
__global__ void convert_kernel(uint8_t* out) {
#ifndef FP4_MODEL
  const uint32_t i = blockIdx.x * 256 + threadIdx.x;
  const float x = mxfp4::float_of(i << 16);
  uint16_t pair;
  asm("{ .reg .b8 pair;\n"
      "cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2;\n"
      "cvt.u16.u8 %0, pair; }"
      : "=h"(pair)
      : "f"(-x), "f"(x));
  out[i] = uint8_t(pair);
#endif
}

const char* convert(uint8_t* out) {
  convert_kernel<<<256, 256>>>(out);
  return cudaGetErrorString(cudaDeviceSynchronize());
}

}  // extern "C"

static uint32_t random_bits() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return uint32_t(state >> 33);
}

// A random matrix on the GPU, and its values on the CPU.
struct Matrix {
  std::vector<double> values;
  uint8_t* codes;
  uint8_t* scales;                                          // in tiles

  Matrix(int64_t rows, int64_t K) : values(rows * K) {
    std::vector<uint8_t> code_bytes(rows * K / 2);
    std::vector<uint8_t> scale_bytes(rows * K / 32);
    for (uint8_t& byte : code_bytes)
      byte = uint8_t(random_bits());
    for (uint8_t& byte : scale_bytes)
      byte = uint8_t(126 + random_bits() % 3);
    for (int64_t i = 0; i < rows * K; i++) {
      const int code = (code_bytes[i / 2] >> (i % 2 * 4)) & 15;
      values[i] = double(mxfp4::e2m1_value(code)) * mxfp4::e8m0_value(scale_bytes[i / 32]);
    }

    uint8_t* row_major_scales;
    cudaMalloc(&codes, code_bytes.size());
    cudaMalloc(&row_major_scales, scale_bytes.size());
    cudaMalloc(&scales, mxfp4::scale_tiles_bytes(rows, K / 32));
    cudaMemcpy(codes, code_bytes.data(), code_bytes.size(), cudaMemcpyHostToDevice);
    cudaMemcpy(row_major_scales, scale_bytes.data(), scale_bytes.size(), cudaMemcpyHostToDevice);
    swizzle_scales(row_major_scales, rows, K / 32, scales, nullptr);
    cudaFree(row_major_scales);
  }

  ~Matrix() {
    cudaFree(codes);
    cudaFree(scales);
  }
};

// Counts the elements of out [M, N] that are not exactly half of a @ b.T.
static int count_differences(const std::vector<float>& out, const Matrix& a, const Matrix& b,
                             int64_t M, int64_t N, int64_t K) {
  int different = 0;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      double sum = 0;
      for (int64_t k = 0; k < K; k++)
        sum += a.values[m * K + k] * b.values[n * K + k];
      different += !(out[m * N + n] == float(.5 * sum));
    }
  return different;
}

int main() {
  const int64_t shapes[][3] = {{1, 1, 32}, {130, 37, 1184}, {5, 300, 96}};
  bool failed = false;
  for (const auto& [M, N, K] : shapes) {
    const Matrix a(M, K);
    const Matrix b(N, K);
    std::vector<float> result(M * N);
    float* out;
    cudaMalloc(&out, M * N * sizeof(float));
    const char* launch = gemm(a.codes, a.scales, b.codes, b.scales, M, N, K, .5f,
                              out, false, nullptr);
    cudaMemcpy(result.data(), out, M * N * sizeof(float), cudaMemcpyDeviceToHost);
    const char* after = cudaGetErrorString(cudaGetLastError());
    cudaFree(out);
    const int different = count_differences(result, a, b, M, N, K);
    printf("M %lld N %lld K %lld: %s, %s, %d of %lld differ\n",
           (long long)M, (long long)N, (long long)K, launch, after, different, (long long)(M * N));
    failed |= different || strcmp(launch, "no error") || strcmp(after, "no error");
  }
  return failed;
}
