/*
Copies that a machine beside the threads makes (TMA), and the barriers in shared memory that tell when they are there: one
function an instruction, sm_90 and later. An mbarrier counts arrivals and bytes; when both are complete its phase, 0 or 1, flips.
*/
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <cuda.h>
#include <cuda_runtime.h>
#include "copy.cuh"

namespace tma {

__device__ inline void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void expect(uint32_t barrier, int bytes) {               // arrive; the phase flips when bytes more have come
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait(uint32_t barrier, int phase) {                 // until this phase is over
  uint32_t over = 0;
  while (!over)
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(over) : "r"(barrier), "r"(phase) : "memory");
}

__device__ inline void copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ inline void copy_box(uint32_t to, const CUtensorMap& from, int byte, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :: "r"(to), "l"(&from), "r"(byte), "r"(row), "r"(barrier) : "memory");
}

// the same, to the same place in every block of a cluster whose bit is set in `blocks`
__device__ inline void copy_to(uint16_t blocks, uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
               :: "r"(to), "l"(from), "r"(bytes), "r"(barrier), "h"(blocks) : "memory");
}
__device__ inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap& from, int byte, int row, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
               :: "r"(to), "l"(&from), "r"(byte), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

// back to memory; what lies outside the matrix is left out. Stores are committed in groups
__device__ inline void store_box(const CUtensorMap& to, int byte, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];"
               :: "l"(&to), "r"(byte), "r"(row), "r"(from) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int n> __device__ void wait_for_reads() {                        // of all groups of this thread but the last n
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(n) : "memory");
}

__device__ inline void writes_before_async() {                             // what threads wrote is seen by TMA and tensor core
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A matrix of bytes, fetched in boxes of 128 bytes x box_rows, or whole rows if not swizzled. In shared memory the eight 16-byte
// chunks of a swizzled row are permuted: chunk c of row r is at c ^ r % 8. What is outside the matrix arrives as zeros
inline CUtensorMap map(const void* data, int64_t rows, int64_t bytes, int box_rows, bool swizzled = true) {
  static const auto encode = [] {                                          // a driver function, found without linking to the driver
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  CUtensorMap m;
  const cuuint64_t size[2] = {cuuint64_t(bytes), cuuint64_t(rows)}, stride[1] = {cuuint64_t(bytes)};
  const cuuint32_t box[2] = {cuuint32_t(swizzled ? 128 : bytes), cuuint32_t(box_rows)}, step[2] = {1, 1};
  if (!encode || encode(&m, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(data), size, stride, box, step,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw std::runtime_error("gemm: the driver makes no tensor map for a matrix of " + std::to_string(rows) + " rows of " +
                             std::to_string(bytes) + " bytes");
  return m;
}

}  // namespace tma
