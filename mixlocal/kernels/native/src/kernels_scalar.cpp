// Plain C++ for any machine: vectors are arrays of eight, which compilers turn into what the baseline offers.
#include "kernels.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_HALVES _Pragma("GCC unroll 1")
#define UNROLL_ALL _Pragma("GCC unroll 8")
#define EACH_LANE for (int i = 0; i < kLanes; ++i)
#define EACH_BYTE for (int i = 0; i < 4 * kLanes; ++i)

namespace mixlocal {
namespace {

constexpr int kLanes = 8, kTileGroups = 1, kTileTokens = 2, kDotTokens = 1, kFloatRows = 1, kFloatTokens = 1, kAttendRows = 1, kScorePanels = 1, kMixVectors = 1;
constexpr int kPrefetchBytes = 256;

struct Floats { float lane[kLanes]; };
struct Words { uint32_t lane[kLanes]; };
struct Bytes { int8_t lane[4 * kLanes]; };
typedef Floats Eight;
struct Lookup { const float* levels; };
struct Levels { const int8_t* table; };

INLINE Floats load(const float* from) { Floats v; memcpy(v.lane, from, sizeof v.lane); return v; }
INLINE Floats load_eight(const float* from) { return load(from); }
INLINE void store(float* to, Floats v) { memcpy(to, v.lane, sizeof v.lane); }
INLINE Floats broadcast(float x) { Floats v; EACH_LANE v.lane[i] = x; return v; }
INLINE Floats zeros() { return broadcast(0.0f); }
INLINE Floats add(Floats a, Floats b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
INLINE Floats divide(Floats a, Floats b) { EACH_LANE a.lane[i] /= b.lane[i]; return a; }
INLINE Floats greater(Floats a, Floats b) { EACH_LANE a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return a; }  // b where either is NaN
INLINE Floats lesser(Floats a, Floats b) { EACH_LANE a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return a; }   // the same
INLINE float highest(Floats v) { float top = v.lane[0]; EACH_LANE top = v.lane[i] > top ? v.lane[i] : top; return top; }
INLINE Floats zero_below(Floats x, Floats limit, Floats v) { EACH_LANE if (x.lane[i] < limit.lane[i]) v.lane[i] = 0.0f; return v; }
INLINE Floats multiply(Floats a, Floats b) { EACH_LANE a.lane[i] *= b.lane[i]; return a; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { EACH_LANE c.lane[i] += a.lane[i] * b.lane[i]; return c; }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { EACH_LANE c.lane[i] = a.lane[i] * b.lane[i] - c.lane[i]; return c; }
INLINE float sum(Floats v) {
    const float* l = v.lane;
    return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

INLINE Floats as_floats(Words w) { Floats v; memcpy(v.lane, w.lane, sizeof v.lane); return v; }
INLINE Words float_bits(Floats v) { Words w; memcpy(w.lane, v.lane, sizeof w.lane); return w; }
INLINE Floats to_floats(Words w) { Floats v; EACH_LANE v.lane[i] = static_cast<float>(static_cast<int32_t>(w.lane[i])); return v; }
INLINE Words no_words() { Words w; EACH_LANE w.lane[i] = 0; return w; }
INLINE Words load_words(const uint8_t* from) { Words w; memcpy(w.lane, from, sizeof w.lane); return w; }
INLINE void store_words(uint8_t* to, Words w) { memcpy(to, w.lane, sizeof w.lane); }
INLINE Words broadcast_word(int32_t v) { Words w; EACH_LANE w.lane[i] = static_cast<uint32_t>(v); return w; }
INLINE Words subtract_words(Words a, Words b) { EACH_LANE a.lane[i] -= b.lane[i]; return a; }
INLINE Words add_words(Words a, Words b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
INLINE void store_bytes(uint8_t* to, Words w) { EACH_LANE to[i] = static_cast<uint8_t>(w.lane[i]); }
INLINE Floats load_bf16(const uint16_t* from) { Words w; EACH_LANE w.lane[i] = static_cast<uint32_t>(from[i]) << 16; return as_floats(w); }

INLINE Lookup lookup_table(const float* levels) { return {levels}; }
INLINE Floats lookup(Lookup table, Words index) {
    Floats v;
    EACH_LANE v.lane[i] = table.levels[index.lane[i]];
    return v;
}

INLINE Words magnitude(Floats v) { Words w = float_bits(v); EACH_LANE w.lane[i] &= 0x7fffffff; return w; }
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
INLINE Floats load_halves(const uint16_t* from) { Floats v; EACH_LANE v.lane[i] = from_half(from[i]); return v; }
INLINE Floats times_power_of_two(Floats v, Words power) {
    EACH_LANE v.lane[i] *= bits_to_float((power.lane[i] + 127) << 23);
    return v;
}

// ---- bytes ----

INLINE Bytes load_bytes(const void* from) { Bytes b; memcpy(b.lane, from, sizeof b.lane); return b; }
INLINE Bytes broadcast_four(const int8_t* from) {
    uint32_t four;
    memcpy(&four, from, sizeof four);
    const Words words = broadcast_word(static_cast<int32_t>(four));
    Bytes b;
    memcpy(b.lane, words.lane, sizeof b.lane);
    return b;
}
INLINE Words as_words(Bytes b) { Words w; memcpy(w.lane, b.lane, sizeof w.lane); return w; }
INLINE Bytes as_bytes(Words w) { Bytes b; memcpy(b.lane, w.lane, sizeof b.lane); return b; }
INLINE void settle(Words&) {}

constexpr int kBias = 0;
INLINE Bytes stored_int8(Bytes b) { return b; }
// Products of sixteen bits, added in pairs and again in pairs. Vector types of the compiler's own (GCC, Clang): it finds
// the baseline's instructions for them, which it does not find for loops over bytes.
typedef int8_t Int8s __attribute__((vector_size(4 * kLanes)));
typedef int16_t Int16s __attribute__((vector_size(8 * kLanes)));
typedef int32_t Int32s __attribute__((vector_size(8 * kLanes)));
typedef int64_t Int64s __attribute__((vector_size(8 * kLanes)));

INLINE Words int_dot(Words sum, Bytes weights, Bytes x) {
    Int8s w, v;
    memcpy(&w, weights.lane, sizeof w);
    memcpy(&v, x.lane, sizeof v);
    const Int16s products = __builtin_convertvector(w, Int16s) * __builtin_convertvector(v, Int16s);
    const Int32s whole = (Int32s)products;
    const Int32s pairs = ((whole << 16) >> 16) + (whole >> 16);
    const Int64s quads = (Int64s)pairs;
    const Int64s both = quads + (quads >> 32);  // the lower halves are right, whatever the upper ones carry
    int64_t lanes[kLanes];
    memcpy(lanes, &both, sizeof both);
    EACH_LANE sum.lane[i] += static_cast<uint32_t>(lanes[i]);
    return sum;
}

INLINE Levels level_table(const int8_t* levels) { return {levels}; }
INLINE Levels no_levels() { return {nullptr}; }
INLINE Bytes high_levels(const Levels& levels, Bytes pairs) { EACH_BYTE pairs.lane[i] = levels.table[pairs.lane[i] >> 4 & 15]; return pairs; }
INLINE Bytes low_levels(const Levels& levels, Bytes pairs) { EACH_BYTE pairs.lane[i] = levels.table[pairs.lane[i] & 15]; return pairs; }
INLINE Bytes high_codes(Bytes pairs) { EACH_BYTE pairs.lane[i] = pairs.lane[i] >> 4 & 15; return pairs; }
INLINE Bytes low_codes(Bytes pairs) { EACH_BYTE pairs.lane[i] &= 15; return pairs; }

// Sums of codes times x.
typedef Words Pairs;
INLINE Pairs no_pairs() { return no_words(); }
INLINE Pairs pair_dot(Pairs sum, Bytes codes, Bytes x) { return int_dot(sum, codes, x); }
INLINE Words widen(Words sum, Pairs pairs) { return add_words(sum, pairs); }

// One block of int8.
INLINE Words int8_step(Bytes w0, Bytes w1, Bytes x0, Bytes x1) { return int_dot(int_dot(no_words(), w0, x0), w1, x1); }

// The lanes of each of eight blocks added up: lane b of the result is block b.
INLINE Words add_lanes(const Words* steps) {
    Words sums = no_words();
    for (int b = 0; b < kLanes; ++b) EACH_LANE sums.lane[b] += steps[b].lane[i];
    return sums;
}
// The same of each half of a block: its lower and its upper four lanes.
INLINE void add_half_lanes(const Words* steps, Words* first, Words* second) {
    *first = *second = no_words();
    for (int b = 0; b < kLanes; ++b)
        for (int i = 0; i < kLanes / 2; ++i) {
            first->lane[b] += steps[b].lane[i];
            second->lane[b] += steps[b].lane[kLanes / 2 + i];
        }
}
INLINE Floats in_places(Floats blocks) { return blocks; }
INLINE Eight no_eight() { return zeros(); }
INLINE Eight add_eights(Eight total, Floats blocks) { return add(total, blocks); }
INLINE float sum_eight(Eight v) {
    const float* l = v.lane;
    return ((l[0] + l[1]) + (l[4] + l[5])) + ((l[2] + l[3]) + (l[6] + l[7]));
}

INLINE void transpose_words(Words* rows) {
    for (int r = 0; r < kLanes; ++r)
        for (int w = 0; w < r; ++w) {
            const uint32_t other = rows[r].lane[w];
            rows[r].lane[w] = rows[w].lane[r];
            rows[w].lane[r] = other;
        }
}

#include "body.inc"

}  // namespace

const KernelTable kScalarKernels = KERNEL_TABLE("scalar", 2, 2);

}  // namespace mixlocal
