/*
32 threads play a warp: the model of mma_mxf4 (mma_mxf4_model.cuh: the PTX ISA's tables, element by element, as the lane
that receives sees them) against another one, written from the sending side as CUTLASS describes the same fragments: lane and value number
times strides give a place in the matrix. Every register of every lane is random, those that no selector names too.

    g++ -std=c++20 -pthread warp.cpp && ./a.out
*/
#include <barrier>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>
#include <cstdint>

static thread_local struct { int x; } threadIdx;
static std::barrier everyone(32);
static uint32_t __shfl_sync(unsigned, uint32_t value, int from) {
  static uint32_t values[32];
  values[threadIdx.x] = value;
  everyone.arrive_and_wait();
  const uint32_t got = values[from];
  everyone.arrive_and_wait();
  return got;
}
#define __device__
#include "mma_mxf4_model.cuh"

struct Lane { uint32_t a[4], b[2], sa, sb; float d[4]; };
struct Case { int byte_a, thread_a, byte_b, thread_b; Lane lanes[32]; };

static uint32_t nibble(const uint32_t* registers, int v) { return registers[v / 8] >> 4 * (v % 8) & 15; }

static void by_strides(Case& c) {
  double A[16 * 64], B[8 * 64], sa[16][2], sb[8][2];                       // A[m + 16 k], B[n + 8 k], D[m + 16 n]
  for (int t = 0; t < 32; t++) {
    const Lane& lane = c.lanes[t];
    for (int v = 0; v < 32; v++)                                           // (T, V): ((4, 8), (8, 2, 2)) -> ((128, 1), (16, 8, 512))
      A[t % 4 * 128 + t / 4 + v % 8 * 16 + v / 8 % 2 * 8 + v / 16 * 512] = mxfp4::value(nibble(lane.a, v));
    for (int v = 0; v < 16; v++)                                           // ((4, 8), (8, 2)) -> ((64, 1), (8, 256))
      B[t % 4 * 64 + t / 4 + v % 8 * 8 + v / 8 * 256] = mxfp4::value(nibble(lane.b, v));
    for (int half = 0; half < 2; half++) {
      if (t / 2 % 2 == c.thread_a)                                         // (2, 2, 8) -> (8, selector, 1)
        sa[t % 2 * 8 + t / 4][half] = mxfp4::scale_of(lane.sa >> 8 * (c.byte_a + half) & 255);
      if (t % 4 == c.thread_b)                                             // (4, 8) -> (selector, 1)
        sb[t / 4][half] = mxfp4::scale_of(lane.sb >> 8 * (c.byte_b + half) & 255);
    }
  }
  for (int t = 0; t < 32; t++)
    for (int v = 0; v < 4; v++) {                                          // ((4, 8), (2, 2)) -> ((32, 1), (16, 8))
      const int at = t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 * 8, m = at % 16, n = at / 16;
      double sum = c.lanes[t].d[v];
      for (int k = 0; k < 64; k++) sum += A[m + 16 * k] * B[n + 8 * k] * sa[m][k / 32] * sb[n][k / 32];
      c.lanes[t].d[v] = float(sum);                                        // exact: scales are near 1
    }
}

int main() {
  std::mt19937 random(1);
  std::vector<Case> cases;
  for (int i = 0; i < 160; i++) {
    Case c = {i % 2 * 2, i / 2 % 2, i / 4 % 2 * 2, i / 8 % 4, {}};
    for (int t = 0; t < 32; t++) {
      Lane& lane = c.lanes[t];
      for (uint32_t& r : lane.a) r = random();
      for (uint32_t& r : lane.b) r = random();
      for (float& d : lane.d) d = float(int(random() % 2001) - 1000) / 8;
      lane.sa = lane.sb = ~0u;                                             // NaN where no selector points, and sometimes where one does
      for (int byte = 0; byte < 2; byte++) {
        if (t / 2 % 2 == c.thread_a) lane.sa ^= (255 ^ (random() % 200 ? 124 + random() % 6 : 255)) << 8 * (c.byte_a + byte);
        if (t % 4 == c.thread_b) lane.sb ^= (255 ^ (random() % 200 ? 124 + random() % 6 : 255)) << 8 * (c.byte_b + byte);
      }
    }
    cases.push_back(c);
  }
  std::vector<Case> expected = cases;
  for (Case& c : expected) by_strides(c);
  std::vector<std::thread> warp;
  for (int t = 0; t < 32; t++)
    warp.emplace_back([&, t] {
      threadIdx.x = t;
      for (Case& c : cases) {
        Lane& lane = c.lanes[t];
        mma_mxf4(lane.d, lane.a, lane.b, lane.sa, lane.sb, c.byte_a, c.thread_a, c.byte_b, c.thread_b);
      }
    });
  for (std::thread& t : warp) t.join();
  int equal = 0, nan = 0, different = 0;
  for (size_t i = 0; i < cases.size(); i++)
    for (int t = 0; t < 32; t++)
      for (int v = 0; v < 4; v++) {
        const float x = cases[i].lanes[t].d[v], y = expected[i].lanes[t].d[v];
        (x != x && y != y ? nan : x == y ? equal : different)++;
      }
  printf("%d sums equal, %d both NaN, %d different\n", equal, nan, different);
  return different != 0 || nan == 0 || equal < 9 * nan;
}
