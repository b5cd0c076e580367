#include <math.h>
#include <string.h>

#include <algorithm>

#include "operations.h"
#include "pool.h"

namespace mixlocal {
namespace {

constexpr int64_t kQueries = 12;        // queries that share a pass over the keys, about
constexpr int64_t kManyTokens = 4;      // tokens worth dividing among threads
constexpr int64_t kItemsPerThread = 4;  // with fewer tiles than this, chunks are divided among threads too
constexpr int64_t kSmallWork = 1 << 14; // multiply-adds that are done before another thread wakes up

// What one forward pass through one layer works on.
struct Pass {
    const KernelTable& kernels;
    const Attention& layer;
    const KeyValues& cache;
    const Sequences& sequences;
    float *q, *k, *v;  // [tokens, heads * head_dim]
    float* mixed;      // [tokens, n_heads * head_dim]

    int64_t group() const { return layer.n_heads / layer.n_kv_heads; }  // query heads that share a key/value head
    int64_t tile_tokens() const { return std::max<int64_t>(1, kQueries / group()); }
    int64_t value_stride() const { return cache.value_stride; }
    int64_t first_key(int64_t position) const { return layer.window ? std::max<int64_t>(0, position + 1 - layer.window) : 0; }
    // One head's part of the page that holds a position.
    char* page(void* all, int64_t sequence, int64_t position, int64_t head, int64_t width) const {
        const int64_t index = sequences.pages[sequence * sequences.most_pages + position / kPage];
        return static_cast<char*>(all) + (index * layer.n_kv_heads + head) * kPage * width * (cache.half ? 2 : 4);
    }
    char* keys(int64_t sequence, int64_t position, int64_t head) const { return page(cache.keys, sequence, position, head, layer.head_dim); }
    char* values(int64_t sequence, int64_t position, int64_t head) const { return page(cache.values, sequence, position, head, value_stride()); }
};

// Some consecutive tokens of one sequence: `first` of the pass, which is at `position`.
struct Run {
    int64_t sequence, first, position, count;

    int64_t begin_chunk(const Pass& pass) const { return pass.first_key(position) / kChunk; }
    int64_t end_chunk() const { return (position + count - 1) / kChunk + 1; }
};

// A run's queries of one key/value head and what they have seen so far; rows are token by token, query head by query head.
struct QueryTile {
    Run run;
    int64_t head;
    float *queries, *tops, *totals, *mixed;

    int64_t rows(const Pass& pass) const { return run.count * pass.group(); }
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

// Runs of at most `most` tokens that are those of the pass, in their order.
int64_t count_runs(const Sequences& sequences, int64_t most) {
    int64_t runs = 0;
    for (int64_t s = 0; s < sequences.count; ++s) runs += (sequences.counts[s] + most - 1) / most;
    return runs;
}

void make_runs(const Sequences& sequences, int64_t most, Run* runs) {
    int64_t first = 0;
    for (int64_t s = 0; s < sequences.count; first += sequences.counts[s++])
        for (int64_t at = 0; at < sequences.counts[s]; at += most)
            *runs++ = {s, first + at, sequences.starts[s] + at, std::min(most, sequences.counts[s] - at)};
}

// `token`: a run of one.
void rotate_and_store(const Pass& pass, const Run& token, const float* cos, const float* sin) {
    const Attention& layer = pass.layer;
    const int64_t d = layer.head_dim, t = token.first;
    const float scale = 1.0f / sqrtf(static_cast<float>(d));
    rotate(pass.q + t * layer.n_heads * d, layer.n_heads, d, cos + t * d, sin + t * d, scale);
    rotate(pass.k + t * layer.n_kv_heads * d, layer.n_kv_heads, d, cos + t * d, sin + t * d, 1.0f);
    for (int64_t h = 0; h < layer.n_kv_heads; ++h) {
        const int64_t at = (t * layer.n_kv_heads + h) * d;
        pass.kernels.store_key_value(pass.k + at, pass.v + at, d, pass.value_stride(), token.position % kPage, pass.cache.half,
                                     pass.keys(token.sequence, token.position, h), pass.values(token.sequence, token.position, h));
    }
}

QueryTile query_tile(const Pass& pass, const Run& run, int64_t head, Arena::Scope& scope) {
    QueryTile tile = {};
    tile.run = run;
    tile.head = head;
    const int64_t rows = tile.rows(pass), d = pass.layer.head_dim;
    tile.queries = scope.take<float>(rows * d);
    tile.tops = scope.take<float>(rows);
    tile.totals = scope.take<float>(rows);
    tile.mixed = scope.take<float>(rows * pass.value_stride());
    std::fill_n(tile.tops, rows, -INFINITY);
    std::fill_n(tile.totals, rows, 0.0f);
    std::fill_n(tile.mixed, rows * pass.value_stride(), 0.0f);
    for (int64_t t = 0; t < run.count; ++t)
        memcpy(tile.queries + t * pass.group() * d, pass.q + ((run.first + t) * pass.layer.n_heads + head * pass.group()) * d,
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
    const Run& run = tile.run;
    const int64_t rows = tile.rows(pass), begin = index * kChunk, end = std::min(begin + kChunk, run.position + run.count);
    int64_t* const first = scope.take<int64_t>(rows);
    int64_t* const last = scope.take<int64_t>(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t position = run.position + row / pass.group();
        last[row] = std::clamp<int64_t>(position + 1 - begin, 0, kChunk);
        first[row] = std::clamp<int64_t>(pass.first_key(position) - begin, 0, last[row]);
        seen.sees[row] = first[row] < last[row];
    }
    AttendChunk chunk = {};
    chunk.queries = tile.queries;
    for (int64_t position = begin; position < end; position += kPage) {
        chunk.keys[(position - begin) / kPage] = pass.keys(run.sequence, position, tile.head);
        chunk.values[(position - begin) / kPage] = pass.values(run.sequence, position, tile.head);
    }
    chunk.first = first;
    chunk.last = last;
    chunk.count = rows;
    chunk.head_dim = pass.layer.head_dim;
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
        const int64_t t = tile.run.first + row / pass.group(), head = tile.head * pass.group() + row % pass.group();
        for (int64_t i = 0; i < d; ++i)
            pass.mixed[(t * pass.layer.n_heads + head) * d + i] = tile.mixed[row * pass.value_stride() + i] / tile.totals[row];
    }
}

// One item per tile: its chunks one after the other.
void attend_by_tile(const Pass& pass, const Run& run, int64_t head) {
    Arena::Scope scope(Arena::of_this_thread());
    const QueryTile tile = query_tile(pass, run, head, scope);
    const Seen seen = room_for_seen(pass, tile.rows(pass), scope);
    for (int64_t chunk = run.begin_chunk(pass); chunk < run.end_chunk(); ++chunk) {
        look(pass, tile, chunk, seen);
        join(pass, tile, seen);
    }
    finish(pass, tile);
}

// One item per tile and chunk, joined afterwards: for few tokens and many keys. The same operations in the same order.
struct ChunkItem {
    int64_t tile, chunk;
    Seen seen;
};

void attend_by_chunk(const Pass& pass, const Run* runs, int64_t count) {
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t heads = pass.layer.n_kv_heads;
    int64_t chunks = 0;
    for (int64_t r = 0; r < count; ++r) chunks += runs[r].end_chunk() - runs[r].begin_chunk(pass);
    QueryTile* const tiles = scope.take<QueryTile>(count * heads);
    ChunkItem* const items = scope.take<ChunkItem>(chunks * heads);
    int64_t filled = 0;
    for (int64_t i = 0; i < count * heads; ++i) {
        const Run& run = runs[i / heads];
        tiles[i] = query_tile(pass, run, i % heads, scope);
        for (int64_t chunk = run.begin_chunk(pass); chunk < run.end_chunk(); ++chunk)
            items[filled++] = {i, chunk, room_for_seen(pass, tiles[i].rows(pass), scope)};
    }
    for_each_item(filled, [&](int64_t i) { look(pass, tiles[items[i].tile], items[i].chunk, items[i].seen); });
    for (int64_t i = 0; i < filled; ++i) join(pass, tiles[items[i].tile], items[i].seen);
    for (int64_t i = 0; i < count * heads; ++i) finish(pass, tiles[i]);
}

void attend(const Pass& pass) {
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t heads = pass.layer.n_kv_heads, count = count_runs(pass.sequences, pass.tile_tokens());
    Run* const runs = scope.take<Run>(count);
    make_runs(pass.sequences, pass.tile_tokens(), runs);
    int64_t scores = 0, most_keys = 0;
    for (int64_t r = 0; r < count; ++r) {
        const int64_t keys = runs[r].position + runs[r].count;
        scores += keys * runs[r].count;
        most_keys = std::max(most_keys, keys);
    }
    if (scores * pass.layer.n_heads * pass.layer.head_dim <= kSmallWork) {
        for (int64_t i = 0; i < count * heads; ++i) attend_by_tile(pass, runs[i / heads], i % heads);
    } else if (count * heads < kItemsPerThread * threads() && most_keys > kChunk) {
        attend_by_chunk(pass, runs, count);
    } else {
        for_each_item(count * heads, [&](int64_t i) { attend_by_tile(pass, runs[i / heads], i % heads); });
    }
}

void rotate_and_store_all(const Pass& pass, int64_t tokens, const float* cos, const float* sin) {
    Arena::Scope scope(Arena::of_this_thread());
    Run* const singles = scope.take<Run>(tokens);
    make_runs(pass.sequences, 1, singles);
    if (tokens < kManyTokens) {
        for (int64_t t = 0; t < tokens; ++t) rotate_and_store(pass, singles[t], cos, sin);
    } else {
        for_each_item(tokens, [&](int64_t t) { rotate_and_store(pass, singles[t], cos, sin); });
    }
}

}  // namespace

void attention(const KernelTable& kernels, const Attention& layer, float* hidden, const Sequences& sequences, const float* cos,
               const float* sin, const KeyValues& cache) {
    int64_t tokens = 0;
    for (int64_t s = 0; s < sequences.count; ++s) tokens += sequences.counts[s];
    if (tokens == 0) return;
    Arena::Scope scope(Arena::of_this_thread());
    const int64_t queries = layer.n_heads * layer.head_dim, keys = layer.n_kv_heads * layer.head_dim, dim = layer.q.columns;
    const Pass pass = {kernels, layer, cache, sequences, scope.take<float>(tokens * queries), scope.take<float>(tokens * keys),
                       scope.take<float>(tokens * keys), scope.take<float>(tokens * queries)};
    const Norm norm = {layer.norm, layer.eps};
    const Activations normed = make_ready(kernels, layer.q, {hidden, tokens, dim, dim}, &norm, scope);
    const Product projections[] = {{&layer.q, pass.q, false}, {&layer.k, pass.k, false}, {&layer.v, pass.v, false}};
    multiply(kernels, normed, projections, 3);
    rotate_and_store_all(pass, tokens, cos, sin);
    attend(pass);
    const Activations mixed = make_ready(kernels, layer.o, {pass.mixed, tokens, queries, queries}, nullptr, scope);
    const Product output = {&layer.o, hidden, true};
    multiply(kernels, mixed, &output, 1);
}

}  // namespace mixlocal
