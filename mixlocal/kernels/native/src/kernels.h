// What an instruction set offers, as one plain table of functions.
//
// This header is included by files compiled for CPUs that this machine may not be. So: no STL, no templates, no inline
// functions. The linker keeps one copy of an inline function, and it may keep the one with illegal instructions.
#pragma once

#include <stdint.h>

namespace mixlocal {

constexpr int kBlock = 64;         // weights that share a scale, mixlocal.quant.format.BLOCK_SIZE
constexpr int kMaxDotTokens = 4;   // most tokens of one `dot`

enum Kind { kFourBit, kInt8, kBf16 };

// A weight [rows, columns] as mixlocal.quant.format describes it.
struct Matrix {
    Kind kind;
    int64_t rows, columns;
    const void* codes;      // uint8 [rows, columns / 2] | int8 [rows, columns] | bfloat16 [rows, columns]
    const void* scales;     // float16 or float32 [rows, blocks] | float32 [rows] | null
    bool half_scales;
    const float* codebook;  // [16], only for kFourBit
};

// One row to quantize, and what came of it.
struct QuantizeRow {
    const void* source;      // bfloat16 or float32 [columns]
    bool bf16;
    int64_t columns;
    const float* levels;     // [16] ascending
    const float* midpoints;  // [15] between them
    const int32_t* order;    // [16] the code of each level
    void* codes;             // uint8 [columns / 2] or int8 [columns]
    void* scales;            // float16 or float32 [blocks], or float32 [1]
    bool half_scales;
    double error, power;     // out: sums of squares of the rounding error and of the source
    bool finite;             // out: false where a NaN or an infinity stopped the row
};

// Activations come in the order in which a kind's codes are cheapest to unpack, padded with zeros to a whole number of
// groups (`linear.cpp` packs them). For 4 bits a group is 8 * lanes numbers: vector k, lane l holds number 8 * l + (k ^ 1),
// which is nibble k of 32-bit word l. For other kinds a group is one vector, in natural order.
struct KernelTable {
    const char* name;
    int lanes;         // floats in a vector, 8 or 16
    int tile_rows;     // `tile` computes tile_rows x (up to tile_vectors * lanes) outputs
    int tile_vectors;
    int dot_limit;     // most tokens for which `dot`, kMaxDotTokens at a time, is faster than `unpack` and `tile`

    // out[t * out_stride + r] = weight[r] . x[t] for rows [first, last), t < tokens <= kMaxDotTokens; x: packed [tokens, stride].
    void (*dot)(const Matrix& weight, int64_t first, int64_t last, const float* x, int64_t x_stride, int tokens, float* out,
                int64_t out_stride);

    // Numbers [begin, begin + count) of a row in packed order, as float32; zeros past its end. Both are multiples of a group.
    void (*unpack)(const Matrix& weight, int64_t row, int64_t begin, int64_t count, float* to);

    // sums[r, t] (+)= sum over k < depth of weights[r, k] * x[t / lanes][k][t % lanes]; `fresh` starts from zero.
    void (*tile)(const float* weights, int64_t weights_stride, const float* x, int64_t x_stride, int64_t depth, float* sums,
                 int64_t sums_stride, int vectors, bool fresh);

    void (*quantize_four_bit)(QuantizeRow& row);
    void (*quantize_int8)(QuantizeRow& row);
};

extern const KernelTable kScalarKernels;
#ifdef MIXLOCAL_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif

}  // namespace mixlocal
