#include <string.h>

#include <algorithm>

#include "operations.h"
#include "pool.h"

namespace mixlocal {
namespace {

constexpr int64_t kHiddenRows = 128;  // rows of w1 and w3 in one work item
constexpr int64_t kOutputRows = 32;   // rows of w2 in one work item

bool takes_all(const Share& share, int64_t tokens) {
    if (share.count != tokens) return false;
    for (int64_t i = 0; i < tokens; ++i)
        if (share.tokens[i] != i) return false;
    return true;
}

// The activations of a share's tokens, side by side. like: a weight that they are ready for.
Activations gather(const KernelTable& kernels, const Matrix& like, const Activations& all, const Share& share, Arena::Scope& scope) {
    if (takes_all(share, all.tokens)) return all;
    Activations own = room_for(kernels, like, share.count, scope);
    for (int64_t i = 0; i < share.count; ++i) {
        const int64_t t = share.tokens[i];
        if (own.codes) {
            memcpy(own.codes + i * own.code_stride, all.codes + t * all.code_stride, static_cast<size_t>(own.code_stride));
            memcpy(own.scales + i * own.block_stride, all.scales + t * all.block_stride, static_cast<size_t>(own.block_stride) * sizeof(float));
            memcpy(own.biases + i * own.block_stride, all.biases + t * all.block_stride, static_cast<size_t>(own.block_stride) * sizeof(int32_t));
            if (own.others) memcpy(own.others + i * own.block_stride, all.others + t * all.block_stride, static_cast<size_t>(own.block_stride) * sizeof(int32_t));
        } else {
            memcpy(own.plain + i * own.plain_stride, all.plain + t * all.plain_stride, static_cast<size_t>(own.plain_stride) * sizeof(float));
        }
    }
    return own;
}

// All tokens, made ready once for each format among the weights that they meet.
class Inputs {
public:
    Inputs(const KernelTable& kernels, const Numbers& x, Arena::Scope& scope) : kernels_(kernels), x_(x), scope_(scope) {}

    const Activations& of(const Matrix& weight) {
        for (int i = 0; i < count_; ++i)
            if (ready_[i].like->kind == weight.kind && ready_[i].like->step == weight.step) return ready_[i].x;
        ready_[count_] = {&weight, make_ready(kernels_, weight, x_, nullptr, scope_)};
        return ready_[count_++].x;
    }

private:
    struct Ready {
        const Matrix* like;
        Activations x;
    };
    static constexpr int kFormats = 8;  // kinds, and the two codebooks of kFourBit
    const KernelTable& kernels_;
    const Numbers x_;
    Arena::Scope& scope_;
    Ready ready_[kFormats] = {};
    int count_ = 0;
};

// What a share's tokens meet w1 and w3 with, and what comes of that.
struct Part {
    Activations gate, up, hidden;
};

// silu(w1 x) * (w3 x) for the rows from `first`, as activations for w2.
void gate_and_up(const KernelTable& kernels, const Expert& expert, const Part& part, int64_t first) {
    const Activations& hidden = part.hidden;
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t rows = expert.w1.rows, last = std::min(first + kHiddenRows, rows), width = last - first;
    float* const gate = scope.take<float>(hidden.tokens * width);
    float* const up = scope.take<float>(hidden.tokens * width);
    multiply_rows(kernels, expert.w1, part.gate, first, last, gate, width);
    multiply_rows(kernels, expert.w3, part.up, first, last, up, width);
    const Matrix& next = expert.w2;
    for (int64_t t = 0; t < hidden.tokens; ++t) {
        float* const out = hidden.codes ? gate + t * width : hidden.plain + t * hidden.plain_stride + first;
        kernels.swiglu(gate + t * width, up + t * width, width, out);
        if (hidden.codes) {
            const int64_t block = first / kBlock, blocks = last < rows ? kHiddenRows / kBlock : hidden.block_stride - block;
            kernels.quantize_activations(out, width, block, blocks, next.kind, next.step, hidden.codes + t * hidden.code_stride,
                                         hidden.scales + t * hidden.block_stride, hidden.biases + t * hidden.block_stride,
                                         hidden.others ? hidden.others + t * hidden.block_stride : nullptr);
        } else if (last == rows) {
            std::fill(out + width, hidden.plain + (t + 1) * hidden.plain_stride, 0.0f);
        }
    }
}

// Rows [first, last) of w2 for all shares, added up in their order.
void down(const KernelTable& kernels, const Share* shares, int count, const Part* parts, int64_t tokens, int64_t first,
          int64_t last, float* out) {
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t width = last - first, dim = shares[0].expert->w2.rows;
    int64_t most = 0;  // a token that chose an expert twice is in its share twice
    for (int s = 0; s < count; ++s) most = std::max(most, shares[s].count);
    float* const product = scope.take<float>(most * width);
    float* const sums = scope.take<float>(tokens * width);
    std::fill_n(sums, tokens * width, 0.0f);
    for (int s = 0; s < count; ++s) {
        multiply_rows(kernels, shares[s].expert->w2, parts[s].hidden, first, last, product, width);
        for (int64_t i = 0; i < shares[s].count; ++i)
            for (int64_t r = 0; r < width; ++r)
                sums[shares[s].tokens[i] * width + r] += shares[s].weights[i] * product[i * width + r];
    }
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < width; ++r) out[t * dim + first + r] += sums[t * width + r];
}

}  // namespace

void moe_ffn(const KernelTable& kernels, const float* x, int64_t tokens, const Share* shares, int count, float* out) {
    if (count == 0) return;
    Arena::Scope scope(Arena::of_this_thread());
    const Expert& any = *shares[0].expert;
    const int64_t dim = any.w1.columns, chunks = (any.w1.rows + kHiddenRows - 1) / kHiddenRows;
    Inputs inputs(kernels, {x, tokens, dim, dim}, scope);
    Part* const parts = scope.take<Part>(count);
    for (int s = 0; s < count; ++s) {
        const Matrix &w1 = shares[s].expert->w1, &w3 = shares[s].expert->w3;
        const Activations &gate = inputs.of(w1), &up = inputs.of(w3);
        parts[s].gate = gather(kernels, w1, gate, shares[s], scope);
        parts[s].up = &up == &gate ? parts[s].gate : gather(kernels, w3, up, shares[s], scope);
        parts[s].hidden = room_for(kernels, shares[s].expert->w2, shares[s].count, scope);
    }
    for_each_item(count * chunks, [&](int64_t item) {
        const int64_t s = item / chunks;
        gate_and_up(kernels, *shares[s].expert, parts[s], item % chunks * kHiddenRows);
    });
    for_each_item((dim + kOutputRows - 1) / kOutputRows, [&](int64_t item) {
        const int64_t first = item * kOutputRows;
        down(kernels, shares, count, parts, tokens, first, std::min(first + kOutputRows, dim), out);
    });
}

}  // namespace mixlocal
