/*
TMA, the unit that copies between memory and shared memory while the threads do something else, and
the barriers in shared memory that tell when a copy has arrived. One function an instruction, sm_90
and later. Addresses in shared memory are those of smem_address.

An mbarrier counts two things in each phase: the arrivals of threads, and the bytes that copies
still owe. When both are complete, the phase ends and the next one begins with the same number of
arrivals. A thread waits for the end of a phase by its parity: phases are 0 and 1 in turns. A new
mbarrier is in phase 0, and a wait for phase 1, as if one had been before, ends at once.
*/
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <cuda.h>
#include <cuda_runtime.h>
#include "cp_async.cuh"

namespace tma {

// ---- barriers

__device__ inline void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to TMA.
__device__ inline void init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces `bytes` more that copies will bring before the phase can end.
__device__ inline void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :: "r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over.
__device__ inline void wait(uint32_t barrier, int phase) {
  uint32_t is_over = 0;
  while (!is_over)
    asm volatile("{ .reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p; }"
                 : "=r"(is_over) : "r"(barrier), "r"(phase) : "memory");
}

// ---- memory -> shared memory; the bytes arrive at the barrier

__device__ inline void copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// Copies the box of a matrix that begins at this byte of this row.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& from, int byte, int row,
                                uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               " [%0], [%1, {%2, %3}], [%4];"
               :: "r"(to), "l"(&from), "r"(byte), "r"(row), "r"(barrier) : "memory");
}

// Copies to the same address in every block of a cluster whose bit is set in `blocks`; the bytes
// arrive at the barrier of each.
__device__ inline void copy_to(uint16_t blocks, uint32_t to, const void* from, int bytes,
                               uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
               ".multicast::cluster [%0], [%1], %2, [%3], %4;"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(blocks) : "memory");
}

__device__ inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap& from, int byte,
                                   int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
               ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(to), "l"(&from), "r"(byte), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

// ---- shared memory -> memory; what lies outside the matrix is left out

__device__ inline void store_box(const CUtensorMap& to, int byte, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(&to), "r"(byte), "r"(row), "r"(from) : "memory");
}

// Makes a group of the stores that this thread has started since the last group.
__device__ inline void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all groups of this thread but the last n have read their shared memory.
template <int n> __device__ void wait_for_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(n) : "memory");
}

// Makes what threads have written to shared memory visible to TMA and to the tensor cores.
__device__ inline void writes_before_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- tensor maps

// The driver's function, which is found without linking to the driver; nullptr if it has none.
inline decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                   &result);
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
}

// Describes a matrix of bytes for copies of boxes of 128 bytes x box_rows or, if not swizzled, of
// whole rows. In shared memory the eight 16-byte chunks of a swizzled row are permuted: chunk c of
// row r lies at c ^ r % 8. What is outside the matrix arrives as zeros.
inline CUtensorMap map(const void* data, int64_t rows, int64_t bytes, int box_rows,
                       bool swizzled = true) {
  static const auto encode = find_encoder();
  CUtensorMap m;
  const cuuint64_t width = bytes;
  const cuuint64_t height = rows;
  const cuuint64_t size[2] = {width, height};
  const cuuint64_t stride[1] = {width};
  const cuuint32_t box_width = swizzled ? 128 : bytes;
  const cuuint32_t box_height = box_rows;
  const cuuint32_t box[2] = {box_width, box_height};
  const cuuint32_t step[2] = {1, 1};
  const auto swizzle = swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE;
  const bool is_encoded =
      encode && encode(&m, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), size, stride,
                       box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  if (!is_encoded)
    throw std::runtime_error("gemm: the driver makes no tensor map for a matrix of " +
                             std::to_string(rows) + " rows of " + std::to_string(bytes) + " bytes");
  return m;
}

}  // namespace tma
