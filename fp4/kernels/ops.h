/*
What bind.cpp calls, once its checks are done: one table of functions for the CPU (cpu.cpp), one for CUDA (quantize.cu).
Raw pointers, contiguous row-major matrices; K is a multiple of 32, M is any number, Mp is M rounded up to 32.
*/
#pragma once
#include <cstdint>
#include "mxfp4.cuh"

struct Values { void* data; bool bf16; };                     // float32 or bfloat16
template <class F> void typed(Values x, F f) { x.bf16 ? f((mxfp4::bfloat16*)x.data) : f((float*)x.data); }

// an operand of a product: packed; packed, the scales in tiles (scale_tiles.cuh); FP8 tiles (tiles.cuh). All but packed on a GPU only
enum class Format { packed, mxf4, left, right };

enum class Turn { before, after, none };                      // a block: random signs, then the Hadamard; the opposite; neither
struct Backward {                                             // how the backward quantiser works
  const int64_t* signs;                                       // low 32 bits; bit i set: negate element i of each block
  Turn rows, columns;                                         // of x and of x.T
  bool stochastic;
  Format format;                                              // of the operands it makes
};

struct Ops {
  void (*quantize_forward)(Values x,                          // [M, K]
                           int64_t M, int64_t K, bool nearest,
                           uint8_t* codes,                    // [M, K/2]
                           uint8_t* scales,                   // [M, K/32]
                           int32_t* mask,                     // [M, K/32], bit i is element i
                           void* stream);
  void (*quantize_backward)(Values x, int64_t M, int64_t K, Backward how, const int64_t* seeds,       // 2 seeds
                            void* values, void* scales,       // codes [M, K/2] and scales [M, K/32], if packed
                            void* values_t, void* scales_t,   // codes [K, Mp/2] and scales [K, Mp/32], likewise
                            void* stream);
  void (*requantize)(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Backward how, const int64_t* seed,
                     void* values_t, void* scales_t, void* stream);
  void (*dequantize)(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x, void* stream);
  void (*unrotate)(Values d, const int32_t* mask, int64_t M, int64_t K, Values x, void* stream);
};

extern const Ops cpu, cuda;
void scale(const float* c, int64_t n, float alpha, Values out);                     // CPU: out = alpha * c

// GPU only: unrotate.cu, quantize.cu, fold.cu, gemm_sm90.cu
void dequantize_cuda(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, Values x, void* stream);
void unrotate_cuda(Values d, const int32_t* mask, int64_t M, int64_t K, Values x, void* stream);
void quantize_forward_operand(Values x, int64_t M, int64_t K, bool nearest, uint8_t* codes, uint8_t* scales, int32_t* mask,
                              Format format,                  // mxf4: the scales once more, in tiles; or left
                              void* values, void* tile_scales, void* stream);
void fold(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, float alpha,              // [M, K] packed
          uint8_t* fp8, float* row_scales, void* stream);                                             // [M, K], [M]
void fold_tiles(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, bool right, void* values, float* tile_scales, void* stream);
int gemm_sm90_splits(int64_t M, int64_t N, int64_t K);
void gemm_sm90(const uint8_t* a, const float* a_scales, const uint8_t* b, const float* b_scales, int64_t M, int64_t N, int64_t K, float alpha,
               const int32_t* mask,                           // [M, N/32]: un-rotate with it; nullptr: do not
               float* partial,                                // [splits, M up to a multiple of 16, N] when splits > 1
               int splits, Values out, void* stream);         // out [M, N] = alpha * a @ b.T
using Gemm = void(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b, const uint8_t* b_scales, int64_t M, int64_t N, int64_t K,
                  float alpha, Values out, void* stream);         // out [M, N] = alpha * a @ b.T
Gemm gemm_plain;                                              // any GPU, packed operands
Gemm gemm_sm100, gemm_sm120;                                  // Blackwell, scales in the tiles of scale_tiles.cuh, which swizzle.cu makes
void swizzle_scales(const uint8_t* scales, int64_t rows, int64_t blocks, uint8_t* out, void* stream);
const char* launch_error();                                   // of the last launch, or nullptr
