// Plain C++ for any machine: vectors are arrays of eight floats, which compilers turn into what the baseline offers.
#include "kernels.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define EACH_LANE for (int i = 0; i < kLanes; ++i)
#define FOUR_BIT_ROWS 1, 1, 1, 1
#define PLAIN_ROWS 1, 1, 1, 1

namespace mixlocal {
namespace {

constexpr int kLanes = 8, kTileRows = 4, kTileVectors = 1, kPrefetchBytes = 256;

struct Floats { float lane[kLanes]; };
struct Words { uint32_t lane[kLanes]; };
struct Lookup { const float* levels; };

INLINE Floats load(const float* from) { Floats v; memcpy(v.lane, from, sizeof v.lane); return v; }
INLINE Floats load_eight(const float* from) { return load(from); }
INLINE void store(float* to, Floats v) { memcpy(to, v.lane, sizeof v.lane); }
INLINE Floats broadcast(float x) { Floats v; EACH_LANE v.lane[i] = x; return v; }
INLINE Floats zeros() { return broadcast(0.0f); }
INLINE Floats spread(const float* scales) { return broadcast(scales[0]); }
INLINE Floats add(Floats a, Floats b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
INLINE Floats multiply(Floats a, Floats b) { EACH_LANE a.lane[i] *= b.lane[i]; return a; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { EACH_LANE c.lane[i] += a.lane[i] * b.lane[i]; return c; }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { EACH_LANE c.lane[i] = a.lane[i] * b.lane[i] - c.lane[i]; return c; }
INLINE float sum(Floats v) {
    const float* l = v.lane;
    return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

INLINE Floats as_floats(Words w) { Floats v; memcpy(v.lane, w.lane, sizeof v.lane); return v; }
INLINE Words as_words(Floats v) { Words w; memcpy(w.lane, v.lane, sizeof w.lane); return w; }
INLINE Floats to_floats(Words w) { Floats v; EACH_LANE v.lane[i] = static_cast<float>(static_cast<int32_t>(w.lane[i])); return v; }
INLINE Words no_words() { Words w; EACH_LANE w.lane[i] = 0; return w; }
INLINE Words load_words(const uint8_t* from) { Words w; memcpy(w.lane, from, sizeof w.lane); return w; }
INLINE void store_bytes(uint8_t* to, Words w) { EACH_LANE to[i] = static_cast<uint8_t>(w.lane[i]); }
INLINE Floats load_bf16(const uint16_t* from) { Words w; EACH_LANE w.lane[i] = static_cast<uint32_t>(from[i]) << 16; return as_floats(w); }
INLINE Floats load_int8(const int8_t* from) { Floats v; EACH_LANE v.lane[i] = from[i]; return v; }

INLINE Lookup lookup_table(const float* levels) { return {levels}; }
INLINE Floats lookup(Lookup table, Words words, int nibble) {
    Floats v;
    EACH_LANE v.lane[i] = table.levels[words.lane[i] >> (4 * nibble) & 15];
    return v;
}

INLINE Words magnitude(Floats v) { Words w = as_words(v); EACH_LANE w.lane[i] &= 0x7fffffff; return w; }
INLINE Words larger(Words a, Words b) { EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }
INLINE uint32_t largest(Words w) { uint32_t top = 0; EACH_LANE top = w.lane[i] > top ? w.lane[i] : top; return top; }
INLINE Floats clamp_unit(Floats v) { EACH_LANE v.lane[i] = v.lane[i] < -1.0f ? -1.0f : v.lane[i] > 1.0f ? 1.0f : v.lane[i]; return v; }
INLINE Words above(Floats v, Floats threshold, Words rank) {
    EACH_LANE rank.lane[i] = 2 * rank.lane[i] + (v.lane[i] > threshold.lane[i]);
    return rank;
}
INLINE Floats pick(Floats table, Words index) { Floats v; EACH_LANE v.lane[i] = table.lane[index.lane[i]]; return v; }
INLINE Words nearest(Floats v) { Words w; EACH_LANE w.lane[i] = static_cast<uint32_t>(lrintf(v.lane[i])); return w; }

// IEEE binary16 by integer arithmetic; the additions of 0.5 and 2^-14 let the float unit round or normalize subnormals.
INLINE float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
INLINE uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }

INLINE float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, shifted = static_cast<uint32_t>(half & 0x7fff) << 13;
    const uint32_t exponent = shifted & 0x0f800000;
    if (exponent == 0x0f800000) return bits_to_float(sign | (shifted + 0x70000000));
    if (exponent == 0) return bits_to_float(sign | float_to_bits(bits_to_float(shifted + 0x38800000) - bits_to_float(0x38800000)));
    return bits_to_float(sign | (shifted + 0x38000000));
}

INLINE uint16_t to_half(float x) {
    const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (size < 0x38800000) return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000));
    return static_cast<uint16_t>(sign | (size + 0xc8000fff + (size >> 13 & 1)) >> 13);
}

#include "kernels_body.inc"

}  // namespace

const KernelTable kScalarKernels = {"scalar", kLanes, kTileRows, kTileVectors, 2, dot, unpack, tile, quantize_four_bit, quantize_int8};

}  // namespace mixlocal
