// AVX-512 (F, BW, VL, DQ): sixteen floats, and a table of sixteen levels in one register.
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#define FOUR_BIT_ROWS 4, 2, 1, 2
#define PLAIN_ROWS 4, 4, 2, 2

namespace mixlocal {
namespace {

constexpr int kLanes = 16, kTileRows = 8, kTileVectors = 3, kPrefetchBytes = 1024;

typedef __m512 Floats;
typedef __m512i Words;
struct Lookup { Floats levels; };

INLINE Floats load(const float* from) { return _mm512_loadu_ps(from); }
INLINE Floats load_eight(const float* from) { return _mm512_castps256_ps512(_mm256_loadu_ps(from)); }
INLINE void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
INLINE Floats zeros() { return _mm512_setzero_ps(); }
INLINE Floats spread(const float* scales) {  // one block in the lower eight lanes, the next in the upper
    return _mm512_mask_broadcastss_ps(broadcast(scales[0]), 0xff00, _mm_set_ss(scales[1]));
}
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats multiply_subtract(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
INLINE float sum(Floats v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}

INLINE Words as_words(Floats v) { return _mm512_castps_si512(v); }
INLINE Floats to_floats(Words w) { return _mm512_cvtepi32_ps(w); }
INLINE Words no_words() { return _mm512_setzero_si512(); }
INLINE Words load_words(const uint8_t* from) { return _mm512_loadu_si512(from); }
INLINE void store_bytes(uint8_t* to, Words w) {  // the low byte of each word
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(w));
}
INLINE Floats load_bf16(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE Floats load_int8(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

INLINE Lookup lookup_table(const float* levels) { return {load(levels)}; }
INLINE Floats lookup(const Lookup& table, Words words, int nibble) {  // a permutation reads the low four bits
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, static_cast<unsigned>(4 * nibble)), table.levels);
}

INLINE Words magnitude(Floats v) { return _mm512_and_si512(as_words(v), _mm512_set1_epi32(0x7fffffff)); }
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

#include "kernels_body.inc"

}  // namespace

const KernelTable kAvx512Kernels = {"avx512", kLanes, kTileRows, kTileVectors, 8, dot, unpack, tile, quantize_four_bit, quantize_int8};

}  // namespace mixlocal
