// What an instruction set offers, as one plain table of functions.
//
// This header is included by files compiled for CPUs that this machine may not be. So: no STL, no templates, no inline
// functions. The linker keeps one copy of an inline function, and it may keep the one with illegal instructions.
#pragma once

#include <stdint.h>

namespace mixlocal {

constexpr int kBlock = 64;   // numbers that share a scale, mixlocal.quant.format.BLOCK_SIZE
constexpr int kPanel = 16;   // keys that lie side by side in a KV cache, mixlocal.kernels.PANEL
constexpr int kPage = 64;    // positions of a page of a KV cache, mixlocal.kernels.PAGE
constexpr int kShortRow = 1024;  // columns
constexpr int kChunk = 256;  // keys of one AttendChunk

enum Kind { kFourBit, kAffine, kInt8, kBf16, kFloat };

// A weight [rows, columns] as mixlocal.quant.format describes it.
struct Matrix {
    Kind kind;
    int64_t rows, columns;
    const void* codes;     // uint8 [rows, columns / 2] | int8 | bfloat16 | float32 [rows, columns]
    const void* scales;    // float16 or float32 [rows, planes, blocks] | float32 [rows] | null
    bool half_scales;
    bool fine;             // only for kAffine: the halves of a block have scales and zeros of their own
    const int8_t* levels;  // [16] the codebook in whole steps, only for kFourBit
    float step;            // what one step stands for, 1 unless kFourBit
};

// Activations of some tokens, made ready once for every weight of one kind that they meet.
//
// For kFourBit, kAffine and kInt8 (mixlocal/kernels/integer.py is the specification): per block of 64 columns whole numbers from
// -127 to 127, their scale times the weight's step, and their sum times the bias that the instruction set adds to weights.
// For kAffine `biases` and `others` are the sums of the first and the last 32 whole numbers of each block.
// For kBf16 and kFloat: the numbers themselves. Every row is padded with zeros to whole runs of the kernels.
struct Activations {
    int64_t tokens;
    int8_t* codes;    // [tokens, code_stride]
    float* scales;    // [tokens, block_stride], in the kernels' own order
    int32_t* biases;  // [tokens, block_stride], the same
    int32_t* others;  // [tokens, block_stride], the same, only for kAffine
    float* plain;     // [tokens, plain_stride]
    int64_t code_stride, block_stride, plain_stride;
};

// Up to tile_rows rows of an integer weight, unpacked for many tokens.
struct Tile {
    uint8_t* codes;  // [blocks][16][tile_rows][4]
    float* scales;   // [planes][plane_stride], of each plane [blocks][tile_rows]
    int64_t plane_stride;
};

// Queries of one key/value head over one chunk of its cache.
struct AttendChunk {
    const float* queries;    // [count, head_dim], times 1 / sqrt(head_dim)
    const void* keys[kChunk / kPage];    // of each page that is seen: [kPage / kPanel][head_dim][kPanel], float16 or float32
    const void* values[kChunk / kPage];  // the same: [kPage][value_stride]
    const int64_t* first;    // [count] the first key of the chunk that each query sees, and
    const int64_t* last;     // [count] the one behind its last; first == last: it sees none
    int64_t count, head_dim, value_stride;
    bool half;
    float* scores;           // scratch [count, score_stride]
    int64_t score_stride;    // a multiple of kPanel, at least the largest `last`
    float* tops;             // out [count]: the largest score
    float* totals;           // out [count]: sum of exp(score - top)
    float* mixed;            // out [count, value_stride]: sum of exp(score - top) * value
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
    void* scales;            // float16 or float32 [planes, blocks], or float32 [1]
    bool half_scales;
    bool fine;               // only for quantize_affine, see Matrix
    bool search;             // for the scale, or scale and zero, that lose least
    const float* importance; // [columns] what the square of each column's error counts in that search; null: all the same
    double error, power;     // out: sums of squares of the rounding error and of the source
    bool finite;             // out: false where a NaN or an infinity stopped the row
};

// How many numbers a block of four-bit weights has beside its codes: one scale; or scales, then zeros, of one or two halves.
constexpr int kMostPlanes = 4;

struct KernelTable {
    const char* name;
    int run_columns;   // activations are padded to a multiple of it
    int tile_rows;     // rows of a Tile
    int tile_limit;    // from this many tokens on, `unpack` and `tile` are faster than `dot`,
    int short_limit;   // and from this many for four-bit rows shorter than kShortRow

    // Blocks [block, block + blocks) of one token's row of Activations, from the `columns` numbers at x that begin there;
    // zeros past their end. A NaN or an infinity turns the scale of its block into NaN.
    void (*quantize_activations)(const float* x, int64_t columns, int64_t block, int64_t blocks, Kind kind, float step,
                                 int8_t* codes, float* scales, int32_t* biases, int32_t* others);

    // out[t * out_stride + r - first] = weight[r] . x[t] for rows [first, last) and all tokens, any kind.
    void (*dot)(const Matrix& weight, int64_t first, int64_t last, const Activations& x, float* out, int64_t out_stride);

    // Rows [row, row + tile_rows) and blocks [block, block + blocks) of an integer weight; `block` is a multiple of 8 and `blocks` of 2.
    void (*unpack)(const Matrix& weight, int64_t row, int64_t block, int64_t blocks, const Tile& to);

    // Adds to sums[t][b % 8][r] what block b of `unpack` gives for every token and row. Eight sums add up to an output as
    // ((0 + 1) + (4 + 5)) + ((2 + 3) + (6 + 7)), which times the row's scale is the output.
    void (*tile)(const Tile& tile, const Matrix& weight, const Activations& x, int64_t block, int64_t blocks, float* sums);

    void (*rms_norm)(const float* x, const float* weight, int64_t count, float eps, float* out);  // out may be x
    void (*swiglu)(const float* gate, const float* up, int64_t count, float* out);                // silu(gate) * up
    // Into position `at` of one head's page.
    void (*store_key_value)(const float* key, const float* value, int64_t head_dim, int64_t value_stride, int64_t at, bool half,
                            void* keys, void* values);
    void (*attend)(const AttendChunk& chunk);
    // Joins what a query saw in one chunk to what it saw before: all of its sums are scaled to the larger of the two tops.
    void (*join)(const float* mixed, float top, float total, int64_t count, float* all_mixed, float* all_top, float* all_total);

    void (*quantize_four_bit)(QuantizeRow& row);
    void (*quantize_affine)(QuantizeRow& row);
    void (*quantize_int8)(QuantizeRow& row);
    float (*read)(const void* data, int64_t bytes);  // every byte, for measuring memory; a multiple of 256
};

extern const KernelTable kScalarKernels;
#ifdef MIXLOCAL_X86
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VnniKernels;
#endif
#ifdef MIXLOCAL_NEON
extern const KernelTable kNeonKernels;
#endif

}  // namespace mixlocal
