/*
One of Blackwell's products as a library for test_blackwell.py (ctypes), and as a program on small matrices for compute-sanitizer.

    nvcc -DGEMM=gemm_sm120 -DFP4_MODEL -Itests -gencode=arch=compute_90a,code=sm_90a \
        tests/blackwell.cu fp4/gemm_sm120.cu fp4/swizzle.cu             # -shared -Xcompiler -fPIC
*/
#include <cstdio>
#include <cstring>
#include <vector>
#include "../fp4/ops.h"
#include "../fp4/scale_tiles.cuh"

void GEMM(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales,
          int64_t M, int64_t N, int64_t K, float alpha, Values out, void* stream);
void swizzle_scales(const uint8_t* scales, int64_t rows, int64_t blocks, uint8_t* out, void* stream);

extern "C" {

const char* gemm(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales,
                 int64_t M, int64_t N, int64_t K, float alpha, void* out, bool bf16, void* stream) {
  static char message[200];
  try {
    GEMM(a, a_scales, b, b_scales, M, N, K, alpha, {out, bf16}, stream);
  } catch (const std::exception& error) {
    return strncpy(message, error.what(), sizeof message - 1);
  }
  return cudaGetErrorString(cudaGetLastError());                           // "no error"
}

const char* swizzle(const uint8_t* scales, int64_t rows, int64_t blocks, uint8_t* out, void* stream) {
  swizzle_scales(scales, rows, blocks, out, stream);
  return cudaGetErrorString(cudaGetLastError());
}

// cvt.rn.satfinite.e2m1x2 of every BF16 i, and in the upper half of the byte of -i: the instruction, where there is one
__global__ void convert_kernel(uint8_t* out) {
#ifndef FP4_MODEL
  const uint32_t i = blockIdx.x * 256 + threadIdx.x;
  const float x = mxfp4::float_of(i << 16);
  uint16_t pair;
  asm("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, %1, %2; cvt.u16.u8 %0, pair; }" : "=h"(pair) : "f"(-x), "f"(x));
  out[i] = uint8_t(pair);
#endif
}

const char* convert(uint8_t* out) {
  convert_kernel<<<256, 256>>>(out);
  return cudaGetErrorString(cudaDeviceSynchronize());
}

}

static uint32_t random_bits() {
  static uint64_t state = 1;
  return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 33);
}

struct Matrix {                                                            // random, and its values
  int64_t rows, K;
  std::vector<double> values;
  uint8_t *codes, *scales;
  Matrix(int64_t rows, int64_t K) : rows(rows), K(K), values(rows * K) {
    std::vector<uint8_t> c(rows * K / 2), s(rows * K / 32);
    for (uint8_t& x : c) x = uint8_t(random_bits());
    for (uint8_t& x : s) x = uint8_t(126 + random_bits() % 3);
    for (int64_t i = 0; i < rows * K; i++) values[i] = double(mxfp4::value(c[i / 2] >> i % 2 * 4 & 15)) * mxfp4::scale_of(s[i / 32]);
    uint8_t* plain;
    cudaMalloc(&codes, c.size()), cudaMalloc(&plain, s.size()), cudaMalloc(&scales, mxfp4::tiled_bytes(rows, K / 32));
    cudaMemcpy(codes, c.data(), c.size(), cudaMemcpyHostToDevice), cudaMemcpy(plain, s.data(), s.size(), cudaMemcpyHostToDevice);
    swizzle_scales(plain, rows, K / 32, scales, nullptr);
    cudaFree(plain);
  }
};

int main() {
  const int64_t shapes[][3] = {{1, 1, 32}, {130, 37, 1184}, {5, 300, 96}};
  int wrong = 0;
  for (const auto& [M, N, K] : shapes) {
    const Matrix a(M, K), b(N, K);
    std::vector<float> got(M * N);
    float* out;
    cudaMalloc(&out, M * N * sizeof(float));
    const char* state = gemm(a.codes, a.scales, b.codes, b.scales, M, N, K, .5f, out, false, nullptr);
    cudaMemcpy(got.data(), out, M * N * sizeof(float), cudaMemcpyDeviceToHost);
    const char* after = cudaGetErrorString(cudaGetLastError());
    int different = 0;
    for (int64_t m = 0; m < M; m++)
      for (int64_t n = 0; n < N; n++) {
        double sum = 0;
        for (int64_t k = 0; k < K; k++) sum += a.values[m * K + k] * b.values[n * K + k];
        different += !(got[m * N + n] == float(.5 * sum));
      }
    printf("M %lld N %lld K %lld: %s, %s, %d of %lld differ\n", (long long)M, (long long)N, (long long)K, state, after, different, (long long)(M * N));
    wrong += different + strcmp(state, "no error") + strcmp(after, "no error");
    cudaFree(out), cudaFree(a.codes), cudaFree(a.scales), cudaFree(b.codes), cudaFree(b.scales);
  }
  return wrong != 0;
}
