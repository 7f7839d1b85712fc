/*
Hopper's instructions of ptx/tma.cuh and ptx/wgmma.cuh on a CPU, for cuda_on_cpu.h. Two blocks of a
cluster run together. A copy has arrived when its function returns, a store happens as late as it
may, a product is summed in double. A barrier counts arrivals and bytes as the PTX manual says.
*/
#pragma once
#include <array>
#include <deque>
#include <cuda.h>
#include "cuda_on_cpu.h"
#include "ptx/cp_async.cuh"

#define __grid_constant__
#define __cluster_dims__(...)
#define cudaMemsetAsync(data, value, bytes, stream) memset(data, value, bytes)

inline int __shfl_sync(unsigned, int x, int lane) {
  return shuffle(x, thread_number() / 32 * 32 + lane);
}

namespace tma {

// ---- barriers

struct MBarrier {
  uint16_t arrivals;                        // in each phase
  uint16_t pending;                         // arrivals of this phase that are still to come
  int32_t bytes : 31;                       // of this phase that are still to come
  uint32_t phase : 1;
};
static_assert(sizeof(MBarrier) == 8);

inline MBarrier& barrier_at(uint32_t address, int rank) {
  return *(MBarrier*)(shared_of[rank] + address);
}

inline void update(MBarrier& barrier, int arrivals, int bytes) {
  barrier.pending -= arrivals;
  barrier.bytes += bytes;
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.arrivals;
    barrier.phase ^= 1;
  }
}

inline void init(uint32_t address, int arrivals) {
  MBarrier& barrier = barrier_at(address, block_rank);
  barrier.arrivals = arrivals;
  barrier.pending = arrivals;
  barrier.bytes = 0;
  barrier.phase = 0;
}
inline void init_done() {}

inline void expect(uint32_t address, int bytes) {
  update(barrier_at(address, block_rank), 1, bytes);
}

inline void wait(uint32_t address, int phase) {
  while (int(barrier_at(address, block_rank).phase) == phase)
    yield();
}

// ---- copies

inline void copy_to(uint16_t blocks, uint32_t to, const void* from, int bytes, uint32_t full) {
  for (int rank = 0; rank < MAX_BLOCKS; rank++) {
    if (blocks >> rank & 1) {
      memcpy(shared_of[rank] + to, from, bytes);
      update(barrier_at(full, rank), 0, -bytes);
    }
  }
}

inline void copy(uint32_t to, const void* from, int bytes, uint32_t full) {
  copy_to(1 << block_rank, to, from, bytes, full);
}

// What takes the place of the driver's description of a matrix.
struct Map {
  uint8_t* data;
  int64_t rows;
  int64_t bytes;
  int box_rows;
  int box_bytes;
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

inline CUtensorMap map(const void* data, int64_t rows, int64_t bytes, int box_rows,
                       bool swizzled = true) {
  const Map m = {(uint8_t*)data, rows, bytes, box_rows, swizzled ? 128 : int(bytes)};
  CUtensorMap result;
  memcpy(&result, &m, sizeof(m));
  return result;
}

// Only matrices that are not swizzled are read in boxes.
inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap& from, int byte, int row,
                        uint32_t full) {
  const Map& m = (const Map&)from;
  std::vector<uint8_t> box(m.box_rows * m.box_bytes);
  for (int i = 0; i < m.box_rows && row + i < m.rows; i++)
    memcpy(&box[i * m.box_bytes], m.data + (row + i) * m.bytes + byte, m.box_bytes);
  copy_to(blocks, to, box.data(), int(box.size()), full);
}

inline void copy_box(uint32_t to, const CUtensorMap& from, int byte, int row, uint32_t full) {
  copy_box_to(1 << block_rank, to, from, byte, row, full);
}

// ---- stores: each reads shared memory as late as it may, which is when its thread waits for it

struct Store {
  Map map;
  int byte;
  int row;
  uint32_t from;                            // in shared memory
};
using Group = std::vector<Store>;
inline std::deque<Group> groups_of[MAX_BLOCKS * MAX_THREADS];

// The groups of this thread; the last one is not committed yet.
inline std::deque<Group>& groups() {
  std::deque<Group>& groups = groups_of[thread_number()];
  if (groups.empty())
    groups.emplace_back();
  return groups;
}

inline void store_box(const CUtensorMap& to, int byte, int row, uint32_t from) {
  groups().back().push_back({(const Map&)to, byte, row, from});
}

inline void commit() { groups().emplace_back(); }

// All matrices that are stored to are swizzled.
inline void run(const Store& store) {
  const Map& m = store.map;
  for (int i = 0; i < m.box_rows && store.row + i < m.rows; i++) {
    for (int k = 0; k < 128 && store.byte + k < m.bytes; k++) {
      const uint32_t from = store.from + 128 * i + k;
      const uint32_t swizzled = from ^ (from >> 7 & 7) << 4;
      m.data[(store.row + i) * m.bytes + store.byte + k] = dynamic_shared[swizzled];
    }
  }
}

template <int n> void wait_for_reads() {
  while (groups().size() > n + 1) {
    for (const Store& store : groups().front())
      run(store);
    groups().pop_front();
  }
}

inline void writes_before_async() {}

}  // namespace tma

namespace cluster {

inline int rank() { return block_rank; }
inline void sync() { cluster_barrier.arrive_and_wait(); }

inline void arrive(uint32_t barrier) {
  for (int rank = 0; rank < MAX_BLOCKS; rank++)
    tma::update(tma::barrier_at(barrier, rank), 1, 0);
}

}  // namespace cluster

namespace wgmma {

inline void fewer_registers() {}
inline void more_registers() {}
inline void begin() {}
inline void commit() {}
inline void wait(float (&)[64]) {}
inline uint32_t descriptor(const void* p) { return smem_address(p) >> 4; }

// The byte k of row r of a swizzled tile that begins at `descriptor`.
inline uint8_t byte(uint32_t descriptor, int r, int k) {
  const uint32_t address = (descriptor << 4) + 128 * r + k;
  return dynamic_shared[address ^ (address >> 7 & 7) << 4];
}

inline std::array<double, 256> fp8_values(__nv_fp8_interpretation_t kind) {
  std::array<double, 256> values;
  for (int code = 0; code < 256; code++)
    values[code] = __half2float(__half(__nv_cvt_fp8_to_halfraw(code, kind)));
  return values;
}
inline const std::array<double, 256> e4m3_values = fp8_values(__NV_E4M3);
inline const std::array<double, 256> e5m2_values = fp8_values(__NV_E5M2);

template <bool add> void multiply(float (&c)[64], uint32_t a, uint32_t b) {
  const int t = threadIdx.x % 128;
  double left[2][32];
  for (int r = 0; r < 2; r++) {
    for (int k = 0; k < 32; k++)
      left[r][k] = e4m3_values[byte(a, t / 32 * 16 + t % 32 / 4 + 8 * r, k)];
  }
  for (int j = 0; j < 32; j++) {
    const int n = j / 2 * 8 + t % 4 * 2 + j % 2;
    double sum[2] = {};
    for (int k = 0; k < 32; k++) {
      const double right = e5m2_values[byte(b, n, k)];
      for (int r = 0; r < 2; r++)
        sum[r] += left[r][k] * right;
    }
    for (int r = 0; r < 2; r++) {
      float& to = c[4 * (j / 2) + 2 * r + j % 2];
      to = float((add ? to : 0) + sum[r]);
    }
  }
}

}  // namespace wgmma
