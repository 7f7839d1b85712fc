/*
What bind.cpp calls, once its checks are done: the same functions for the CPU (cpu.cpp) and, later, CUDA.
Raw pointers, contiguous row-major matrices; K is a multiple of 32, M is any number, Mp = M rounded up to 32.
*/
#pragma once
#include <cstdint>

struct Values { void* data; bool bf16; };                     // float32 or bfloat16

struct Backward {                                             // how the backward quantiser works
  uint32_t signs;                                             // bit i set: negate element i of each block
  bool signs_after, stochastic;
};

namespace cpu {

void quantize_forward(Values x,                               // [M, K]
                      int64_t M, int64_t K, bool nearest,
                      uint8_t* codes,                         // [M, K/2]
                      uint8_t* scales,                        // [M, K/32]
                      int32_t* mask);                         // [M, K/32], bit i is element i

void quantize_backward(Values x, int64_t M, int64_t K, Backward how, const int64_t* seeds,       // 2
                       uint8_t* codes, uint8_t* scales,       // [M, K/2], [M, K/32]
                       uint8_t* codes_t, uint8_t* scales_t);  // [K, Mp/2], [K, Mp/32]

void requantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how, const int64_t* seed,
                uint8_t* codes_t, uint8_t* scales_t);

void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x);

void unrotate(Values d, const int32_t* mask, int64_t M, int64_t K, Values x);

void scale(const float* c, int64_t n, float alpha, Values out);

}  // namespace cpu
