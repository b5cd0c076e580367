// AVX2, FMA and F16C: eight floats.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define FOUR_BIT_ROWS 2, 2, 1, 1
#define PLAIN_ROWS 4, 4, 2, 2

namespace mixlocal {
namespace {

constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2, kPrefetchBytes = 1024;

typedef __m256 Floats;
typedef __m256i Words;
struct Lookup { Floats low, high; };  // levels 0-7 and 8-15

INLINE Floats load(const float* from) { return _mm256_loadu_ps(from); }
INLINE Floats load_eight(const float* from) { return _mm256_loadu_ps(from); }
INLINE void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
INLINE Floats broadcast(float x) { return _mm256_set1_ps(x); }
INLINE Floats zeros() { return _mm256_setzero_ps(); }
INLINE Floats spread(const float* scales) { return _mm256_set1_ps(scales[0]); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
INLINE float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

INLINE Words as_words(Floats v) { return _mm256_castps_si256(v); }
INLINE Floats to_floats(Words w) { return _mm256_cvtepi32_ps(w); }
INLINE Words no_words() { return _mm256_setzero_si256(); }
INLINE Words load_words(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
INLINE void store_bytes(uint8_t* to, Words w) {  // the low byte of each word
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(pairs, pairs));
}
INLINE Floats load_bf16(const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
INLINE Floats load_int8(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}

INLINE Lookup lookup_table(const float* levels) { return {load(levels), load(levels + 8)}; }
INLINE Floats lookup(const Lookup& table, Words words, int nibble) {
    const Words index = _mm256_srli_epi32(words, 4 * nibble);  // a permutation reads the low three bits, the blend the fourth
    const Floats top_bit = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * nibble));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index), top_bit);
}

INLINE Words magnitude(Floats v) { return _mm256_and_si256(as_words(v), _mm256_set1_epi32(0x7fffffff)); }
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

#include "kernels_body.inc"

}  // namespace

const KernelTable kAvx2Kernels = {"avx2", kLanes, kTileRows, kTileVectors, 12, dot, unpack, tile, quantize_four_bit, quantize_int8};

}  // namespace mixlocal
