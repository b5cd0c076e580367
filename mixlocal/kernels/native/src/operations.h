// The operations of the module: threads and blocking over the functions of a KernelTable. Every output is computed by one
// thread, in an order that depends neither on the number of threads nor on what else is computed.
#pragma once

#include "arena.h"
#include "kernels.h"

namespace mixlocal {

// `count` rows of float32 numbers and the distance from one to the next.
struct Numbers {
    const float* first;
    int64_t count, columns, stride;
};

// Activations for `weight`, or for any other weight of its kind and width. With `norm` the rows are normalised first.
struct Norm {
    const float* weight;
    float eps;
};
Activations make_ready(const KernelTable& kernels, const Matrix& weight, const Numbers& x, const Norm* norm, Arena::Scope& scope);

// Room for `tokens` activations, not filled.
Activations room_for(const KernelTable& kernels, const Matrix& weight, int64_t tokens, Arena::Scope& scope);

// out[t * stride + r - first] = weight[r] . x[t] for rows [first, last); on the calling thread.
void multiply_rows(const KernelTable& kernels, const Matrix& weight, const Activations& x, int64_t first, int64_t last, float* out,
                   int64_t stride);

// out [tokens, rows] = x * weight^T, or added to what is there.
struct Product {
    const Matrix* weight;
    float* out;
    bool add;
};
void multiply(const KernelTable& kernels, const Activations& x, const Product* products, int count);

// out [tokens, rows] = x * weight^T, of normalised rows with `norm`.
void linear(const KernelTable& kernels, const Matrix& weight, const Norm* norm, const float* x, int64_t tokens, float* out);

// One attention layer and what it is applied to. Heads are [n_heads, head_dim] in a row of q, [n_kv_heads, head_dim] of k and v.
struct Attention {
    const float* norm;  // [dim]
    float eps;
    Matrix q, k, v, o;
    int64_t n_heads, n_kv_heads, head_dim, window;  // window: keys that a token sees, itself included; 0: all
};
// Pages of one layer's keys and values, any number of sequences'.
struct KeyValues {
    void* keys;    // [pages][n_kv_heads][kPage / kPanel][head_dim][kPanel]
    void* values;  // [pages][n_kv_heads][kPage][value_stride]
    int64_t value_stride;
    bool half;
};
// The tokens of a pass are those of one sequence after the other.
struct Sequences {
    int64_t count;
    const int64_t* starts;  // [count] the position of its first token
    const int64_t* counts;  // [count] its tokens, at least one
    const int64_t* pages;   // [count, most_pages] where its positions [kPage * i, kPage * (i + 1)) lie
    int64_t most_pages;
};
// hidden [tokens, dim] += attention(norm(hidden)). cos, sin: [tokens, head_dim].
void attention(const KernelTable& kernels, const Attention& layer, float* hidden, const Sequences& sequences, const float* cos,
               const float* sin, const KeyValues& cache);

struct Router {
    const float* norm;    // [dim]
    float eps;
    const float* weight;  // [experts, dim]
    int64_t dim, experts, top_k;
};
// normed [tokens, dim], ids and weights [tokens, top_k]: softmax over all experts, the largest kept and renormalised.
void route(const KernelTable& kernels, const Router& router, const float* hidden, int64_t tokens, float* normed, int64_t* ids,
           float* weights);

struct Expert {
    Matrix w1, w3, w2;
};
// The tokens of one expert, ascending.
struct Share {
    const Expert* expert;
    int64_t count;
    const int64_t* tokens;
    const float* weights;
};
// out [tokens, dim] += sum over shares, in their order, of weights * w2(silu(w1 x) * (w3 x)).
void moe_ffn(const KernelTable& kernels, const float* x, int64_t tokens, const Share* shares, int count, float* out);

struct QuantizeResult {
    double error, power;  // sums of squares
    int64_t bad;          // flat index of the first NaN or infinity, or -1
};
// Quantizes [rows, columns] into codes and scales; `first` describes row 0, its codebook fields only for kFourBit.
QuantizeResult quantize(const KernelTable& kernels, Kind kind, const QuantizeRow& first, int64_t rows);

// Reads every byte of `data` with all threads.
float read_memory(const KernelTable& kernels, const void* data, int64_t bytes);

}  // namespace mixlocal
