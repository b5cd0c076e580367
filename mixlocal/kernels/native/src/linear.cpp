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
constexpr int64_t kTileItemRows = 24;  // rows of one work item with many tokens: a multiple of every tile_rows
constexpr int64_t kDepth = 256;        // columns unpacked at a time: 24 KiB, about half of a first-level cache
constexpr int64_t kOffPowerOfTwo = 16;  // floats added to strides, so that rows do not share cache sets
constexpr int64_t kDepthStride = kDepth + kOffPowerOfTwo;
constexpr int64_t kTokens = 512;       // tokens whose sums one work item holds
constexpr int64_t kTokensStride = kTokens + kOffPowerOfTwo;

struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) / 64 + 1) * 64;
    void* const memory = std::aligned_alloc(64, bytes);
    if (!memory) throw std::bad_alloc();
    return Buffer(static_cast<float*>(memory));
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t padded_columns(const KernelTable& kernels, const Matrix& weight) {
    return round_up(weight.columns, weight.kind == kFourBit ? 8 * kernels.lanes : kernels.lanes);
}

// visit(position, column) for the packed positions [begin, end), whole groups (see KernelTable for the order).
template <class Visit>
void for_each_position(const KernelTable& kernels, const Matrix& weight, int64_t begin, int64_t end, const Visit& visit) {
    const int64_t lanes = kernels.lanes;
    if (weight.kind != kFourBit) {
        for (int64_t p = begin; p < end; ++p) visit(p, p);
        return;
    }
    for (int64_t group = begin; group < end; group += 8 * lanes)
        for (int64_t k = 0; k < 8; ++k)
            for (int64_t l = 0; l < lanes; ++l) visit(group + k * lanes + l, group + 8 * l + (k ^ 1));
}

// x [tokens, columns] -> [tokens, stride] in packed order.
void pack_rows(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, int64_t stride, float* to) {
    for (int64_t t = 0; t < tokens; ++t, x += weight.columns, to += stride)
        for_each_position(kernels, weight, 0, padded_columns(kernels, weight),
                          [&](int64_t p, int64_t column) { to[p] = column < weight.columns ? x[column] : 0.0f; });
}

// x [tokens, columns] -> [tokens / lanes, padded, lanes] in packed order, zeros for tokens past the end.
void pack_panels(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, int64_t padded, float* to) {
    const int64_t lanes = kernels.lanes, pieces = (padded + kDepth - 1) / kDepth;
    for_each_item((tokens + lanes - 1) / lanes * pieces, [&](int64_t item) {
        const int64_t first = item / pieces * lanes, begin = item % pieces * kDepth, end = std::min(begin + kDepth, padded);
        const int64_t present = std::min(lanes, tokens - first);
        for_each_position(kernels, weight, begin, end, [&](int64_t p, int64_t column) {
            float* const panel = to + first * padded + p * lanes;
            const int64_t count = column < weight.columns ? present : 0;
            for (int64_t l = 0; l < count; ++l) panel[l] = x[(first + l) * weight.columns + column];
            for (int64_t l = count; l < lanes; ++l) panel[l] = 0.0f;
        });
    });
}

void linear_few(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, float* out) {
    const int64_t stride = padded_columns(kernels, weight) + kOffPowerOfTwo;
    const Buffer packed = allocate(tokens * stride);
    pack_rows(kernels, weight, x, tokens, stride, packed.get());
    for_each_item((weight.rows + kDotRows - 1) / kDotRows, [&](int64_t item) {
        const int64_t first = item * kDotRows, last = std::min(first + kDotRows, weight.rows);
        for (int64_t t = 0; t < tokens; t += kMaxDotTokens) {
            const int count = static_cast<int>(std::min<int64_t>(kMaxDotTokens, tokens - t));
            kernels.dot(weight, first, last, packed.get() + t * stride, stride, count, out + t * weight.rows, weight.rows);
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
    if (weight.columns == 0) std::fill_n(out, tokens * weight.rows, 0.0f);
    else if (tokens <= kernels.dot_limit) linear_few(kernels, weight, x, tokens, out);
    else linear_many(kernels, weight, x, tokens, out);
}

}  // namespace mixlocal
