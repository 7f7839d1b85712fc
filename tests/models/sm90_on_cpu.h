/*
Hopper's instructions of tma.cuh and wgmma.cuh on a CPU, for cuda_on_cpu.h: two blocks of a cluster run together, a copy is there
when its function returns, a product is summed in double. A barrier counts arrivals and bytes as the PTX manual says.
*/
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <cuda.h>
#include "cuda_on_cpu.h"
#include "copy.cuh"

#define __grid_constant__
#define __cluster_dims__(...)
#define cudaMemsetAsync(data, value, bytes, stream) memset(data, value, bytes)

inline int __shfl_sync(unsigned, int x, int lane) {
  memcpy(&slots[me()], &x, 4), __syncwarp();
  memcpy(&x, &slots[me() / 32 * 32 + lane], 4), __syncwarp();
  return x;
}

namespace cluster {
inline int rank() { return in_cluster; }
inline void sync() { all_blocks->arrive_and_wait(); }
}

namespace tma {

struct Barrier { uint16_t count, pending; int32_t bytes : 31, phase : 1; };
inline std::mutex mutex;
inline std::condition_variable changed;

inline Barrier& barrier(uint32_t address, int rank = in_cluster) { return *(Barrier*)(shared_of[rank] + address); }
inline void update(Barrier& b, int arrivals, int bytes) {
  std::lock_guard lock(mutex);
  b.pending -= arrivals, b.bytes += bytes;
  if (!b.pending && !b.bytes) b.pending = b.count, b.phase ^= 1, changed.notify_all();
}
inline void init(uint32_t at, int arrivals) { barrier(at) = {uint16_t(arrivals), uint16_t(arrivals), 0, 0}; }
inline void init_done() {}
inline void expect(uint32_t at, int bytes) { update(barrier(at), 1, bytes); }
inline void wait(uint32_t at, int phase) {
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return (barrier(at).phase & 1) != phase; });
}

inline void copy_to(uint16_t blocks, uint32_t to, const void* from, int bytes, uint32_t full) {
  for (int rank = 0; rank < 2; rank++)
    if (blocks >> rank & 1) memcpy(shared_of[rank] + to, from, bytes), update(barrier(full, rank), 0, -bytes);
}
inline void copy(uint32_t to, const void* from, int bytes, uint32_t full) { copy_to(1 << in_cluster, to, from, bytes, full); }

struct Map { uint8_t* data; int64_t rows, bytes; int box_rows, box_bytes; };
static_assert(sizeof(Map) <= sizeof(CUtensorMap));
inline CUtensorMap map(const void* data, int64_t rows, int64_t bytes, int box_rows, bool swizzled = true) {
  const Map m = {(uint8_t*)data, rows, bytes, box_rows, swizzled ? 128 : int(bytes)};
  CUtensorMap result;
  return memcpy(&result, &m, sizeof m), result;
}
inline void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap& from, int byte, int row, uint32_t full) {
  const Map& m = (const Map&)from;                             // none that is swizzled is read
  std::vector<uint8_t> box(m.box_rows * m.box_bytes);
  for (int i = 0; i < m.box_rows; i++)
    if (row + i < m.rows) memcpy(&box[i * m.box_bytes], m.data + (row + i) * m.bytes + byte, m.box_bytes);
  copy_to(blocks, to, box.data(), int(box.size()), full);
}
// a store reads shared memory as late as it may: when its thread waits for it
using Group = std::vector<std::function<void()>>;
inline thread_local std::deque<Group> leaving(1);              // the last one is not committed yet
inline void store_box(const CUtensorMap& to, int byte, int row, uint32_t from) {
  leaving.back().push_back([m = (const Map&)to, byte, row, from] {         // all that are stored to are swizzled
    for (int i = 0; i < m.box_rows && row + i < m.rows; i++)
      for (int k = 0; k < 128 && byte + k < m.bytes; k++) {
        const uint32_t at = from + 128 * i + k;
        m.data[(row + i) * m.bytes + byte + k] = dynamic_shared[at ^ (at >> 7 & 7) << 4];
      }
  });
}
inline void commit() { leaving.emplace_back(); }
template <int n> void wait_for_reads() {
  for (; leaving.size() > n + 1; leaving.pop_front())
    for (auto& store : leaving.front()) store();
}
inline void writes_before_async() {}
inline void copy_box(uint32_t to, const CUtensorMap& from, int byte, int row, uint32_t full) { copy_box_to(1 << in_cluster, to, from, byte, row, full); }

}

namespace cluster {
inline void arrive(uint32_t at) { for (int rank = 0; rank < 2; rank++) tma::update(tma::barrier(at, rank), 1, 0); }
}

namespace wgmma {

inline void fewer_registers() {}
inline void more_registers() {}
inline void begin() {}
inline void commit() {}
inline void wait(float (&)[64]) {}
inline uint32_t descriptor(const void* p) { return address(p) >> 4; }

// byte k of row r of a swizzled tile that begins at `descriptor`
inline uint8_t byte(uint32_t descriptor, int r, int k) {
  const uint32_t at = (descriptor << 4) + 128 * r + k;
  return dynamic_shared[at ^ (at >> 7 & 7) << 4];
}
inline float value(uint8_t code, __nv_fp8_interpretation_t kind) { return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, kind))); }

template <bool add> void multiply(float (&c)[64], uint32_t a, uint32_t b) {
  const int t = threadIdx.x % 128;
  float left[2][32];
  for (int r = 0; r < 2; r++)
    for (int k = 0; k < 32; k++) left[r][k] = value(byte(a, t / 32 * 16 + t % 32 / 4 + 8 * r, k), __NV_E4M3);
  for (int j = 0; j < 32; j++) {
    const int n = j / 2 * 8 + t % 4 * 2 + j % 2;
    double sum[2] = {};
    for (int k = 0; k < 32; k++)
      for (int r = 0; r < 2; r++) sum[r] += double(left[r][k]) * value(byte(b, n, k), __NV_E5M2);
    for (int r = 0; r < 2; r++) {
      float& to = c[4 * (j / 2) + 2 * r + j % 2];
      to = float((add ? to : 0) + sum[r]);
    }
  }
}

}
