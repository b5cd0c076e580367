// AArch64 with NEON and the dot product extension: eight lanes, in two registers.
#include "kernels.h"

#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_HALVES _Pragma("GCC unroll 2")
#define UNROLL_ALL _Pragma("GCC unroll 16")

namespace mixlocal {
namespace {

constexpr int kLanes = 8, kTileGroups = 2, kTileTokens = 4, kDotTokens = 4, kFloatRows = 4, kFloatTokens = 2, kAttendRows = 4, kScorePanels = 1, kMixVectors = 2;
constexpr int kPrefetchBytes = 4096;

struct Floats { float32x4_t low, high; };
struct Words { uint32x4_t low, high; };
struct Bytes { int8x16_t low, high; };
typedef Floats Eight;
struct Lookup { uint8x16x4_t levels; };
struct Levels { int8x16_t table; };

INLINE Floats load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
INLINE Floats load_eight(const float* from) { return load(from); }
INLINE void store(float* to, Floats v) {
    vst1q_f32(to, v.low);
    vst1q_f32(to + 4, v.high);
}
INLINE Floats broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
INLINE Floats zeros() { return broadcast(0.0f); }
INLINE Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
INLINE Floats divide(Floats a, Floats b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
INLINE Floats greater(Floats a, Floats b) {  // b where either is NaN, which vmaxq_f32 would return
    return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
INLINE Floats lesser(Floats a, Floats b) {  // the same
    return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
}
INLINE float highest(Floats v) { return vmaxvq_f32(vmaxq_f32(v.low, v.high)); }
INLINE float32x4_t zero_where(uint32x4_t mask, float32x4_t v) { return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), mask)); }
INLINE Floats zero_below(Floats x, Floats limit, Floats v) {
    return {zero_where(vcltq_f32(x.low, limit.low), v.low), zero_where(vcltq_f32(x.high, limit.high), v.high)};
}
INLINE Floats multiply(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return multiply_add(a, b, {vnegq_f32(c.low), vnegq_f32(c.high)}); }
INLINE float sum(Floats v) {
    const float32x4_t half = vaddq_f32(v.low, v.high);
    return vpadds_f32(vadd_f32(vget_low_f32(half), vget_high_f32(half)));
}

INLINE Words float_bits(Floats v) { return {vreinterpretq_u32_f32(v.low), vreinterpretq_u32_f32(v.high)}; }
INLINE Floats bits_to_floats(Words w) { return {vreinterpretq_f32_u32(w.low), vreinterpretq_f32_u32(w.high)}; }
INLINE Floats to_floats(Words w) { return {vcvtq_f32_s32(vreinterpretq_s32_u32(w.low)), vcvtq_f32_s32(vreinterpretq_s32_u32(w.high))}; }
INLINE Words load_words(const uint8_t* from) { return {vreinterpretq_u32_u8(vld1q_u8(from)), vreinterpretq_u32_u8(vld1q_u8(from + 16))}; }
INLINE void store_words(uint8_t* to, Words w) {
    vst1q_u8(to, vreinterpretq_u8_u32(w.low));
    vst1q_u8(to + 16, vreinterpretq_u8_u32(w.high));
}
INLINE Words broadcast_word(int32_t w) { return {vreinterpretq_u32_s32(vdupq_n_s32(w)), vreinterpretq_u32_s32(vdupq_n_s32(w))}; }
INLINE Words no_words() { return broadcast_word(0); }
INLINE Words subtract_words(Words a, Words b) { return {vsubq_u32(a.low, b.low), vsubq_u32(a.high, b.high)}; }
INLINE Words add_words(Words a, Words b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
INLINE void store_bytes(uint8_t* to, Words w) {  // the low byte of each word
    vst1_u8(to, vmovn_u16(vuzp1q_u16(vreinterpretq_u16_u32(w.low), vreinterpretq_u16_u32(w.high))));
}
INLINE Floats load_bf16(const uint16_t* from) {
    const uint16x8_t halves = vld1q_u16(from), none = vdupq_n_u16(0);
    return {vreinterpretq_f32_u16(vzip1q_u16(none, halves)), vreinterpretq_f32_u16(vzip2q_u16(none, halves))};
}

INLINE uint8x16_t float_bytes(const float* from) { return vreinterpretq_u8_f32(vld1q_f32(from)); }
INLINE uint8x16_t bytes_of(uint32x4_t index) {  // where the four bytes of each word lie in a table of words
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404));
}
INLINE Lookup lookup_table(const float* levels) {
    return {{{float_bytes(levels), float_bytes(levels + 4), float_bytes(levels + 8), float_bytes(levels + 12)}}};
}
INLINE float32x4_t lookup_four(const Lookup& table, uint32x4_t index) {
    return vreinterpretq_f32_u8(vqtbl4q_u8(table.levels, bytes_of(index)));
}
INLINE Floats lookup(const Lookup& table, Words index) { return {lookup_four(table, index.low), lookup_four(table, index.high)}; }

INLINE Words magnitude(Floats v) { return float_bits({vabsq_f32(v.low), vabsq_f32(v.high)}); }
INLINE Words larger(Words a, Words b) { return {vmaxq_u32(a.low, b.low), vmaxq_u32(a.high, b.high)}; }
INLINE uint32_t largest(Words w) { return vmaxvq_u32(vmaxq_u32(w.low, w.high)); }
INLINE Floats clamp_unit(Floats v) { return lesser(greater(v, broadcast(-1.0f)), broadcast(1.0f)); }
INLINE Words above(Floats v, Floats threshold, Words rank) {
    const Words mask = {vcgtq_f32(v.low, threshold.low), vcgtq_f32(v.high, threshold.high)};
    return subtract_words(add_words(rank, rank), mask);
}
INLINE Floats pick(Floats table, Words index) {
    const uint8x16x2_t bytes = {{vreinterpretq_u8_f32(table.low), vreinterpretq_u8_f32(table.high)}};
    return {vreinterpretq_f32_u8(vqtbl2q_u8(bytes, bytes_of(index.low))), vreinterpretq_f32_u8(vqtbl2q_u8(bytes, bytes_of(index.high)))};
}
INLINE Words nearest(Floats v) { return {vreinterpretq_u32_s32(vcvtnq_s32_f32(v.low)), vreinterpretq_u32_s32(vcvtnq_s32_f32(v.high))}; }

INLINE float from_half(uint16_t half) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0); }
INLINE uint16_t to_half(float x) { return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0); }
INLINE Floats load_halves(const uint16_t* from) {
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(from));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}
INLINE Floats times_power_of_two(Floats v, Words power) {
    const Words exponent = add_words(power, broadcast_word(127));
    return multiply(v, bits_to_floats({vshlq_n_u32(exponent.low, 23), vshlq_n_u32(exponent.high, 23)}));
}

// ---- bytes ----

INLINE Bytes load_bytes(const void* from) {
    const int8_t* const bytes = static_cast<const int8_t*>(from);
    return {vld1q_s8(bytes), vld1q_s8(bytes + 16)};
}
INLINE Bytes broadcast_four(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return {all, all};
}
INLINE Words as_words(Bytes b) { return {vreinterpretq_u32_s8(b.low), vreinterpretq_u32_s8(b.high)}; }
INLINE Bytes as_bytes(Words w) { return {vreinterpretq_s8_u32(w.low), vreinterpretq_s8_u32(w.high)}; }
// Computed by here and in a register: GCC puts off sums of sums until it runs out of registers.
INLINE void settle(Words& w) { asm("" : "+w"(w.low), "+w"(w.high)); }

constexpr int kBias = 0;
INLINE Bytes stored_int8(Bytes b) { return b; }
INLINE uint32x4_t dot_four(uint32x4_t sum, int8x16_t weights, int8x16_t x) {
    return vreinterpretq_u32_s32(vdotq_s32(vreinterpretq_s32_u32(sum), weights, x));
}
INLINE Words int_dot(Words sum, Bytes weights, Bytes x) {
    return {dot_four(sum.low, weights.low, x.low), dot_four(sum.high, weights.high, x.high)};
}

INLINE Levels level_table(const int8_t* levels) { return {vld1q_s8(levels)}; }
INLINE Levels no_levels() { return {vdupq_n_s8(0)}; }
INLINE uint8x16_t high_nibbles(int8x16_t pairs) { return vshrq_n_u8(vreinterpretq_u8_s8(pairs), 4); }
INLINE uint8x16_t low_nibbles(int8x16_t pairs) { return vandq_u8(vreinterpretq_u8_s8(pairs), vdupq_n_u8(15)); }
INLINE Bytes high_levels(const Levels& levels, Bytes pairs) {
    return {vqtbl1q_s8(levels.table, high_nibbles(pairs.low)), vqtbl1q_s8(levels.table, high_nibbles(pairs.high))};
}
INLINE Bytes low_levels(const Levels& levels, Bytes pairs) {
    return {vqtbl1q_s8(levels.table, low_nibbles(pairs.low)), vqtbl1q_s8(levels.table, low_nibbles(pairs.high))};
}
INLINE Bytes high_codes(Bytes pairs) { return {vreinterpretq_s8_u8(high_nibbles(pairs.low)), vreinterpretq_s8_u8(high_nibbles(pairs.high))}; }
INLINE Bytes low_codes(Bytes pairs) { return {vreinterpretq_s8_u8(low_nibbles(pairs.low)), vreinterpretq_s8_u8(low_nibbles(pairs.high))}; }

// Sums of codes times x.
typedef Words Pairs;
INLINE Pairs no_pairs() { return no_words(); }
INLINE Pairs pair_dot(Pairs sum, Bytes codes, Bytes x) { return int_dot(sum, codes, x); }
INLINE Words widen(Words sum, Pairs pairs) { return add_words(sum, pairs); }

// One block of int8.
INLINE Words int8_step(Bytes w0, Bytes w1, Bytes x0, Bytes x1) { return int_dot(int_dot(no_words(), w0, x0), w1, x1); }

// The lanes of each of eight blocks added up: lane b of the result is block b.
INLINE uint32x4_t add_pairs(Words a, Words b) { return vpaddq_u32(vaddq_u32(a.low, a.high), vaddq_u32(b.low, b.high)); }
INLINE Words add_lanes(const Words* steps) {
    return {vpaddq_u32(add_pairs(steps[0], steps[1]), add_pairs(steps[2], steps[3])),
            vpaddq_u32(add_pairs(steps[4], steps[5]), add_pairs(steps[6], steps[7]))};
}
// The same of each half of a block: its lower and its upper four lanes.
INLINE uint32x4_t add_four(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) { return vpaddq_u32(vpaddq_u32(a, b), vpaddq_u32(c, d)); }
INLINE void add_half_lanes(const Words* s, Words* first, Words* second) {
    *first = {add_four(s[0].low, s[1].low, s[2].low, s[3].low), add_four(s[4].low, s[5].low, s[6].low, s[7].low)};
    *second = {add_four(s[0].high, s[1].high, s[2].high, s[3].high), add_four(s[4].high, s[5].high, s[6].high, s[7].high)};
}
INLINE Floats in_places(Floats blocks) { return blocks; }
INLINE Eight no_eight() { return zeros(); }
INLINE Eight add_eights(Eight total, Floats blocks) { return add(total, blocks); }
INLINE float sum_eight(Eight v) {
    const float32x4_t pairs = vpaddq_f32(v.low, v.high);
    return vpadds_f32(vadd_f32(vget_low_f32(pairs), vget_high_f32(pairs)));
}

// Four words of each of four rows -> a column in each.
struct Quads { uint32x4_t column[4]; };
INLINE Quads transpose_four(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    const uint64x2_t ab_even = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), ab_odd = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
    const uint64x2_t cd_even = vreinterpretq_u64_u32(vtrn1q_u32(c, d)), cd_odd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
    return {{vreinterpretq_u32_u64(vtrn1q_u64(ab_even, cd_even)), vreinterpretq_u32_u64(vtrn1q_u64(ab_odd, cd_odd)),
             vreinterpretq_u32_u64(vtrn2q_u64(ab_even, cd_even)), vreinterpretq_u32_u64(vtrn2q_u64(ab_odd, cd_odd))}};
}

// rows[r], word w -> rows[w], word r
INLINE void transpose_words(Words* rows) {
    const Quads top_left = transpose_four(rows[0].low, rows[1].low, rows[2].low, rows[3].low);
    const Quads top_right = transpose_four(rows[0].high, rows[1].high, rows[2].high, rows[3].high);
    const Quads bottom_left = transpose_four(rows[4].low, rows[5].low, rows[6].low, rows[7].low);
    const Quads bottom_right = transpose_four(rows[4].high, rows[5].high, rows[6].high, rows[7].high);
    UNROLL
    for (int w = 0; w < 4; ++w) {
        rows[w] = {top_left.column[w], bottom_left.column[w]};
        rows[4 + w] = {top_right.column[w], bottom_right.column[w]};
    }
}

#include "body.inc"

}  // namespace

const KernelTable kNeonKernels = KERNEL_TABLE("neon", 4, 4);

}  // namespace mixlocal
