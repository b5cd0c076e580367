#include <math.h>

#include <algorithm>

#include "operations.h"
#include "pool.h"

namespace mixlocal {
namespace {

constexpr int64_t kManyTokens = 4;  // tokens worth dividing among threads

// The `count` largest scores, best first and of equals the first, and their weights, which sum to one.
void choose(const float* logits, int64_t experts, int64_t count, int64_t* ids, float* weights) {
    const float top = *std::max_element(logits, logits + experts);
    float sum = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; ++e) {
            const bool taken = std::find(ids, ids + k, e) != ids + k;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        ids[k] = best;
        weights[k] = expf(logits[best] - top);
        sum += weights[k];
    }
    for (int64_t k = 0; k < count; ++k) weights[k] /= sum;
}

}  // namespace

void route(const KernelTable& kernels, const Router& router, const float* hidden, int64_t tokens, float* normed, int64_t* ids,
           float* weights) {
    const Matrix matrix = {kFloat, router.experts, router.dim, router.weight, nullptr, false, false, nullptr, 1.0f};
    const auto one = [&](int64_t t) {
        Arena::Scope scope(Arena::of_this_thread());
        float* const own = normed + t * router.dim;
        kernels.rms_norm(hidden + t * router.dim, router.norm, router.dim, router.eps, own);
        const Activations x = make_ready(kernels, matrix, {own, 1, router.dim, router.dim}, nullptr, scope);
        float* const logits = scope.take<float>(router.experts);
        kernels.dot(matrix, 0, router.experts, x, logits, router.experts);
        choose(logits, router.experts, router.top_k, ids + t * router.top_k, weights + t * router.top_k);
    };
    if (tokens < kManyTokens) {
        for (int64_t t = 0; t < tokens; ++t) one(t);
    } else {
        for_each_item(tokens, one);
    }
}

}  // namespace mixlocal
