// AVX2, FMA and F16C: eight lanes.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define UNROLL_HALVES _Pragma("GCC unroll 2")
#define UNROLL_ALL _Pragma("GCC unroll 16")

namespace mixlocal {
namespace {

constexpr int kLanes = 8, kTileGroups = 2, kTileTokens = 4, kDotTokens = 4, kFloatRows = 4, kFloatTokens = 2, kAttendRows = 4, kScorePanels = 1, kMixVectors = 2;
constexpr int kPrefetchBytes = 4096;

typedef __m256 Floats;
typedef __m256i Words;
typedef __m256i Bytes;
typedef __m256 Eight;
struct Lookup { Floats low, high; };  // levels 0-7 and 8-15
struct Levels { Bytes table; };

INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
INLINE Floats load_eight(const float* from) { return _mm256_loadu_ps(from); }
INLINE void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
INLINE Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b where either is NaN
INLINE Floats lesser(Floats a, Floats b) { return _mm256_min_ps(a, b); }   // the same
INLINE float highest(Floats v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
INLINE Floats zero_below(Floats x, Floats limit, Floats v) { return _mm256_andnot_ps(_mm256_cmp_ps(x, limit, _CMP_LT_OQ), v); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
INLINE float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE Words float_bits(Floats v) { return _mm256_castps_si256(v); }
INLINE Floats to_floats(Words w) { return _mm256_cvtepi32_ps(w); }
INLINE Words no_words() { return _mm256_setzero_si256(); }
INLINE Words load_words(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
INLINE void store_words(uint8_t* to, Words w) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), w); }
INLINE Words broadcast_word(int32_t w) { return _mm256_set1_epi32(w); }
INLINE Words subtract_words(Words a, Words b) { return _mm256_sub_epi32(a, b); }
INLINE Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
INLINE void store_bytes(uint8_t* to, Words w) {  // the low byte of each word
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(pairs, pairs));
}
INLINE Floats load_bf16(const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

INLINE Lookup lookup_table(const float* levels) { return {load(levels), load(levels + 8)}; }
INLINE Floats lookup(const Lookup& table, Words index) {  // a permutation reads the low three bits, the blend the fourth
    const Floats top_bit = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index), top_bit);
}

INLINE Words magnitude(Floats v) { return _mm256_and_si256(float_bits(v), _mm256_set1_epi32(0x7fffffff)); }
INLINE Words larger(Words a, Words b) { return _mm256_max_epi32(a, b); }
INLINE uint32_t largest(Words w) {
    __m128i top = _mm_max_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1))));
}
INLINE Floats clamp_unit(Floats v) { return _mm256_min_ps(_mm256_max_ps(v, broadcast(-1.0f)), broadcast(1.0f)); }
INLINE Words above(Floats v, Floats threshold, Words rank) {
    const Words mask = _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ));
    return _mm256_sub_epi32(_mm256_add_epi32(rank, rank), mask);
}
INLINE Floats pick(Floats table, Words index) { return _mm256_permutevar8x32_ps(table, index); }
INLINE Words nearest(Floats v) { return _mm256_cvtps_epi32(v); }

INLINE float from_half(uint16_t half) { return _cvtsh_ss(half); }
INLINE uint16_t to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE Floats load_halves(const uint16_t* from) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
INLINE Floats times_power_of_two(Floats v, Words power) {
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power, _mm256_set1_epi32(127)), 23)));
}

// ---- bytes ----

INLINE Bytes load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
INLINE Bytes broadcast_four(const int8_t* from) {
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
}
INLINE Words as_words(Bytes b) { return b; }
INLINE Bytes as_bytes(Words w) { return w; }
// Computed by here and in a register: GCC puts off sums of sums until it runs out of registers.
INLINE void settle(Words& w) { asm("" : "+x"(w)); }

constexpr int kBias = 0;
INLINE Bytes stored_int8(Bytes b) { return b; }
INLINE Words int_dot(Words sum, Bytes weights, Bytes x) {  // the sign of the weights goes to x: |w| * x fits sixteen bits
    const Words pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE Levels level_table(const int8_t* levels) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)))};
}
INLINE Levels no_levels() { return {_mm256_setzero_si256()}; }
INLINE Bytes high_levels(const Levels& levels, Bytes pairs) {
    return _mm256_shuffle_epi8(levels.table, _mm256_and_si256(_mm256_srli_epi16(pairs, 4), _mm256_set1_epi8(15)));
}
INLINE Bytes low_levels(const Levels& levels, Bytes pairs) {
    return _mm256_shuffle_epi8(levels.table, _mm256_and_si256(pairs, _mm256_set1_epi8(15)));
}
INLINE Bytes high_codes(Bytes pairs) { return _mm256_and_si256(_mm256_srli_epi16(pairs, 4), _mm256_set1_epi8(15)); }
INLINE Bytes low_codes(Bytes pairs) { return _mm256_and_si256(pairs, _mm256_set1_epi8(15)); }

// Sums of sixteen bits of codes times x.
typedef __m256i Pairs;
INLINE Pairs no_pairs() { return _mm256_setzero_si256(); }
INLINE Pairs pair_dot(Pairs sum, Bytes codes, Bytes x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x)); }
INLINE Words widen(Words sum, Pairs pairs) { return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))); }

// One block of int8.
INLINE Words int8_step(Bytes w0, Bytes w1, Bytes x0, Bytes x1) { return int_dot(int_dot(no_words(), w0, x0), w1, x1); }

// The lanes of each of eight blocks added up: lane b of the result is block b. `first` and `second`: of the lower and the
// upper four lanes of a block.
INLINE void add_half_lanes(const Words* steps, Words* first, Words* second) {
    const Words low = _mm256_hadd_epi32(_mm256_hadd_epi32(steps[0], steps[1]), _mm256_hadd_epi32(steps[2], steps[3]));
    const Words high = _mm256_hadd_epi32(_mm256_hadd_epi32(steps[4], steps[5]), _mm256_hadd_epi32(steps[6], steps[7]));
    *first = _mm256_permute2x128_si256(low, high, 0x20);
    *second = _mm256_permute2x128_si256(low, high, 0x31);
}
INLINE Words add_lanes(const Words* steps) {
    Words first, second;
    add_half_lanes(steps, &first, &second);
    return _mm256_add_epi32(first, second);
}
INLINE Floats in_places(Floats blocks) { return blocks; }
INLINE Eight no_eight() { return _mm256_setzero_ps(); }
INLINE Eight add_eights(Eight total, Floats blocks) { return _mm256_add_ps(total, blocks); }
INLINE float sum_eight(Eight v) {
    const __m128 pairs = _mm_hadd_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quads = _mm_add_ps(pairs, _mm_movehl_ps(pairs, pairs));
    return _mm_cvtss_f32(_mm_add_ss(quads, _mm_movehdup_ps(quads)));
}

// rows[r], word w -> rows[w], word r
INLINE void transpose_words(Words* rows) {
    Words quads[8];
    UNROLL
    for (int g = 0; g < 2; ++g) {
        const Words* const r = rows + 4 * g;
        const Words ab_low = _mm256_unpacklo_epi32(r[0], r[1]), ab_high = _mm256_unpackhi_epi32(r[0], r[1]);
        const Words cd_low = _mm256_unpacklo_epi32(r[2], r[3]), cd_high = _mm256_unpackhi_epi32(r[2], r[3]);
        quads[4 * g] = _mm256_unpacklo_epi64(ab_low, cd_low);
        quads[4 * g + 1] = _mm256_unpackhi_epi64(ab_low, cd_low);
        quads[4 * g + 2] = _mm256_unpacklo_epi64(ab_high, cd_high);
        quads[4 * g + 3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
    UNROLL
    for (int j = 0; j < 4; ++j) {
        rows[j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x20);
        rows[4 + j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x31);
    }
}

#include "body.inc"

}  // namespace

const KernelTable kAvx2Kernels = KERNEL_TABLE("avx2", 5, 3);

}  // namespace mixlocal
