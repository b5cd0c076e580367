#include <string.h>

#include <algorithm>

#include "operations.h"
#include "pool.h"

namespace mixlocal {
namespace {

constexpr int64_t kTileBlocks = 16;         // blocks unpacked at a time: with 32 rows 32 KiB
constexpr int64_t kFloatTokens = 24;        // tokens of one pass over bfloat16 rows: at 4096 columns 384 KiB
constexpr int64_t kItemBytes = 64 << 10;    // weights of one work item, about
constexpr int64_t kLeastItems = 16;         // work items worth making smaller ones for
constexpr int64_t kManyTokens = 4;          // tokens worth dividing among threads

bool is_integer(Kind kind) { return kind == kFourBit || kind == kAffine || kind == kInt8; }

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

float row_scale(const Matrix& m, int64_t row) { return m.kind == kInt8 ? static_cast<const float*>(m.scales)[row] : 1.0f; }

// out[r] for the rows of a tile: their eight running sums added up, times the rows' scales.
void finish_token(const Matrix& weight, const float* sums, int64_t tile_rows, int64_t row, int64_t count, float* out) {
    for (int64_t r = 0; r < count; ++r) {
        const float* const s = sums + r;
        const float low = (s[0] + s[tile_rows]) + (s[4 * tile_rows] + s[5 * tile_rows]);
        const float high = (s[2 * tile_rows] + s[3 * tile_rows]) + (s[6 * tile_rows] + s[7 * tile_rows]);
        out[r] = (low + high) * row_scale(weight, row + r);
    }
}

void multiply_tiles(const KernelTable& kernels, const Matrix& weight, const Activations& x, int64_t first, int64_t last, float* out,
                    int64_t stride) {
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t rows = kernels.tile_rows, blocks = round_up(weight.columns, 2 * kBlock) / kBlock, sums_size = x.tokens * 8 * rows;
    const Tile tile = {scope.take<uint8_t>(kTileBlocks * kBlock * rows), scope.take<float>(kMostPlanes * kTileBlocks * rows), kTileBlocks * rows};
    float* const sums = scope.take<float>(sums_size);
    for (int64_t row = first; row < last; row += rows) {
        std::fill_n(sums, sums_size, 0.0f);
        for (int64_t block = 0; block < blocks; block += kTileBlocks) {
            const int64_t count = std::min(kTileBlocks, blocks - block);
            kernels.unpack(weight, row, block, count, tile);
            kernels.tile(tile, weight, x, block, count, sums);
        }
        const int64_t present = std::min(rows, last - row);
        for (int64_t t = 0; t < x.tokens; ++t)
            finish_token(weight, sums + t * 8 * rows, rows, row, present, out + t * stride + row - first);
    }
}

void multiply_floats(const KernelTable& kernels, const Matrix& weight, const Activations& x, int64_t first, int64_t last, float* out,
                     int64_t stride) {
    for (int64_t t = 0; t < x.tokens; t += kFloatTokens) {
        Activations some = x;
        some.tokens = std::min(kFloatTokens, x.tokens - t);
        some.plain = x.plain + t * x.plain_stride;
        kernels.dot(weight, first, last, some, out + t * stride, stride);
    }
}

void fill_token(const KernelTable& kernels, const Matrix& weight, const Numbers& x, const Norm* norm, const Activations& to, int64_t t) {
    Arena::Scope scope(Arena::of_this_thread());
    const float* numbers = x.first + t * x.stride;
    float* const plain = is_integer(weight.kind) ? nullptr : to.plain + t * to.plain_stride;
    if (norm) {
        float* const normed = plain ? plain : scope.take<float>(x.columns);
        kernels.rms_norm(numbers, norm->weight, x.columns, norm->eps, normed);
        numbers = normed;
    } else if (plain) {
        memcpy(plain, numbers, static_cast<size_t>(x.columns) * sizeof(float));
    }
    if (plain) std::fill(plain + x.columns, plain + to.plain_stride, 0.0f);
    else kernels.quantize_activations(numbers, x.columns, 0, to.block_stride, weight.kind, weight.step, to.codes + t * to.code_stride,
                                      to.scales + t * to.block_stride, to.biases + t * to.block_stride,
                                      to.others ? to.others + t * to.block_stride : nullptr);
}

bool takes_tiles(const KernelTable& kernels, const Matrix& weight, int64_t tokens) {
    const bool is_short = (weight.kind == kFourBit || weight.kind == kAffine) && weight.columns < kShortRow;
    return is_integer(weight.kind) && tokens >= (is_short ? kernels.short_limit : kernels.tile_limit);
}

// Rows of one work item: about kItemBytes of weights, but fewer where there would be too few items.
int64_t item_rows(const KernelTable& kernels, const Activations& x, const Product* products, int count) {
    int64_t rows = 0;
    for (int i = 0; i < count; ++i) rows += products[i].weight->rows;
    const Matrix& m = *products[0].weight;
    const int64_t bits = m.kind == kFourBit || m.kind == kAffine ? 4 : m.kind == kInt8 ? 8 : m.kind == kBf16 ? 16 : 32;
    const int64_t fitting = std::min(kItemBytes * 8 / std::max<int64_t>(1, m.columns * bits), rows / kLeastItems);
    const int64_t step = takes_tiles(kernels, m, x.tokens) ? kernels.tile_rows : 8;
    return std::max(step, fitting / step * step);
}

}  // namespace

Activations room_for(const KernelTable& kernels, const Matrix& weight, int64_t tokens, Arena::Scope& scope) {
    Activations to = {};
    const int64_t padded = round_up(weight.columns, kernels.run_columns);
    to.tokens = tokens;
    if (is_integer(weight.kind)) {
        to.code_stride = padded;
        to.block_stride = padded / kBlock;
        to.codes = scope.take<int8_t>(tokens * padded);
        to.scales = scope.take<float>(tokens * to.block_stride);
        to.biases = scope.take<int32_t>(tokens * to.block_stride);
        if (weight.kind == kAffine) to.others = scope.take<int32_t>(tokens * to.block_stride);
    } else {
        to.plain_stride = padded + 16;  // off a power of two, so that tokens do not share cache sets
        to.plain = scope.take<float>(tokens * to.plain_stride);
    }
    return to;
}

Activations make_ready(const KernelTable& kernels, const Matrix& weight, const Numbers& x, const Norm* norm, Arena::Scope& scope) {
    const Activations to = room_for(kernels, weight, x.count, scope);
    if (x.count < kManyTokens) {
        for (int64_t t = 0; t < x.count; ++t) fill_token(kernels, weight, x, norm, to, t);
    } else {
        for_each_item(x.count, [&](int64_t t) { fill_token(kernels, weight, x, norm, to, t); });
    }
    return to;
}

void multiply_rows(const KernelTable& kernels, const Matrix& weight, const Activations& x, int64_t first, int64_t last, float* out,
                   int64_t stride) {
    if (!is_integer(weight.kind)) multiply_floats(kernels, weight, x, first, last, out, stride);
    else if (takes_tiles(kernels, weight, x.tokens)) multiply_tiles(kernels, weight, x, first, last, out, stride);
    else kernels.dot(weight, first, last, x, out, stride);
}

void multiply(const KernelTable& kernels, const Activations& x, const Product* products, int count) {
    const int64_t step = item_rows(kernels, x, products, count);
    int64_t items = 0;
    for (int i = 0; i < count; ++i) items += (products[i].weight->rows + step - 1) / step;
    for_each_item(items, [&](int64_t item) {
        int which = 0;
        for (;; ++which) {
            const int64_t own = (products[which].weight->rows + step - 1) / step;
            if (item < own) break;
            item -= own;
        }
        const Product& product = products[which];
        const int64_t rows = product.weight->rows, first = item * step, last = std::min(first + step, rows), width = last - first;
        if (!product.add) {
            multiply_rows(kernels, *product.weight, x, first, last, product.out + first, rows);
            return;
        }
        Arena::Scope scope(Arena::of_this_thread());
        float* const added = scope.take<float>(x.tokens * width);
        multiply_rows(kernels, *product.weight, x, first, last, added, width);
        for (int64_t t = 0; t < x.tokens; ++t)
            for (int64_t r = 0; r < width; ++r) product.out[t * rows + first + r] += added[t * width + r];
    });
}

void linear(const KernelTable& kernels, const Matrix& weight, const Norm* norm, const float* x, int64_t tokens, float* out) {
    if (weight.columns == 0) {
        std::fill_n(out, tokens * weight.rows, 0.0f);
        return;
    }
    Arena::Scope scope(Arena::of_this_thread());
    const Activations ready = make_ready(kernels, weight, {x, tokens, weight.columns, weight.columns}, norm, scope);
    const Product product = {&weight, out, false};
    multiply(kernels, ready, &product, 1);
}

float read_memory(const KernelTable& kernels, const void* data, int64_t bytes) {
    constexpr int64_t kPiece = 1 << 18;
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t pieces = bytes / kPiece;
    float* const sums = scope.take<float>(pieces);
    for_each_item(pieces, [&](int64_t piece) { sums[piece] = kernels.read(static_cast<const char*>(data) + piece * kPiece, kPiece); });
    float sum = 0.0f;
    for (int64_t piece = 0; piece < pieces; ++piece) sum += sums[piece];
    return sum;
}

}  // namespace mixlocal
