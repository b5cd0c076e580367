#include <math.h>
#include <string.h>

#include <algorithm>

#include "operations.h"
#include "pool.h"

namespace mixlocal {
namespace {

constexpr int64_t kChunk = 256;         // keys of one AttendChunk, a multiple of kPanel
constexpr int64_t kQueries = 12;        // queries that share a pass over the keys, about
constexpr int64_t kManyTokens = 4;      // tokens worth dividing among threads
constexpr int64_t kItemsPerThread = 4;  // with fewer tiles than this, chunks are divided among threads too
constexpr int64_t kSmallWork = 1 << 14; // multiply-adds that are done before another thread wakes up

// What one forward pass through one layer works on.
struct Pass {
    const KernelTable& kernels;
    const Attention& layer;
    const KeyValues& cache;
    int64_t tokens, start;
    float *q, *k, *v;  // [tokens, heads * head_dim]
    float* mixed;      // [tokens, n_heads * head_dim]

    int64_t group() const { return layer.n_heads / layer.n_kv_heads; }  // query heads that share a key/value head
    int64_t tile_tokens() const { return std::max<int64_t>(1, kQueries / group()); }
    int64_t tiles() const { return (tokens + tile_tokens() - 1) / tile_tokens(); }
    int64_t first_key(int64_t t) const { return layer.window ? std::max<int64_t>(0, start + t + 1 - layer.window) : 0; }
    int64_t value_stride() const { return cache.value_stride; }
    int64_t element() const { return cache.half ? 2 : 4; }
    char* keys(int64_t head) const { return static_cast<char*>(cache.keys) + head * cache.capacity * layer.head_dim * element(); }
    char* values(int64_t head) const { return static_cast<char*>(cache.values) + head * cache.capacity * value_stride() * element(); }
};

// Some tokens of one key/value head: what their queries are and what they have seen so far.
struct QueryTile {
    int64_t head, first, count;  // tokens [first, first + count); rows are token by token, query head by query head
    float *queries, *tops, *totals, *mixed;

    int64_t rows(const Pass& pass) const { return count * pass.group(); }
};

// x [heads, d] * cos + rotated x * sin (RoFormer, arXiv 2104.09864), times `factor`.
void rotate(float* x, int64_t heads, int64_t d, const float* cos, const float* sin, float factor) {
    const int64_t half = d / 2;
    for (int64_t h = 0; h < heads; ++h, x += d) {
        for (int64_t i = 0; i < half; ++i) {
            const float left = x[i], right = x[i + half];
            x[i] = (left * cos[i] - right * sin[i]) * factor;
            x[i + half] = (right * cos[i + half] + left * sin[i + half]) * factor;
        }
    }
}

void rotate_and_store(const Pass& pass, int64_t t, const float* cos, const float* sin) {
    const Attention& layer = pass.layer;
    const int64_t d = layer.head_dim;
    const float scale = 1.0f / sqrtf(static_cast<float>(d));
    rotate(pass.q + t * layer.n_heads * d, layer.n_heads, d, cos + t * d, sin + t * d, scale);
    rotate(pass.k + t * layer.n_kv_heads * d, layer.n_kv_heads, d, cos + t * d, sin + t * d, 1.0f);
    for (int64_t h = 0; h < layer.n_kv_heads; ++h) {
        const int64_t at = (t * layer.n_kv_heads + h) * d;
        pass.kernels.store_key_value(pass.k + at, pass.v + at, d, pass.value_stride(), pass.start + t, pass.cache.half, pass.keys(h),
                                     pass.values(h));
    }
}

QueryTile query_tile(const Pass& pass, int64_t index, Arena::Scope& scope) {
    QueryTile tile = {};
    tile.head = index % pass.layer.n_kv_heads;
    tile.first = index / pass.layer.n_kv_heads * pass.tile_tokens();
    tile.count = std::min(pass.tile_tokens(), pass.tokens - tile.first);
    const int64_t rows = tile.rows(pass), d = pass.layer.head_dim;
    tile.queries = scope.take<float>(rows * d);
    tile.tops = scope.take<float>(rows);
    tile.totals = scope.take<float>(rows);
    tile.mixed = scope.take<float>(rows * pass.value_stride());
    std::fill_n(tile.tops, rows, -INFINITY);
    std::fill_n(tile.totals, rows, 0.0f);
    std::fill_n(tile.mixed, rows * pass.value_stride(), 0.0f);
    for (int64_t t = 0; t < tile.count; ++t)
        memcpy(tile.queries + t * pass.group() * d, pass.q + ((tile.first + t) * pass.layer.n_heads + tile.head * pass.group()) * d,
               static_cast<size_t>(pass.group() * d) * sizeof(float));
    return tile;
}

// What the tile's queries see in chunk `index` of the cache, into tops, totals and mixed; `sees` [rows]: whether anything.
struct Seen {
    float *tops, *totals, *mixed;
    bool* sees;
};

Seen room_for_seen(const Pass& pass, int64_t rows, Arena::Scope& scope) {
    return {scope.take<float>(rows), scope.take<float>(rows), scope.take<float>(rows * pass.value_stride()), scope.take<bool>(rows)};
}

void look(const Pass& pass, const QueryTile& tile, int64_t index, const Seen& seen) {
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t rows = tile.rows(pass), begin = index * kChunk, d = pass.layer.head_dim;
    int64_t* const first = scope.take<int64_t>(rows);
    int64_t* const last = scope.take<int64_t>(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t t = tile.first + row / pass.group();
        last[row] = std::clamp<int64_t>(pass.start + t + 1 - begin, 0, kChunk);
        first[row] = std::clamp<int64_t>(pass.first_key(t) - begin, 0, last[row]);
        seen.sees[row] = first[row] < last[row];
    }
    AttendChunk chunk = {};
    chunk.queries = tile.queries;
    chunk.keys = pass.keys(tile.head) + begin * d * pass.element();
    chunk.values = pass.values(tile.head) + begin * pass.value_stride() * pass.element();
    chunk.first = first;
    chunk.last = last;
    chunk.count = rows;
    chunk.head_dim = d;
    chunk.value_stride = pass.value_stride();
    chunk.half = pass.cache.half;
    chunk.scores = scope.take<float>(rows * kChunk);
    chunk.score_stride = kChunk;
    chunk.tops = seen.tops;
    chunk.totals = seen.totals;
    chunk.mixed = seen.mixed;
    pass.kernels.attend(chunk);
}

void join(const Pass& pass, const QueryTile& tile, const Seen& seen) {
    for (int64_t row = 0; row < tile.rows(pass); ++row) {
        const int64_t at = row * pass.value_stride();
        if (seen.sees[row])
            pass.kernels.join(seen.mixed + at, seen.tops[row], seen.totals[row], pass.value_stride(), tile.mixed + at, tile.tops + row,
                              tile.totals + row);
    }
}

void finish(const Pass& pass, const QueryTile& tile) {
    const int64_t d = pass.layer.head_dim;
    for (int64_t row = 0; row < tile.rows(pass); ++row) {
        const int64_t t = tile.first + row / pass.group(), head = tile.head * pass.group() + row % pass.group();
        for (int64_t i = 0; i < d; ++i)
            pass.mixed[(t * pass.layer.n_heads + head) * d + i] = tile.mixed[row * pass.value_stride() + i] / tile.totals[row];
    }
}

// One item per tile: its chunks one after the other.
void attend_by_tile(const Pass& pass, int64_t index) {
    Arena::Scope scope(Arena::of_this_thread());
    const QueryTile tile = query_tile(pass, index, scope);
    const Seen seen = room_for_seen(pass, tile.rows(pass), scope);
    const int64_t begin = pass.first_key(tile.first) / kChunk, end = (pass.start + tile.first + tile.count - 1) / kChunk;
    for (int64_t chunk = begin; chunk <= end; ++chunk) {
        look(pass, tile, chunk, seen);
        join(pass, tile, seen);
    }
    finish(pass, tile);
}

// One item per tile and chunk, joined afterwards: for few tokens and many keys. The same operations in the same order.
void attend_by_chunk(const Pass& pass, int64_t tiles) {
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t begin = pass.first_key(0) / kChunk, chunks = (pass.start + pass.tokens - 1) / kChunk + 1 - begin;
    QueryTile* const all = scope.take<QueryTile>(tiles);
    Seen* const seen = scope.take<Seen>(tiles * chunks);
    for (int64_t i = 0; i < tiles; ++i) {
        all[i] = query_tile(pass, i, scope);
        for (int64_t c = 0; c < chunks; ++c) seen[i * chunks + c] = room_for_seen(pass, all[i].rows(pass), scope);
    }
    for_each_item(tiles * chunks, [&](int64_t item) { look(pass, all[item / chunks], begin + item % chunks, seen[item]); });
    for (int64_t i = 0; i < tiles; ++i) {
        for (int64_t c = 0; c < chunks; ++c) join(pass, all[i], seen[i * chunks + c]);
        finish(pass, all[i]);
    }
}

void attend(const Pass& pass) {
    const int64_t tiles = pass.tiles() * pass.layer.n_kv_heads, keys = pass.start + pass.tokens;
    if (keys * pass.tokens * pass.layer.n_heads * pass.layer.head_dim <= kSmallWork) {
        for (int64_t i = 0; i < tiles; ++i) attend_by_tile(pass, i);
    } else if (tiles < kItemsPerThread * threads() && keys > kChunk) {
        attend_by_chunk(pass, tiles);
    } else {
        for_each_item(tiles, [&](int64_t i) { attend_by_tile(pass, i); });
    }
}

}  // namespace

void attention(const KernelTable& kernels, const Attention& layer, float* hidden, int64_t tokens, int64_t start, const float* cos,
               const float* sin, const KeyValues& cache) {
    if (tokens == 0) return;
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t queries = layer.n_heads * layer.head_dim, keys = layer.n_kv_heads * layer.head_dim, dim = layer.q.columns;
    const Pass pass = {kernels, layer, cache, tokens, start, scope.take<float>(tokens * queries), scope.take<float>(tokens * keys),
                       scope.take<float>(tokens * keys), scope.take<float>(tokens * queries)};
    const Norm norm = {layer.norm, layer.eps};
    const Activations normed = make_ready(kernels, layer.q, {hidden, tokens, dim, dim}, &norm, scope);
    const Product projections[] = {{&layer.q, pass.q, false}, {&layer.k, pass.k, false}, {&layer.v, pass.v, false}};
    multiply(kernels, normed, projections, 3);
    if (tokens < kManyTokens) {
        for (int64_t t = 0; t < tokens; ++t) rotate_and_store(pass, t, cos, sin);
    } else {
        for_each_item(tokens, [&](int64_t t) { rotate_and_store(pass, t, cos, sin); });
    }
    attend(pass);
    const Activations mixed = make_ready(kernels, layer.o, {pass.mixed, tokens, queries, queries}, nullptr, scope);
    const Product output = {&layer.o, hidden, true};
    multiply(kernels, mixed, &output, 1);
}

}  // namespace mixlocal
