#include "operations.h"
#include "pool.h"

#include <string.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace mixlocal {
namespace {

constexpr int64_t kDotRows = 32;       // rows of one work item with few tokens
constexpr int64_t kDotLimit = 6;       // most tokens for which unpacking in registers, kMaxDotTokens at a time, wins
constexpr int64_t kTileItemRows = 24;  // rows of one work item with many tokens: a multiple of every tile_rows
constexpr int64_t kDepth = 256;        // columns unpacked at a time: 24 KiB, about half of a first-level cache
constexpr int64_t kDepthStride = kDepth + 16;  // off the power of two, so that rows do not share cache sets
constexpr int64_t kTokens = 512;       // tokens whose sums one work item holds
constexpr int64_t kTokensStride = kTokens + 16;

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    void* const memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return Buffer(static_cast<float*>(memory));
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t padded_columns(const KernelTable& kernels, const Matrix& weight) {
    return round_up(weight.columns, weight.kind == kFourBit ? 8 * kernels.lanes : kernels.lanes);
}

// Which column stands at a packed position (see KernelTable).
int64_t column_at(const KernelTable& kernels, const Matrix& weight, int64_t position) {
    if (weight.kind != kFourBit) return position;
    const int64_t lanes = kernels.lanes, group = position / (8 * lanes), k = position / lanes % 8, lane = position % lanes;
    return group * 8 * lanes + 8 * lane + (k ^ 1);
}

// x [tokens, columns] -> [tokens, padded] in packed order.
void pack_rows(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, int64_t padded, float* to) {
    for (int64_t p = 0; p < padded; ++p) {
        const int64_t column = column_at(kernels, weight, p);
        for (int64_t t = 0; t < tokens; ++t) to[t * padded + p] = column < weight.columns ? x[t * weight.columns + column] : 0.0f;
    }
}

// x [tokens, columns] -> [tokens / lanes, padded, lanes] in packed order, zeros for tokens past the end.
void pack_panels(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, int64_t padded, float* to) {
    const int64_t lanes = kernels.lanes, pieces = (padded + kDepth - 1) / kDepth;
    for_each_item((tokens + lanes - 1) / lanes * pieces, [&](int64_t item) {
        const int64_t first = item / pieces * lanes, begin = item % pieces * kDepth, end = std::min(begin + kDepth, padded);
        for (int64_t p = begin; p < end; ++p) {
            const int64_t column = column_at(kernels, weight, p);
            float* const panel = to + first * padded + p * lanes;
            for (int64_t l = 0; l < lanes; ++l)
                panel[l] = column < weight.columns && first + l < tokens ? x[(first + l) * weight.columns + column] : 0.0f;
        }
    });
}

void linear_few(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, float* out) {
    const int64_t padded = padded_columns(kernels, weight);
    const Buffer packed = allocate(tokens * padded);
    pack_rows(kernels, weight, x, tokens, padded, packed.get());
    for_each_item((weight.rows + kDotRows - 1) / kDotRows, [&](int64_t item) {
        const int64_t first = item * kDotRows, last = std::min(first + kDotRows, weight.rows);
        for (int64_t t = 0; t < tokens; t += kMaxDotTokens) {
            const int count = static_cast<int>(std::min<int64_t>(kMaxDotTokens, tokens - t));
            kernels.dot(weight, first, last, packed.get() + t * padded, padded, count, out + t * weight.rows, weight.rows);
        }
    });
}

struct Panels {
    const float* x;  // [tokens / lanes, padded, lanes]
    int64_t padded;
};

// sums [rows, tokens of the chunk] for the rows from `first`, over all columns.
void multiply_rows(const KernelTable& kernels, const Matrix& weight, int64_t first, int64_t rows, Panels panels, int64_t tokens,
                   float* sums) {
    alignas(64) float weights[kTileItemRows * kDepthStride];
    if (rows < kTileItemRows) memset(weights, 0, sizeof weights);
    const int64_t vectors = (tokens + kernels.lanes - 1) / kernels.lanes;
    for (int64_t begin = 0; begin < panels.padded; begin += kDepth) {
        const int64_t depth = std::min(kDepth, panels.padded - begin);
        for (int64_t r = 0; r < rows; ++r) kernels.unpack(weight, first + r, begin, depth, weights + r * kDepthStride);
        for (int64_t v = 0; v < vectors; v += kernels.tile_vectors) {
            const float* const x = panels.x + (v * panels.padded + begin) * kernels.lanes;
            const int count = static_cast<int>(std::min<int64_t>(kernels.tile_vectors, vectors - v));
            for (int64_t r = 0; r < rows; r += kernels.tile_rows)
                kernels.tile(weights + r * kDepthStride, kDepthStride, x, panels.padded * kernels.lanes, depth,
                             sums + r * kTokensStride + v * kernels.lanes, kTokensStride, count, begin == 0);
        }
    }
}

void linear_many(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, float* out) {
    const int64_t padded = padded_columns(kernels, weight);
    const Buffer packed = allocate(round_up(tokens, kernels.lanes) * padded);
    pack_panels(kernels, weight, x, tokens, padded, packed.get());
    for_each_item((weight.rows + kTileItemRows - 1) / kTileItemRows, [&](int64_t item) {
        alignas(64) float sums[kTileItemRows * kTokensStride];
        const int64_t first = item * kTileItemRows, rows = std::min(kTileItemRows, weight.rows - first);
        for (int64_t begin = 0; begin < tokens; begin += kTokens) {
            const int64_t count = std::min(kTokens, tokens - begin);
            multiply_rows(kernels, weight, first, rows, {packed.get() + begin * padded, padded}, count, sums);
            for (int64_t t = 0; t < count; ++t)
                for (int64_t r = 0; r < rows; ++r) out[(begin + t) * weight.rows + first + r] = sums[r * kTokensStride + t];
        }
    });
}

}  // namespace

void linear(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, float* out) {
    if (tokens <= kDotLimit) linear_few(kernels, weight, x, tokens, out);
    else linear_many(kernels, weight, x, tokens, out);
}

}  // namespace mixlocal
