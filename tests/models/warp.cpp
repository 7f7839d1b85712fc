/*
Here one thread plays a warp, and two models of mma_mxf4 are compared. The first is
mma_mxf4_model.cuh: the PTX ISA's tables, element by element, as the lane that receives an element
reads them. The second is written here from the sending side, as CUTLASS describes the same
fragments: the number of the lane and the number of the value in it, times strides, give a place in
the matrix. Every register of every lane is random, including those that no selector names.

    g++ -std=c++17 warp.cpp && ./a.out
*/
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

// CUDA's names, for the model that is included below. Each lane runs twice. In a rehearsal it shows
// what it brings to every shuffle; then it receives what the other lanes have shown. That is a
// warp, as long as no lane passes on what it received, and this is checked.
#define __device__
static struct { int x; } threadIdx;
static bool is_rehearsal;
static int shuffles;                                        // those that this lane has done
static uint32_t brought[1000][32];

static uint32_t __shfl_sync(unsigned, uint32_t value, int from) {
  uint32_t* values = brought[shuffles];
  shuffles++;
  if (is_rehearsal)
    values[threadIdx.x] = value;
  else if (values[threadIdx.x] != value)
    abort();
  return values[from];
}

#include "mma_mxf4_model.cuh"

struct Lane {
  uint32_t a[4];
  uint32_t b[2];
  uint32_t sa;
  uint32_t sb;
  float d[4];
};

struct Case {
  int byte_a, thread_a, byte_b, thread_b;
  Lane lanes[32];

  // Whether the instruction takes a scale from lane t.
  bool scales_a(int t) const { return t / 2 % 2 == thread_a; }
  bool scales_b(int t) const { return t % 4 == thread_b; }
};

static double value(const uint32_t* registers, int v) {
  return mxfp4::e2m1_value((registers[v / 8] >> (4 * (v % 8))) & 15);
}

static double scale(uint32_t word, int byte) {
  return mxfp4::e8m0_value((word >> (8 * byte)) & 255);
}

// The second model. Its comments give the shapes of (lane, value) and the strides, as CUTLASS does.
static void multiply_by_strides(Case& c) {
  double A[16 * 64];                                        // A[m + 16 k]
  double B[8 * 64];                                         // B[n + 8 k]
  double sa[16][2];
  double sb[8][2];
  for (int t = 0; t < 32; t++) {
    const Lane& lane = c.lanes[t];
    for (int v = 0; v < 32; v++) {
      // ((4, 8), (8, 2, 2)) -> ((128, 1), (16, 8, 512))
      const int place = t % 4 * 128 + t / 4 + v % 8 * 16 + v / 8 % 2 * 8 + v / 16 * 512;
      A[place] = value(lane.a, v);
    }
    for (int v = 0; v < 16; v++) {
      // ((4, 8), (8, 2)) -> ((64, 1), (8, 256))
      const int place = t % 4 * 64 + t / 4 + v % 8 * 8 + v / 8 * 256;
      B[place] = value(lane.b, v);
    }
    for (int half = 0; half < 2; half++) {
      if (c.scales_a(t))                                    // (2, 2, 8) -> (8, selector, 1)
        sa[t % 2 * 8 + t / 4][half] = scale(lane.sa, c.byte_a + half);
      if (c.scales_b(t))                                    // (4, 8) -> (selector, 1)
        sb[t / 4][half] = scale(lane.sb, c.byte_b + half);
    }
  }
  for (int t = 0; t < 32; t++)
    for (int v = 0; v < 4; v++) {
      // ((4, 8), (2, 2)) -> ((32, 1), (16, 8)), a place in D[m + 16 n]
      const int place = t % 4 * 32 + t / 4 + v % 2 * 16 + v / 2 * 8;
      const int m = place % 16;
      const int n = place / 16;
      double sum = c.lanes[t].d[v];
      for (int k = 0; k < 64; k++)
        sum += A[m + 16 * k] * B[n + 8 * k] * sa[m][k / 32] * sb[n][k / 32];
      c.lanes[t].d[v] = float(sum);                         // This is exact, as scales are near 1.
    }
}

// Returns a scale near 1, or now and then NaN.
static uint32_t random_scale(std::mt19937& random) {
  return random() % 200 ? 124 + random() % 6 : 255;
}

static uint32_t with_byte(uint32_t word, int byte, uint32_t value) {
  const int shift = 8 * byte;
  return (word & ~(255u << shift)) | (value << shift);
}

static Case random_case(std::mt19937& random, int i) {
  Case c = {i % 2 * 2, i / 2 % 2, i / 4 % 2 * 2, i / 8 % 4, {}};
  for (int t = 0; t < 32; t++) {
    Lane& lane = c.lanes[t];
    for (uint32_t& r : lane.a)
      r = random();
    for (uint32_t& r : lane.b)
      r = random();
    for (float& d : lane.d)
      d = float(int(random() % 2001) - 1000) / 8;
    // Every scale that no selector names is NaN (255).
    lane.sa = ~0u;
    lane.sb = ~0u;
    for (int byte = 0; byte < 2; byte++) {
      if (c.scales_a(t))
        lane.sa = with_byte(lane.sa, c.byte_a + byte, random_scale(random));
      if (c.scales_b(t))
        lane.sb = with_byte(lane.sb, c.byte_b + byte, random_scale(random));
    }
  }
  return c;
}

// The first model, on every lane.
static void multiply_as_warp(Case& c) {
  const Case before = c;
  for (bool rehearsal : {true, false}) {
    is_rehearsal = rehearsal;
    c = before;
    for (int t = 0; t < 32; t++) {
      threadIdx.x = t;
      shuffles = 0;
      Lane& lane = c.lanes[t];
      mma_mxf4(lane.d, lane.a, lane.b, lane.sa, lane.sb,
               c.byte_a, c.thread_a, c.byte_b, c.thread_b);
    }
  }
}

int main() {
  std::mt19937 random(1);
  std::vector<Case> cases;
  for (int i = 0; i < 160; i++)
    cases.push_back(random_case(random, i));
  std::vector<Case> expected = cases;
  for (Case& c : expected)
    multiply_by_strides(c);
  for (Case& c : cases)
    multiply_as_warp(c);

  int equal = 0;
  int nan = 0;
  int different = 0;
  for (size_t i = 0; i < cases.size(); i++)
    for (int t = 0; t < 32; t++)
      for (int v = 0; v < 4; v++) {
        const float x = cases[i].lanes[t].d[v];
        const float y = expected[i].lanes[t].d[v];
        if (x != x && y != y)
          nan++;
        else if (x == y)
          equal++;
        else
          different++;
      }
  printf("%d sums equal, %d both NaN, %d different\n", equal, nan, different);
  return different != 0 || nan == 0 || equal < 9 * nan;
}
