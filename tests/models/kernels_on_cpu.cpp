/*
The functions of our kernels, with arguments that ctypes can pass. A `format` is an OperandFormat,
a `sign_order` a SignOrder of ops.h.
*/
#include "cuda_on_cpu.h"
#include "ops.h"
#include "round.cuh"

extern "C" {

void quantize_forward(void* x, bool is_bf16, int64_t M, int64_t K, bool nearest,
                      uint8_t* codes, uint8_t* scales, int32_t* mask,
                      int format, void* values, void* tile_scales) {
  if (OperandFormat(format) == OperandFormat::packed)
    cuda_ops.quantize_forward({x, is_bf16}, M, K, nearest, codes, scales, mask, nullptr);
  else
    quantize_forward_operand({x, is_bf16}, M, K, nearest, codes, scales, mask,
                             OperandFormat(format), values, tile_scales, nullptr);
}

void quantize_backward(void* x, bool is_bf16, int64_t M, int64_t K, const int64_t* signs,
                       const int64_t* seeds, bool stochastic, int sign_order, int sign_order_t,
                       int format, void* values, void* scales, void* values_t, void* scales_t) {
  const BackwardParams params = {signs, SignOrder(sign_order), SignOrder(sign_order_t), stochastic,
                                 OperandFormat(format)};
  cuda_ops.quantize_backward({x, is_bf16}, M, K, params, seeds, values, scales, values_t, scales_t,
                             nullptr);
}

void requantize_transposed(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K,
                           const int64_t* signs, const int64_t* seed, bool stochastic,
                           int sign_order, int format, void* values_t, void* scales_t) {
  const BackwardParams params = {signs, SignOrder::none, SignOrder(sign_order), stochastic,
                                 OperandFormat(format)};
  cuda_ops.requantize_transposed(codes, scales, M, K, params, seed, values_t, scales_t, nullptr);
}

void dequantize(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, void* x,
                bool is_bf16) {
  cuda_ops.dequantize(codes, scales, M, K, {x, is_bf16}, nullptr);
}

void unrotate(void* d, bool is_bf16, const int32_t* mask, int64_t M, int64_t K, void* x,
              bool x_is_bf16) {
  cuda_ops.unrotate({d, is_bf16}, mask, M, K, {x, x_is_bf16}, nullptr);
}

void matvec(const uint8_t* x, const uint8_t* x_scales, const uint8_t* w, const uint8_t* w_scales,
            int64_t M, int64_t N, int64_t K, void* y, bool is_bf16) {
  cuda_ops.matvec(x, x_scales, w, w_scales, M, N, K, {y, is_bf16}, nullptr);
}

void to_fp8_tiles(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, bool right,
                  void* values, float* tile_scales) {
  packed_to_fp8_tiles(codes, scales, M, K, right, values, tile_scales, nullptr);
}

void to_fp8_rows(const uint8_t* codes, const uint8_t* scales, int64_t M, int64_t K, float alpha,
                 uint8_t* fp8, float* row_scales) {
  packed_to_fp8_rows(codes, scales, M, K, alpha, fp8, row_scales, nullptr);
}

void swizzle(const uint8_t* scales, int64_t rows, int64_t blocks, uint8_t* out) {
  swizzle_scales(scales, rows, blocks, out, nullptr);
}

// Rounds n blocks of 32 values to codes, 16 bytes a block; stochastically if there is a seed.
void round_blocks(const float* u, int64_t n, bool clips, const int64_t* seed, uint8_t* codes) {
  for (int64_t i = 0; i < n; i++) {
    Block32 v;
    memcpy(v, u + 32 * i, sizeof(v));
    uint4 packed;
    if (seed) {
      Fp16Pairs pairs;
      round_stochastically(v, FP16_UNIT, *seed, i, pairs);
      packed = fp16_to_codes(pairs);
    } else {
      packed = clips ? nearest_codes<true>(v, NEAREST_UNIT) : nearest_codes<false>(v, NEAREST_UNIT);
    }
    memcpy(codes + 16 * i, &packed, 16);
  }
}

void multiply_fp32(const uint8_t* a, const uint8_t* a_scales, const uint8_t* b,
                   const uint8_t* b_scales, int64_t M, int64_t N, int64_t K, float alpha,
                   void* out, bool is_bf16) {
  gemm_fp32(a, a_scales, b, b_scales, M, N, K, alpha, {out, is_bf16}, nullptr);
}

void multiply_sm90(const uint8_t* a, const float* a_scales, const uint8_t* b,
                   const float* b_scales, int64_t M, int64_t N, int64_t K, float alpha,
                   const int32_t* mask, float* partial, int64_t splits, void* out, bool is_bf16) {
  cluster_size = 2;
  gemm_sm90(a, a_scales, b, b_scales, M, N, K, alpha, mask, partial, int(splits), {out, is_bf16},
            nullptr);
  cluster_size = 1;
}

}
