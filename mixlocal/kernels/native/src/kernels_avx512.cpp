// AVX-512 (F, BW, VL, DQ): sixteen lanes. kernels_avx512vnni.cpp compiles this file once more with VNNI's byte products.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_HALVES _Pragma("GCC unroll 2")
#define UNROLL_ALL _Pragma("GCC unroll 32")

namespace mixlocal {
namespace {

constexpr int kLanes = 16, kTileGroups = 2, kTileTokens = 6, kDotTokens = 4, kFloatRows = 4, kFloatTokens = 6, kAttendRows = 6, kScorePanels = 2, kMixVectors = 4;
constexpr int kPrefetchBytes = 8192;

typedef __m512 Floats;
typedef __m512i Words;
typedef __m512i Bytes;
typedef __m256 Eight;
struct Lookup { Floats levels; };
struct Levels { Bytes table; };

INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE Floats load_eight(const float* from) { return _mm512_castps256_ps512(_mm256_loadu_ps(from)); }
INLINE void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is NaN
INLINE Floats lesser(Floats a, Floats b) { return _mm512_min_ps(a, b); }   // the same
INLINE float highest(Floats v) { return _mm512_reduce_max_ps(v); }
INLINE Floats zero_below(Floats x, Floats limit, Floats v) { return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(x, limit, _CMP_LT_OQ), _mm512_setzero_ps()); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
INLINE float sum(Floats v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE Words float_bits(Floats v) { return _mm512_castps_si512(v); }
INLINE Floats to_floats(Words w) { return _mm512_cvtepi32_ps(w); }
INLINE Words no_words() { return _mm512_setzero_si512(); }
INLINE Words load_words(const uint8_t* from) { return _mm512_loadu_si512(from); }
INLINE void store_words(uint8_t* to, Words w) { _mm512_storeu_si512(to, w); }
INLINE Words broadcast_word(int32_t w) { return _mm512_set1_epi32(w); }
INLINE Words subtract_words(Words a, Words b) { return _mm512_sub_epi32(a, b); }
INLINE Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
INLINE void store_bytes(uint8_t* to, Words w) {  // the low byte of each word
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(w));
}
INLINE Floats load_bf16(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

INLINE Lookup lookup_table(const float* levels) { return {load(levels)}; }
INLINE Floats lookup(const Lookup& table, Words index) { return _mm512_permutexvar_ps(index, table.levels); }

INLINE Words magnitude(Floats v) { return _mm512_and_si512(float_bits(v), _mm512_set1_epi32(0x7fffffff)); }
INLINE Words larger(Words a, Words b) { return _mm512_max_epi32(a, b); }
INLINE uint32_t largest(Words w) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(w)); }
INLINE Floats clamp_unit(Floats v) { return _mm512_min_ps(_mm512_max_ps(v, broadcast(-1.0f)), broadcast(1.0f)); }
INLINE Words above(Floats v, Floats threshold, Words rank) {
    const Words doubled = _mm512_add_epi32(rank, rank);
    return _mm512_mask_add_epi32(doubled, _mm512_cmp_ps_mask(v, threshold, _CMP_GT_OQ), doubled, _mm512_set1_epi32(1));
}
INLINE Floats pick(Floats table, Words index) { return _mm512_permutexvar_ps(index, table); }
INLINE Words nearest(Floats v) { return _mm512_cvtps_epi32(v); }

INLINE float from_half(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE Floats load_halves(const uint16_t* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
INLINE Floats times_power_of_two(Floats v, Words power) {
    return _mm512_mul_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(power, _mm512_set1_epi32(127)), 23)));
}

// ---- bytes ----

INLINE Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
INLINE Bytes broadcast_four(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm512_set1_epi32(four);
}
INLINE Words as_words(Bytes b) { return b; }
INLINE Bytes as_bytes(Words w) { return w; }
// Computed by here and in a register: GCC puts off sums of sums until it runs out of registers.
INLINE void settle(Words& w) { asm("" : "+v"(w)); }

#ifdef MIXLOCAL_VNNI
constexpr int kBias = 128;  // weights are stored as unsigned bytes, 128 more than they are
INLINE Bytes stored_int8(Bytes b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }
INLINE Words int_dot(Words sum, Bytes weights, Bytes x) { return _mm512_dpbusd_epi32(sum, weights, x); }
#else
constexpr int kBias = 0;
INLINE Bytes stored_int8(Bytes b) { return b; }
INLINE Words int_dot(Words sum, Bytes weights, Bytes x) {  // the sign of the weights goes to x: |w| * x fits sixteen bits
    const Bytes turned = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weights), _mm512_setzero_si512(), x);
    const Words pairs = _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(weights), turned), _mm512_set1_epi16(1));
    return _mm512_add_epi32(sum, pairs);
}
#endif

INLINE Levels level_table(const int8_t* levels) {
    return {stored_int8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels))))};
}
INLINE Levels no_levels() { return {_mm512_setzero_si512()}; }
INLINE Bytes high_levels(const Levels& levels, Bytes pairs) {
    return _mm512_shuffle_epi8(levels.table, _mm512_and_si512(_mm512_srli_epi16(pairs, 4), _mm512_set1_epi8(15)));
}
INLINE Bytes low_levels(const Levels& levels, Bytes pairs) {
    return _mm512_shuffle_epi8(levels.table, _mm512_and_si512(pairs, _mm512_set1_epi8(15)));
}
INLINE Bytes high_codes(Bytes pairs) { return _mm512_and_si512(_mm512_srli_epi16(pairs, 4), _mm512_set1_epi8(15)); }
INLINE Bytes low_codes(Bytes pairs) { return _mm512_and_si512(pairs, _mm512_set1_epi8(15)); }

// Sums of codes times x: of sixteen bits, or of thirty-two where that is one instruction.
typedef __m512i Pairs;
INLINE Pairs no_pairs() { return _mm512_setzero_si512(); }
#ifdef MIXLOCAL_VNNI
INLINE Pairs pair_dot(Pairs sum, Bytes codes, Bytes x) { return _mm512_dpbusd_epi32(sum, codes, x); }
INLINE Words widen(Words sum, Pairs pairs) { return _mm512_add_epi32(sum, pairs); }
#else
INLINE Pairs pair_dot(Pairs sum, Bytes codes, Bytes x) { return _mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, x)); }
INLINE Words widen(Words sum, Pairs pairs) { return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))); }
#endif

// Two blocks of int8: the sums of the first in the lower eight lanes.
INLINE Words int8_step(Bytes w0, Bytes w1, Bytes x0, Bytes x1) {
    const Words a = int_dot(no_words(), stored_int8(w0), x0), b = int_dot(no_words(), stored_int8(w1), x1);
    return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, 0x44), _mm512_shuffle_i64x2(a, b, 0xee));
}

// The lanes of each block of each of eight steps added up. Lane 0 of the result is block 0, then come blocks 2, 4, 6, 1, 3,
// 5, 7, and the next eight blocks in the same order.
// `first` and `second`: of the lower and the upper four lanes of a block.
INLINE void add_half_lanes(const Words* steps, Words* first, Words* second) {
    Words four[2];
    UNROLL
    for (int i = 0; i < 2; ++i) {
        const Words* const s = steps + 4 * i;
        const Words ab = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
        const Words cd = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    *first = _mm512_shuffle_i32x4(four[0], four[1], 0x88);
    *second = _mm512_shuffle_i32x4(four[0], four[1], 0xdd);
}
INLINE Words add_lanes(const Words* steps) {
    Words first, second;
    add_half_lanes(steps, &first, &second);
    return _mm512_add_epi32(first, second);
}
INLINE Floats in_places(Floats blocks) {
    return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15), blocks);
}
INLINE Eight no_eight() { return _mm256_setzero_ps(); }
INLINE Eight add_eights(Eight total, Floats blocks) {  // the first eight blocks, then the next
    return _mm256_add_ps(_mm256_add_ps(total, _mm512_castps512_ps256(blocks)), _mm512_extractf32x8_ps(blocks, 1));
}
INLINE float sum_eight(Eight v) {
    const __m128 pairs = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quads = _mm_add_ps(pairs, _mm_movehl_ps(pairs, pairs));
    return _mm_cvtss_f32(_mm_add_ss(quads, _mm_movehdup_ps(quads)));
}

// rows[r], word w -> rows[w], word r
INLINE void transpose_words(Words* rows) {
    Words quads[16];
    UNROLL
    for (int g = 0; g < 4; ++g) {
        const Words* const r = rows + 4 * g;
        const Words ab_low = _mm512_unpacklo_epi32(r[0], r[1]), ab_high = _mm512_unpackhi_epi32(r[0], r[1]);
        const Words cd_low = _mm512_unpacklo_epi32(r[2], r[3]), cd_high = _mm512_unpackhi_epi32(r[2], r[3]);
        quads[g] = _mm512_unpacklo_epi64(ab_low, cd_low);
        quads[4 + g] = _mm512_unpackhi_epi64(ab_low, cd_low);
        quads[8 + g] = _mm512_unpacklo_epi64(ab_high, cd_high);
        quads[12 + g] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    UNROLL
    for (int j = 0; j < 4; ++j) {
        const Words* const q = quads + 4 * j;
        const Words a = _mm512_shuffle_i32x4(q[0], q[1], 0x44), b = _mm512_shuffle_i32x4(q[2], q[3], 0x44);
        const Words c = _mm512_shuffle_i32x4(q[0], q[1], 0xee), d = _mm512_shuffle_i32x4(q[2], q[3], 0xee);
        rows[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        rows[4 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        rows[8 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        rows[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
}

#include "body.inc"

}  // namespace

#ifdef MIXLOCAL_VNNI
const KernelTable kAvx512VnniKernels = KERNEL_TABLE("avx512vnni", 4, 4);
#else
const KernelTable kAvx512Kernels = KERNEL_TABLE("avx512", 4, 4);
#endif

}  // namespace mixlocal
