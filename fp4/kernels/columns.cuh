/*
The arithmetic of the quantisers that a recipe describes by columns (GemmSpec in fp4/recipes.py).
emulate/quantizers.py explains the formats and the rules, and is the definition: what is computed
here are its bytes.

The columns are macros, and become constants. This file and those that include it are compiled for
each GemmSpec anew, so that a quantiser holds only what its columns ask for:

    -DCOLUMN_FORMAT=nvfp4 -DCOLUMN_SCALE=absmax -DCOLUMN_ROTATION=128 -DCOLUMN_SIGNS=before
    -DCOLUMN_ROUNDING=eden -DCOLUMN_MULTIPLIER=1.0 -DCOLUMN_SQUARE=0
    -DCOLUMN_NAME=nvfp4_absmax_128_before_eden

A lane owns 32 neighbours of a row, and 32 lanes work together. On a GPU they are the threads of a
warp. On a CPU they lie side by side, v[i][w] being element i of lane w, and the compiler makes
vector instructions of a loop over w. What lanes exchange goes through `Lanes`, which the includer
defines; so the code below is the same for both:

    Lanes::W                        how many lanes v has: 1 on a GPU, 32 on a CPU
    Lanes::lane(w)                  the number of lane w among the 32
    Lanes::exchange(x, n, other)    other becomes the x of the lane whose number differs in bit n
    Lanes::round_nearest(u), Lanes::round_stochastically(u, noise), Lanes::pack(elements, words)
                                    what the functions of similar names below do, or faster

The lanes of 8 rows of 128 values lie as below. So a rotation of 64 or 128 is finished by two or
four neighbouring lanes. Where blocks are square, all lanes lie below one another instead.

    row 0     lane 0: 0 .. 31     lane 1: 32 .. 63     lane 2: 64 .. 95     lane 3: 96 .. 127
    row 1     lane 4              lane 5               lane 6               lane 7
*/
#pragma once
#include <type_traits>
#include "mxfp4.cuh"

namespace columns {

using namespace mxfp4;

// ---- the columns

enum class Format { mxfp4, mxfp8, int4, nvfp4 };
enum class Scale { floor, nearest, absmax34, absmax, pma, mse, four_six };
enum class Signs { before, after, none };
enum class Rounding { nearest, stochastic, eden };

constexpr Format FORMAT = Format::COLUMN_FORMAT;
constexpr Scale SCALE = Scale::COLUMN_SCALE;
constexpr int ROTATION = COLUMN_ROTATION;
constexpr Signs SIGNS = Signs::COLUMN_SIGNS;
constexpr Rounding ROUNDING = Rounding::COLUMN_ROUNDING;
constexpr float MULTIPLIER = COLUMN_MULTIPLIER;        // of QuEST's scale
constexpr bool IS_SQUARE = COLUMN_SQUARE;

constexpr bool IS_NVFP4 = FORMAT == Format::nvfp4;
constexpr bool CAN_PACK = FORMAT == Format::mxfp4;      // into codes and scales
constexpr bool IS_QUEST = SCALE == Scale::floor || SCALE == Scale::nearest;
constexpr bool IS_EDEN = ROUNDING == Rounding::eden;
constexpr bool IS_STOCHASTIC = ROUNDING == Rounding::stochastic;
constexpr bool IS_RANDOM = IS_STOCHASTIC || (IS_EDEN && IS_NVFP4);  // the kernel reads noise
constexpr bool HAS_MASK = IS_QUEST || SCALE == Scale::mse;
constexpr bool HAS_THREE_QUARTERS = SCALE == Scale::absmax34 || SCALE == Scale::pma;
constexpr bool HAS_ROW_FACTOR = IS_EDEN && !IS_NVFP4;   // EDEN's S, one for each row

constexpr int BLOCK_SIZE = IS_NVFP4 ? 16 : 32;
constexpr int BLOCKS = 32 / BLOCK_SIZE;                 // of a lane
constexpr int SQUARE_ROWS = 16;
static_assert(!IS_SQUARE || (IS_NVFP4 && ROTATION <= 32 && ROUNDING == Rounding::nearest));

// What 32 lanes have of a matrix.
constexpr int WARP_ROWS = IS_SQUARE ? 32 : 8;
constexpr int WARP_COLUMNS = IS_SQUARE ? 32 : 128;

HOST_DEVICE int row_of_lane(int lane) { return IS_SQUARE ? lane : lane / 4; }

HOST_DEVICE int column_of_lane(int lane) { return IS_SQUARE ? 0 : 32 * (lane % 4); }

template <class Lanes>
using Values = Block<Lanes::W>;

template <class Lanes>
using PerLane = float[Lanes::W];

template <class Lanes>
using PerBlock = float[BLOCKS][Lanes::W];

template <class Lanes>
using Noise = uint32_t[8][Lanes::W];    // a byte an element

constexpr uint32_t SIGN_BIT = 0x80000000u;

// Magnitudes are compared as integers, among which NaN is the largest.
HOST_DEVICE float larger(float a, float b) {
  const int a_bits = bits_of(a);
  const int b_bits = bits_of(b);
  return float_of(a_bits > b_bits ? a_bits : b_bits);
}

// ---- rotations

// ROTATION^-0.5
constexpr float rotation_norm() {
  if (ROTATION == 16)
    return .25f;
  if (ROTATION == 32)
    return HADAMARD_NORM;
  if (ROTATION == 64)
    return .125f;
  return 0.08838834764831845f;
}

constexpr float ROTATION_NORM = rotation_norm();

// The 32 signs of a lane whose first element is `column`; signs [2] are those of 128 elements.
HOST_DEVICE uint32_t signs_of_lane(const int64_t* signs, int64_t column) {
  constexpr int WORDS = ROTATION > 32 ? ROTATION / 32 : 1;
  const int word = int(column / 32 % WORDS);
  const uint32_t bits = uint32_t(uint64_t(signs[word / 2]) >> (32 * (word % 2)));
  return ROTATION == 16 ? (bits & 0xFFFF) * 0x10001u : bits;
}

template <class Lanes>
HOST_DEVICE void flip_signs(Values<Lanes>& v, const uint32_t (&signs)[Lanes::W]) {
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      v[i][w] = float_of(bits_of(v[i][w]) ^ ((signs[w] << (31 - i)) & SIGN_BIT));
}

// A stage of the butterfly whose pairs (a, b) lie in lanes that are `stride` apart: a becomes
// a + b, and b becomes a - b.
template <class Lanes>
HOST_DEVICE void exchange_stage(Values<Lanes>& v, int stride) {
  UNROLL for (int i = 0; i < 32; i++) {
    PerLane<Lanes> other;
    Lanes::exchange(v[i], stride, other);
    for (int w = 0; w < Lanes::W; w++) {
      const uint32_t is_b = Lanes::lane(w) & stride ? SIGN_BIT : 0;
      v[i][w] = other[w] + float_of(bits_of(v[i][w]) ^ is_b);
    }
  }
}

constexpr int BUTTERFLY_STAGES = ROTATION == 16 ? 4 : 5;        // between values of a lane

// Rotates v as the columns say, or undoes that. The matrix is its own inverse; the signs change
// sides.
template <class Lanes, bool undo = false>
HOST_DEVICE void rotate(Values<Lanes>& v, const uint32_t (&signs)[Lanes::W]) {
  constexpr Signs FIRST = undo ? Signs::after : Signs::before;
  constexpr Signs LAST = undo ? Signs::before : Signs::after;
  if (ROTATION == 0)
    return;
  if (SIGNS == FIRST)
    flip_signs<Lanes>(v, signs);
  UNROLL for (int stage = 0; stage < BUTTERFLY_STAGES; stage++)
    butterfly_stage(v, stage);
  UNROLL for (int stride = 1; 32 * stride < ROTATION; stride *= 2)
    exchange_stage<Lanes>(v, stride);
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      v[i][w] *= ROTATION_NORM;
  if (SIGNS == LAST)
    flip_signs<Lanes>(v, signs);
}

// ---- the largest magnitude that a rotation makes
//
// The last stage makes a + b and a - b of a and b, and the larger magnitude of these two is |a| +
// |b|, rounding included. So that stage need not be computed. Of the sums of two lanes, which both
// would compute, each computes half.

// Leaves in v[0] .. v[15] the sums |a| + |b| of a stage between values that are `stride` apart.
template <class Lanes>
HOST_DEVICE void sums_of_stage(Values<Lanes>& v, int stride) {
  UNROLL for (int pair = 0; pair < 16; pair++) {
    const int left = pair / stride * 2 * stride + pair % stride;
    for (int w = 0; w < Lanes::W; w++)
      v[pair][w] = fabsf(v[left][w]) + fabsf(v[left + stride][w]);
  }
}

// The same, of a stage between lanes.
template <class Lanes>
HOST_DEVICE void sums_of_exchange(Values<Lanes>& v, int stride) {
  UNROLL for (int i = 0; i < 16; i++) {
    PerLane<Lanes> kept;
    PerLane<Lanes> sent;
    PerLane<Lanes> received;
    for (int w = 0; w < Lanes::W; w++) {
      const bool is_b = Lanes::lane(w) & stride;
      kept[w] = is_b ? v[i + 16][w] : v[i][w];
      sent[w] = is_b ? v[i][w] : v[i + 16][w];
    }
    Lanes::exchange(sent, stride, received);
    for (int w = 0; w < Lanes::W; w++)
      v[i][w] = fabsf(kept[w]) + fabsf(received[w]);
  }
}

// Leaves in each lane the largest magnitude among some of the values that rotate() would make. All
// lanes together have them all. Destroys v.
template <class Lanes>
HOST_DEVICE void rotated_max(
    Values<Lanes>& v, const uint32_t (&signs)[Lanes::W], PerLane<Lanes>& largest) {
  if (ROTATION == 0) {
    max_magnitude(v, largest);
    return;
  }
  constexpr int LAST_EXCHANGE = ROTATION / 64;      // the stride, in lanes; 0: there is none
  constexpr int LOCAL_STAGES = LAST_EXCHANGE ? BUTTERFLY_STAGES : BUTTERFLY_STAGES - 1;
  if (SIGNS == Signs::before)
    flip_signs<Lanes>(v, signs);
  UNROLL for (int stage = 0; stage < LOCAL_STAGES; stage++)
    butterfly_stage(v, stage);
  UNROLL for (int stride = 1; stride < LAST_EXCHANGE; stride *= 2)
    exchange_stage<Lanes>(v, stride);
  if (LAST_EXCHANGE)
    sums_of_exchange<Lanes>(v, LAST_EXCHANGE);
  else
    sums_of_stage<Lanes>(v, 1 << LOCAL_STAGES);
  for (int w = 0; w < Lanes::W; w++)
    largest[w] = 0;
  UNROLL for (int i = 0; i < 16; i++)
    for (int w = 0; w < Lanes::W; w++)
      largest[w] = larger(largest[w], v[i][w]);
  for (int w = 0; w < Lanes::W; w++)
    largest[w] *= ROTATION_NORM;
}

// ---- of a block: the largest magnitude, and sums

template <class Lanes>
HOST_DEVICE void block_max(const Values<Lanes>& v, PerBlock<Lanes>& largest) {
  UNROLL for (int b = 0; b < BLOCKS; b++) {
    for (int w = 0; w < Lanes::W; w++)
      largest[b][w] = 0;
    UNROLL for (int i = 0; i < BLOCK_SIZE; i++)
      for (int w = 0; w < Lanes::W; w++)
        largest[b][w] = larger(largest[b][w], fabsf(v[b * BLOCK_SIZE + i][w]));
    UNROLL for (int rows = 1; IS_SQUARE && rows < SQUARE_ROWS; rows *= 2) {
      PerLane<Lanes> other;
      Lanes::exchange(largest[b], rows, other);
      for (int w = 0; w < Lanes::W; w++)
        largest[b][w] = larger(largest[b][w], other[w]);
    }
  }
}

// Sums each block, and destroys the terms: first neighbours are added, then these sums, and so on,
// and in a square block the sums of its rows in the same way.
template <class Lanes>
HOST_DEVICE void sum_blocks(Values<Lanes>& terms, PerBlock<Lanes>& sums) {
  UNROLL for (int stride = 1; stride < BLOCK_SIZE; stride *= 2)
    UNROLL for (int i = 0; i < 32; i += 2 * stride)
      for (int w = 0; w < Lanes::W; w++)
        terms[i][w] += terms[i + stride][w];
  UNROLL for (int b = 0; b < BLOCKS; b++) {
    for (int w = 0; w < Lanes::W; w++)
      sums[b][w] = terms[b * BLOCK_SIZE][w];
    UNROLL for (int rows = 1; IS_SQUARE && rows < SQUARE_ROWS; rows *= 2) {
      PerLane<Lanes> other;
      Lanes::exchange(sums[b], rows, other);
      for (int w = 0; w < Lanes::W; w++)
        sums[b][w] += other[w];
    }
  }
}

// ---- rounding

// Below 2^MIN_EXPONENT the steps stay as they are.
struct E2M1 {
  static constexpr int MANTISSA_BITS = 1;
  static constexpr int MIN_EXPONENT = 0;
  static constexpr float MAX_VALUE = 6;
};

struct E4M3 {
  static constexpr int MANTISSA_BITS = 3;
  static constexpr int MIN_EXPONENT = -6;
  static constexpr float MAX_VALUE = 448;
};

struct Int4 {
  static constexpr int MANTISSA_BITS = 2;
  static constexpr int MIN_EXPONENT = 2;
  static constexpr float MAX_VALUE = 7;
};

using Float4Or8 = std::conditional_t<FORMAT == Format::mxfp8, E4M3, E2M1>;
using Elements = std::conditional_t<FORMAT == Format::int4, Int4, Float4Or8>;

// What both ways of rounding need. Let p be the power of two below the magnitude, where the grid
// has steps of p / 2^mantissa_bits. Floats around 1.5 * 2^(23 - mantissa_bits) p have the same
// steps, so that adding this number and subtracting it again rounds to nearest, ties to even.
struct Rounded {
  float magnitude;      // saturated
  float nearest;
  float step;
};

template <class Grid>
HOST_DEVICE Rounded round_magnitude(float u) {
  const float unclipped = fabsf(u);
  const float magnitude = unclipped > Grid::MAX_VALUE ? Grid::MAX_VALUE : unclipped;
  const uint32_t smallest = uint32_t(127 + Grid::MIN_EXPONENT) << 23;
  const uint32_t below = bits_of(magnitude) & EXPONENT_BITS;
  const uint32_t p = below > smallest ? below : smallest;
  const uint32_t exponent_of_magic = uint32_t(23 - Grid::MANTISSA_BITS) << 23;
  const float magic = float_of(p + exponent_of_magic + 0x400000u);
  const float step = float_of(p - (uint32_t(Grid::MANTISSA_BITS) << 23));
  return {magnitude, (magnitude + magic) - magic, step};
}

HOST_DEVICE float with_sign(float u, float magnitude) {
  return float_of(bits_of(magnitude) | (bits_of(u) & SIGN_BIT));
}

template <class Grid>
HOST_DEVICE float to_grid(float u) {
  return with_sign(u, round_magnitude<Grid>(u).nearest);
}

// Rounds to the upper neighbour if what lies between u and the lower one reaches the threshold.
// `noise` is a byte.
template <class Grid>
HOST_DEVICE float to_grid(float u, int noise) {
  const Rounded r = round_magnitude<Grid>(u);
  const float threshold = r.step * ((255.5f - noise) / 256);
  const float rest = r.magnitude - r.nearest;       // negative if the nearest is the upper one
  const float down = rest < threshold - r.step ? r.step : 0;
  const float up = rest >= threshold ? r.step : 0;
  return with_sign(u, r.nearest - down + up);
}

// Draws the noise of each lane, whose first element has this number in the operand.
template <class Lanes>
HOST_DEVICE void draw_noise(
    uint64_t seed, const int64_t (&first)[Lanes::W], Noise<Lanes>& noise) {
  for (int w = 0; w < Lanes::W; w++)
    UNROLL for (int half = 0; half < 2; half++) {
      uint32_t words[4];
      philox(seed, first[w] / 16 + half, words);
      UNROLL for (int j = 0; j < 4; j++)
        noise[4 * half + j][w] = words[j];
    }
}

template <class Lanes>
HOST_DEVICE int noise_of(const Noise<Lanes>& noise, int i, int w) {
  return (noise[i / 4][w] >> (8 * (i % 4))) & 255;
}

// Round values that were divided by their scales to elements.
template <class Lanes>
HOST_DEVICE void nearest_elements(Values<Lanes>& u) {
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      u[i][w] = to_grid<Elements>(u[i][w]);
}

template <class Lanes>
HOST_DEVICE void stochastic_elements(Values<Lanes>& u, const Noise<Lanes>& noise) {
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      u[i][w] = to_grid<Elements>(u[i][w], noise_of<Lanes>(noise, i, w));
}

template <class Lanes>
HOST_DEVICE void round_elements(Values<Lanes>& u, const Noise<Lanes>& noise) {
  if (IS_STOCHASTIC)
    Lanes::round_stochastically(u, noise);
  else
    Lanes::round_nearest(u);
}

// ---- what the quantisers below return, beside the values, which take the place of v

template <class Lanes>
struct Quantized {
  PerLane<Lanes> scale;         // of values that are to be packed
  uint32_t mask[Lanes::W];      // bit i: element i did not clip
  PerLane<Lanes> vv;            // the sums of which EDEN's factor of a row is made
  PerLane<Lanes> vq;
};

// The sum of a * b over each block.
template <class Lanes>
HOST_DEVICE void sum_products(
    const Values<Lanes>& a, const Values<Lanes>& b, PerBlock<Lanes>& sums) {
  Values<Lanes> terms;
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      terms[i][w] = a[i][w] * b[i][w];
  sum_blocks<Lanes>(terms, sums);
}

// ---- MXFP4, MXFP8 and INT4

// 2^e, or 2^-127, the smallest scale of E8M0, in place of any smaller power
HOST_DEVICE float scale_pow2(int e) { return pow2(e > -127 ? e : -127); }

// Leaves in each lane the exponent, of three around absmax's, with the least squared error.
template <class Lanes>
HOST_DEVICE void mse_exponents(
    const Values<Lanes>& v, const PerLane<Lanes>& largest, int (&best)[Lanes::W]) {
  PerLane<Lanes> least;
  for (int candidate = 0; candidate < 3; candidate++) {
    PerLane<Lanes> scale;
    Values<Lanes> u;
    PerBlock<Lanes> error;
    for (int w = 0; w < Lanes::W; w++)
      scale[w] = scale_pow2(exponent(largest[w]) - 3 + candidate);
    UNROLL for (int i = 0; i < 32; i++)
      for (int w = 0; w < Lanes::W; w++)
        u[i][w] = v[i][w] * (1 / scale[w]);
    Lanes::round_nearest(u);
    UNROLL for (int i = 0; i < 32; i++)
      for (int w = 0; w < Lanes::W; w++)
        u[i][w] = u[i][w] * scale[w] - v[i][w];
    sum_products<Lanes>(u, u, error);
    for (int w = 0; w < Lanes::W; w++) {
      const bool is_better = candidate == 0 || error[0][w] < least[w];
      least[w] = is_better ? error[0][w] : least[w];
      best[w] = is_better ? exponent(largest[w]) - 3 + candidate : best[w];
    }
  }
}

// Finds the scale of each lane's block: 1 for one of zeros, NaN for one that is not finite.
template <class Lanes>
HOST_DEVICE void find_scales(const Values<Lanes>& v, PerLane<Lanes>& scale) {
  PerBlock<Lanes> largest;
  PerLane<Lanes> quest;
  int best[Lanes::W];
  block_max<Lanes>(v, largest);
  if (IS_QUEST)
    quest_scale(v, quest);
  if (SCALE == Scale::mse)
    mse_exponents<Lanes>(v, largest[0], best);
  for (int w = 0; w < Lanes::W; w++) {
    const float top = largest[0][w];
    bool finite = is_finite(top);
    if (FORMAT == Format::int4) {
      scale[w] = top / 7;
    } else if (IS_QUEST) {
      const float best = quest[w] * MULTIPLIER;
      finite = finite && is_finite(best);
      scale[w] = scale_pow2(quest_exponent(best, SCALE == Scale::nearest));
    } else if (SCALE == Scale::mse) {
      scale[w] = scale_pow2(best[w]);
    } else {
      scale[w] = scale_pow2(exponent(top) - (FORMAT == Format::mxfp8 ? 8 : 2));
    }
    scale[w] = top == 0 ? 1 : scale[w];
    scale[w] = finite ? scale[w] : float_of(BITS_OF_NAN);
  }
}

// v divided by its scale. The inverse of a power of two is exact, so that a product does.
HOST_DEVICE float scaled(float v, float scale, float inverse) {
  if (FORMAT == Format::int4)
    return v / scale;
  return HAS_THREE_QUARTERS ? v * inverse * .75f : v * inverse;
}

// The values become multiples of their scales or, if they are to be packed, elements of E2M1.
template <class Lanes, bool packs>
HOST_DEVICE void quantize_mx(
    Values<Lanes>& v, const Noise<Lanes>& noise, Quantized<Lanes>& out) {
  PerLane<Lanes> scale;
  PerLane<Lanes> inverse;
  Values<Lanes> u;
  find_scales<Lanes>(v, scale);
  for (int w = 0; w < Lanes::W; w++) {
    inverse[w] = 1 / scale[w];
    out.scale[w] = scale[w];
    out.mask[w] = 0;
  }
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++) {
      u[i][w] = scaled(v[i][w], scale[w], inverse[w]);
      if (HAS_MASK)
        out.mask[w] |= uint32_t(fabsf(u[i][w]) < Elements::MAX_VALUE) << i;
    }
  round_elements<Lanes>(u, noise);
  if (IS_EDEN) {
    PerBlock<Lanes> vv;
    PerBlock<Lanes> vu;
    sum_products<Lanes>(v, v, vv);
    sum_products<Lanes>(v, u, vu);
    for (int w = 0; w < Lanes::W; w++) {
      out.vv[w] = vv[0][w];
      out.vq[w] = vu[0][w] * scale[w];
    }
  }
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      v[i][w] = packs ? u[i][w] : u[i][w] * scale[w];
}

// The factor that all values of the operand have beside their blocks' scales.
constexpr double PMA_FACTOR = SCALE == Scale::pma ? 1.009276 : 1;
constexpr float CONSTANT_FACTOR = float(PMA_FACTOR / (HAS_THREE_QUARTERS ? .75 : 1.));

// EDEN's S
HOST_DEVICE float eden_correction(float vv, float vq) { return vq == 0 ? 1 : vv / vq; }

// ---- MXFP4, packed

// The code of an element. Of the floats 0, .5, 1, 1.5, 2, 3, 4 and 6, exponent and first bit of
// mantissa together are 0, 252, 254, 255 .. 259. Less 252, the last six of these are the codes.
HOST_DEVICE uint32_t code_of(float element) {
  const int top_bits = int((bits_of(element) >> 22) & 511);
  const int at_most_1 = top_bits < 1 ? top_bits : 1;
  const int code = top_bits - 252 > at_most_1 ? top_bits - 252 : at_most_1;
  return uint32_t(code | sign_bit(element));
}

// Packs the elements of each lane's block: words[n][w] has the codes of elements 8 n .. 8 n + 7.
template <class Lanes>
HOST_DEVICE void pack_elements(const Values<Lanes>& elements, uint32_t (&words)[4][Lanes::W]) {
  UNROLL for (int n = 0; n < 4; n++) {
    for (int w = 0; w < Lanes::W; w++)
      words[n][w] = 0;
    UNROLL for (int i = 0; i < 8; i++)
      for (int w = 0; w < Lanes::W; w++)
        words[n][w] |= code_of(elements[8 * n + i][w]) << (4 * i);
  }
}

// The same, but those of a block that is not finite are zero.
template <class Lanes>
HOST_DEVICE void pack_codes(
    const Values<Lanes>& elements,
    const PerLane<Lanes>& scale,
    uint32_t (&words)[4][Lanes::W]) {
  Lanes::pack(elements, words);
  for (int n = 0; n < 4; n++)
    for (int w = 0; w < Lanes::W; w++)
      words[n][w] = is_finite(scale[w]) ? words[n][w] : 0;
}

// The byte of a scale, which is a power of two or NaN: the exponent of the float.
HOST_DEVICE uint8_t scale_byte(float scale) { return uint8_t(bits_of(scale) >> 23); }

// ---- NVFP4

// The element that a block's largest value is scaled to.
constexpr double largest_element() {
  if (ROUNDING == Rounding::nearest)
    return 6;
  return IS_EDEN ? 6. * 16 / 17 / .93 : 6. * 16 / 17;
}

constexpr double LARGEST_ELEMENT = largest_element();
// The scale of the block with the tensor's largest value.
constexpr double LARGEST_SCALE = SCALE == Scale::absmax && !IS_EDEN ? 448 : 256;

// The scale of a tensor with this largest magnitude.
HOST_DEVICE float nvfp4_tensor_scale(float largest) {
  const float scale = largest / float(LARGEST_SCALE * LARGEST_ELEMENT);
  const float nonzero = scale == 0 ? 1 : scale;
  return is_finite(scale) ? nonzero : float_of(BITS_OF_NAN);
}

HOST_DEVICE float nvfp4_block_scale(float largest, float tensor_scale, double largest_element) {
  const float scale = to_grid<E4M3>(largest / (float(largest_element) * tensor_scale));
  return scale == 0 ? 1 : scale;
}

constexpr float LARGEST_FLOAT = 0x1.FFFFFEp127f;

// u becomes v divided by the scales, by a product with their inverse, which is rounded.
template <class Lanes>
HOST_DEVICE void scale_nvfp4(
    const Values<Lanes>& v,
    const PerBlock<Lanes>& scale,
    float tensor_scale,
    Values<Lanes>& u) {
  PerBlock<Lanes> inverse;
  UNROLL for (int b = 0; b < BLOCKS; b++)
    for (int w = 0; w < Lanes::W; w++) {
      const float exact = 1 / (scale[b][w] * tensor_scale);
      inverse[b][w] = exact > LARGEST_FLOAT ? LARGEST_FLOAT : exact;
    }
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      u[i][w] = v[i][w] * inverse[i / BLOCK_SIZE][w];
}

// The squared error of each block under these scales, in units of the tensor's.
template <class Lanes>
HOST_DEVICE void nvfp4_errors(
    const Values<Lanes>& v,
    const PerBlock<Lanes>& scale,
    float tensor_scale,
    PerBlock<Lanes>& error) {
  Values<Lanes> u;
  Values<Lanes> rounded;
  scale_nvfp4<Lanes>(v, scale, tensor_scale, u);
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      rounded[i][w] = u[i][w];
  Lanes::round_nearest(rounded);
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      u[i][w] = rounded[i][w] - u[i][w];
  sum_products<Lanes>(u, u, error);
  UNROLL for (int b = 0; b < BLOCKS; b++)
    for (int w = 0; w < Lanes::W; w++)
      error[b][w] *= scale[b][w] * scale[b][w];
}

template <class Lanes>
HOST_DEVICE void nvfp4_scales(
    const Values<Lanes>& v, float tensor_scale, PerBlock<Lanes>& scale) {
  PerBlock<Lanes> largest;
  PerBlock<Lanes> larger_scale;             // of Four Over Six: the largest element becomes 4
  block_max<Lanes>(v, largest);
  UNROLL for (int b = 0; b < BLOCKS; b++)
    for (int w = 0; w < Lanes::W; w++) {
      scale[b][w] = nvfp4_block_scale(largest[b][w], tensor_scale, LARGEST_ELEMENT);
      larger_scale[b][w] =
          nvfp4_block_scale(largest[b][w], tensor_scale, LARGEST_ELEMENT * 4 / 6);
    }
  if (SCALE != Scale::four_six)
    return;
  PerBlock<Lanes> error;
  PerBlock<Lanes> error_of_larger;
  nvfp4_errors<Lanes>(v, scale, tensor_scale, error);
  nvfp4_errors<Lanes>(v, larger_scale, tensor_scale, error_of_larger);
  UNROLL for (int b = 0; b < BLOCKS; b++)
    for (int w = 0; w < Lanes::W; w++) {
      const bool is_better = error_of_larger[b][w] < error[b][w];
      scale[b][w] = is_better ? larger_scale[b][w] : scale[b][w];
    }
}

// MS-EDEN: each block's correction goes into its scale, which is rounded stochastically.
template <class Lanes>
HOST_DEVICE void correct_scales(
    const PerBlock<Lanes>& vv,
    const PerBlock<Lanes>& vq,
    const Noise<Lanes>& noise,
    PerBlock<Lanes>& scale) {
  UNROLL for (int b = 0; b < BLOCKS; b++)
    for (int w = 0; w < Lanes::W; w++) {
      const float corrected = scale[b][w] * eden_correction(vv[b][w], vq[b][w]);
      scale[b][w] = to_grid<E4M3>(corrected, noise_of<Lanes>(noise, b * BLOCK_SIZE, w));
    }
}

template <class Lanes>
HOST_DEVICE void quantize_nvfp4(
    Values<Lanes>& v, float tensor_scale, const Noise<Lanes>& noise) {
  PerBlock<Lanes> scale;
  Values<Lanes> u;
  nvfp4_scales<Lanes>(v, tensor_scale, scale);
  scale_nvfp4<Lanes>(v, scale, tensor_scale, u);
  round_elements<Lanes>(u, noise);
  if (IS_EDEN) {
    PerBlock<Lanes> vv;
    PerBlock<Lanes> vq;
    sum_products<Lanes>(v, v, vv);
    sum_products<Lanes>(v, u, vq);
    UNROLL for (int b = 0; b < BLOCKS; b++)
      for (int w = 0; w < Lanes::W; w++)
        vq[b][w] *= scale[b][w] * tensor_scale;
    correct_scales<Lanes>(vv, vq, noise, scale);
  }
  UNROLL for (int i = 0; i < 32; i++)
    for (int w = 0; w < Lanes::W; w++)
      v[i][w] = u[i][w] * scale[i / BLOCK_SIZE][w];
}

}  // namespace columns
