/*
What bind.cpp calls, once its checks are done: one table of functions for the CPU (cpu.cpp), one for CUDA (quantize.cu).
Raw pointers, contiguous row-major matrices; K is a multiple of 32, M is any number, Mp is M rounded up to 32.
*/
#pragma once
#include <cstdint>

struct Values { void* data; bool bf16; };                     // float32 or bfloat16

struct Backward {                                             // how the backward quantiser works
  const int64_t* signs;                                       // low 32 bits; bit i set: negate element i of each block
  bool signs_after, stochastic;
};

struct Ops {
  void (*quantize_forward)(Values x,                          // [M, K]
                           int64_t M, int64_t K, bool nearest,
                           uint8_t* codes,                    // [M, K/2]
                           uint8_t* scales,                   // [M, K/32]
                           int32_t* mask,                     // [M, K/32], bit i is element i
                           void* stream);
  void (*quantize_backward)(Values x, int64_t M, int64_t K, Backward how, const int64_t* seeds,       // 2 seeds
                            uint8_t* codes, uint8_t* scales,  // [M, K/2], [M, K/32]
                            uint8_t* codes_t, uint8_t* scales_t,                                      // [K, Mp/2], [K, Mp/32]
                            void* stream);
  void (*requantize)(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how, const int64_t* seed,
                     uint8_t* codes_t, uint8_t* scales_t, void* stream);
  void (*dequantize)(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x, void* stream);
  void (*unrotate)(Values d, const int32_t* mask, int64_t M, int64_t K, Values x, void* stream);
};

extern const Ops cpu, cuda;
void scale(const float* c, int64_t n, float alpha, Values out);                     // CPU: out = alpha * c
void fold(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, float alpha,              // CUDA: see quantize.cu
          uint8_t* fp8, float* row_scales, void* stream);
