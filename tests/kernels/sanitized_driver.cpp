// Every operation on every instruction set of this machine, for a build with sanitizers. Each array, in and out, is one heap
// allocation of exactly its size, and with exact_arena.cpp so is each piece of scratch memory: reading or writing one element
// too many stops the program. What the instruction sets compute is compared, and so is what one and three threads do.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <vector>

#include "dispatch.h"
#include "operations.h"
#include "pool.h"

using namespace mixlocal;

namespace {

void require(bool holds, const std::string& what) {
    if (holds) return;
    fprintf(stderr, "%s\n", what.c_str());
    exit(1);
}

// ---- arrays of random numbers; a std::vector made with its size has no element to spare ----

uint64_t state;  // the same for every run over all operations

uint32_t random_bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
}

float random_number() { return static_cast<float>(random_bits() % 20001) / 10000.0f - 1.0f; }

std::vector<float> random_numbers(int64_t count) {
    std::vector<float> numbers(static_cast<size_t>(count));
    for (float& number : numbers) number = random_number();
    return numbers;
}

void append(std::vector<uint8_t>& bytes, size_t& at, const void* from, size_t size) {
    memcpy(bytes.data() + at, from, size);
    at += size;
}

struct Format {
    const char* name;
    Kind kind;
    bool half_scales, fine;
    bool is_integer() const { return kind == kFourBit || kind == kAffine || kind == kInt8; }
    bool holds_pairs() const { return kind == kFourBit || kind == kAffine; }
    int64_t planes() const { return kind == kFourBit ? 1 : fine ? 4 : 2; }
};
constexpr Format kFormats[] = {
    {"four bits", kFourBit, true, false}, {"four bits, float scales", kFourBit, false, false}, {"int8", kInt8, false, false},
    {"bf16", kBf16, false, false}, {"float", kFloat, false, false}, {"affine", kAffine, true, false},
    {"affine halves", kAffine, true, true}, {"affine halves, float scales", kAffine, false, true}};

const std::vector<int8_t> kLevels = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

struct Weight {
    Matrix matrix;
    std::vector<uint8_t> codes, scales;

    Weight(const Format& format, int64_t rows, int64_t columns) {
        const int64_t bits = format.holds_pairs() ? 4 : format.kind == kInt8 ? 8 : format.kind == kBf16 ? 16 : 32;
        const int64_t scale_count = format.holds_pairs() ? rows * format.planes() * ((columns + kBlock - 1) / kBlock) : format.kind == kInt8 ? rows : 0;
        codes = std::vector<uint8_t>(static_cast<size_t>(rows * columns * bits / 8));
        scales = std::vector<uint8_t>(static_cast<size_t>(scale_count * (format.half_scales ? 2 : 4)));
        for (size_t at = 0; at < codes.size();) {
            const float number = random_number();
            const uint8_t byte = static_cast<uint8_t>(random_bits());
            uint32_t word;
            memcpy(&word, &number, sizeof word);
            const uint16_t high = static_cast<uint16_t>(word >> 16);
            if (format.kind == kFloat) append(codes, at, &number, sizeof number);
            else if (format.kind == kBf16) append(codes, at, &high, sizeof high);
            else append(codes, at, &byte, sizeof byte);
        }
        for (size_t at = 0; at < scales.size();) {
            const float scale = 0.01f + 0.01f * fabsf(random_number());
            const uint16_t half = static_cast<uint16_t>(0x2000 + random_bits() % 0x800);
            if (format.half_scales) append(scales, at, &half, sizeof half);
            else append(scales, at, &scale, sizeof scale);
        }
        matrix = {format.kind, rows, columns, codes.data(), scale_count ? scales.data() : nullptr, format.half_scales, format.fine,
                  format.kind == kFourBit ? kLevels.data() : nullptr, format.kind == kFourBit ? 1.0f / 127 : 1.0f};
    }
};

// ---- what was computed ----

struct Output {
    std::string what;
    float tolerance;  // of the difference's norm to the result's; 0: the same bits on every instruction set
    std::vector<float> numbers;
};
using Outputs = std::vector<Output>;

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

void compare(const Outputs& ours, const Outputs& theirs, bool exactly, const std::string& which) {
    require(ours.size() == theirs.size(), which + ": other outputs");
    for (size_t i = 0; i < ours.size(); ++i) {
        const std::vector<float>&a = ours[i].numbers, &b = theirs[i].numbers;
        double difference = 0.0, size = 0.0;
        for (size_t j = 0; j < a.size(); ++j) {
            difference += pow(static_cast<double>(a[j]) - b[j], 2);
            size += pow(static_cast<double>(b[j]), 2);
        }
        const bool exact = exactly || ours[i].tolerance == 0.0f;
        const bool near = difference <= pow(static_cast<double>(ours[i].tolerance), 2) * size;  // false for NaN
        require(exact ? same_bits(a, b) : near,
                which + ": " + ours[i].what + " is off by " + std::to_string(sqrt(difference / std::max(size, 1e-30))));
    }
}

// ---- the operations ----

void run_linear(const KernelTable& kernels, Outputs& outputs) {
    constexpr int64_t shapes[][2] = {{1, 2}, {3, 62}, {5, 64}, {7, 66}, {33, 130}, {25, 194}, {70, 576}, {5, 1000}, {17, 1088}, {9, 2050}, {5, 3}, {31, 257}};
    for (const Format& format : kFormats)
        for (const auto& [rows, columns] : shapes) {
            if (format.holds_pairs() && columns % 2) continue;
            const Weight weight(format, rows, columns);
            const std::vector<float> norm = random_numbers(columns);
            const Norm normed = {norm.data(), 1e-5f};
            for (const int64_t tokens : {1, 2, 3, 4, 5, 7, 13, 40}) {
                const std::vector<float> x = random_numbers(tokens * columns), last(x.end() - columns, x.end());
                std::vector<float> out(static_cast<size_t>(tokens * rows)), alone(static_cast<size_t>(rows));
                const std::string what = std::string("linear, ") + format.name + ", " + std::to_string(rows) + " by " +
                                         std::to_string(columns) + ", tokens: " + std::to_string(tokens);
                linear(kernels, weight.matrix, nullptr, x.data(), tokens, out.data());
                linear(kernels, weight.matrix, nullptr, last.data(), 1, alone.data());
                require(same_bits(alone, std::vector<float>(out.end() - rows, out.end())), what + ": the last token alone is another");
                outputs.push_back({what, format.is_integer() ? 0.0f : 1e-5f, out});
                linear(kernels, weight.matrix, &normed, x.data(), tokens, out.data());
                outputs.push_back({"normed " + what, format.is_integer() ? 0.01f : 1e-5f, out});
            }
        }
}

constexpr int kMixed[9] = {5, 2, 6, 2, 0, 5, 7, 7, 2};

void run_moe(const KernelTable& kernels, Outputs& outputs) {
    constexpr int64_t shapes[][2] = {{64, 96}, {34, 258}, {130, 78}, {66, 128}, {32, 77}};
    for (const Format& format : kFormats)
        for (const auto& [dim, hidden] : shapes) {
            if (format.holds_pairs() && hidden % 2) continue;
            std::vector<Weight> weights;
            std::vector<Expert> experts;
            for (int w = 0; w < 9; ++w) {  // with affine halves every matrix has a format of its own
                const Format& own = format.fine && !format.half_scales ? kFormats[kMixed[w]] : format;
                weights.emplace_back(own, w % 3 < 2 ? hidden : dim, w % 3 < 2 ? dim : hidden);
            }
            for (size_t w = 0; w < 9; w += 3) experts.push_back({weights[w].matrix, weights[w + 1].matrix, weights[w + 2].matrix});
            for (const int64_t tokens : {1, 2, 7, 40}) {
                std::vector<std::vector<int64_t>> chosen(3);  // expert 0 by all tokens, 1 by every other, 2 twice by the last
                for (int64_t t = 0; t < tokens; ++t) chosen[0].push_back(t);
                for (int64_t t = 0; t < tokens; t += 2) chosen[1].push_back(t);
                chosen[2] = {tokens - 1, tokens - 1};
                std::vector<std::vector<float>> factors;
                std::vector<Share> shares;
                for (size_t e = 0; e < 3; ++e) {
                    chosen[e].shrink_to_fit();
                    factors.push_back(random_numbers(static_cast<int64_t>(chosen[e].size())));
                    shares.push_back({&experts[e], static_cast<int64_t>(chosen[e].size()), chosen[e].data(), factors.back().data()});
                }
                const std::vector<float> x = random_numbers(tokens * dim);
                std::vector<float> out(static_cast<size_t>(tokens * dim));
                moe_ffn(kernels, x.data(), tokens, shares.data(), static_cast<int>(shares.size()), out.data());
                outputs.push_back({std::string("experts, ") + format.name + ", " + std::to_string(dim) + " by " + std::to_string(hidden) +
                                       ", tokens: " + std::to_string(tokens),
                                   format.is_integer() ? 0.01f : 1e-5f, out});
            }
        }
}

struct Heads {
    int64_t dim, heads, kv_heads, head_dim, window;
};

// One layer's cache: numbers at positions before `start`, a NaN everywhere else.
struct Cache {
    std::vector<uint16_t> keys, values;
    std::vector<int64_t> pages;
    KeyValues view;

    Cache(const Heads& h, int64_t start, int64_t tokens, bool half) {
        const int64_t count = (start + tokens + kPage - 1) / kPage, capacity = count * kPage, stride = (h.head_dim + kPanel - 1) / kPanel * kPanel;
        for (int64_t p = 0; p < count; ++p) pages.push_back(count - 1 - p);
        const int64_t parts = half ? 1 : 2;  // the upper half of a float32, or all of a float16
        keys = std::vector<uint16_t>(static_cast<size_t>(h.kv_heads * capacity * h.head_dim * parts), 0x7fff);
        values = std::vector<uint16_t>(static_cast<size_t>(h.kv_heads * capacity * stride * parts), 0x7fff);
        for (int64_t head = 0; head < h.kv_heads; ++head)
            for (int64_t s = 0; s < start; ++s)
                for (int64_t d = 0; d < h.head_dim; ++d) {
                    const uint16_t bits = static_cast<uint16_t>((half ? 0x3000 : 0x3e00) + random_bits() % 0x100);
                    const int64_t row = (pages[static_cast<size_t>(s / kPage)] * h.kv_heads + head) * kPage + s % kPage;
                    const int64_t key = (row / kPanel * kPanel * h.head_dim + d * kPanel + s % kPanel + 1) * parts - 1;
                    keys[static_cast<size_t>(key)] = bits;
                    values[static_cast<size_t>((row * stride + d + 1) * parts - 1)] = bits;
                }
        view = {keys.data(), values.data(), stride, half};
    }
};

void run_attention_case(const KernelTable& kernels, const Format& format, const Heads& h, int64_t start, int64_t tokens, bool half,
                        Outputs& outputs) {
    const Weight q(format, h.heads * h.head_dim, h.dim), k(format, h.kv_heads * h.head_dim, h.dim), v(format, h.kv_heads * h.head_dim, h.dim),
        o(format, h.dim, h.heads * h.head_dim);
    const std::vector<float> norm = random_numbers(h.dim), cos = random_numbers(tokens * h.head_dim), sin = random_numbers(tokens * h.head_dim);
    const Attention layer = {norm.data(), 1e-5f, q.matrix, k.matrix, v.matrix, o.matrix, h.heads, h.kv_heads, h.head_dim, h.window};
    const Cache cache(h, start, tokens, half);
    std::vector<float> hidden = random_numbers(tokens * h.dim);
    const Sequences sequences = {1, &start, &tokens, cache.pages.data(), static_cast<int64_t>(cache.pages.size())};
    attention(kernels, layer, hidden.data(), sequences, cos.data(), sin.data(), cache.view);
    outputs.push_back({std::string("attention, ") + format.name + ", head_dim " + std::to_string(h.head_dim) + ", start " + std::to_string(start) +
                           ", tokens: " + std::to_string(tokens),
                       format.is_integer() ? 0.03f : half ? 2e-3f : 1e-4f, hidden});
}

void run_attention(const KernelTable& kernels, Outputs& outputs) {
    constexpr Heads layers[] = {{34, 4, 2, 6, 0}, {48, 6, 2, 24, 40}, {32, 8, 1, 64, 270}, {20, 3, 3, 128, 0}, {16, 13, 1, 2, 0}};
    for (const Heads& heads : layers)
        for (const int64_t start : {0, 5, 255, 300})
            for (const int64_t tokens : {1, 3, 40})
                for (const Format& format : {kFormats[0], kFormats[3]}) {
                    run_attention_case(kernels, format, heads, start, tokens, format.kind == kFourBit, outputs);
                    if (start == 255) run_attention_case(kernels, kFormats[2], heads, start, tokens, false, outputs);
                }
}

void run_route(const KernelTable& kernels, Outputs& outputs) {
    for (const int64_t dim : {2, 34, 257, 1000})
        for (const int64_t experts : {1, 8, 13})
            for (const int64_t tokens : {1, 3, 4, 40}) {
                const std::vector<float> norm = random_numbers(dim), gate = random_numbers(experts * dim), hidden = random_numbers(tokens * dim);
                const int64_t top_k = experts < 8 ? 1 : experts == 8 ? 2 : experts;
                const Router router = {norm.data(), 1e-5f, gate.data(), dim, experts, top_k};
                std::vector<float> normed(static_cast<size_t>(tokens * dim)), weights(static_cast<size_t>(tokens * top_k));
                std::vector<int64_t> ids(weights.size());
                route(kernels, router, hidden.data(), tokens, normed.data(), ids.data(), weights.data());
                const std::string what = "router, dim " + std::to_string(dim) + ", experts " + std::to_string(experts);
                outputs.push_back({what + ": ids", 0.0f, std::vector<float>(ids.begin(), ids.end())});
                outputs.push_back({what + ": weights", 1e-4f, weights});
                outputs.push_back({what + ": normed", 1e-5f, normed});
            }
}

void run_quantize(const KernelTable& kernels, Outputs& outputs) {
    std::vector<float> levels(16), midpoints(15);
    std::vector<int32_t> order(16);
    for (size_t i = 0; i < 16; ++i) levels[i] = static_cast<float>(kLevels[i]) / 127.0f, order[i] = static_cast<int32_t>(i * 5 % 16);
    for (size_t i = 0; i < 15; ++i) midpoints[i] = (levels[i] + levels[i + 1]) / 2;
    for (const Format& format : {kFormats[0], kFormats[1], kFormats[2], kFormats[5], kFormats[6], kFormats[7]})
        for (const bool bf16 : {false, true})
            for (const int64_t columns : {1, 2, 30, 62, 64, 66, 77, 100, 190, 576}) {
                if (format.holds_pairs() && columns % 2) continue;
                const bool search = format.half_scales && columns != 64;
                const int64_t rows = search ? 40 : 300;
                std::vector<float> importance = random_numbers(columns);
                for (float& number : importance) number = 0.01f + fabsf(number);
                const Weight source(bf16 ? kFormats[3] : kFormats[4], rows, columns);
                Weight target(format, rows, columns);
                QuantizeRow row = {};
                row.source = source.codes.data(), row.bf16 = bf16, row.columns = columns;
                row.levels = levels.data(), row.midpoints = midpoints.data(), row.order = order.data();
                row.codes = target.codes.data(), row.scales = target.scales.data(), row.half_scales = format.half_scales, row.fine = format.fine, row.search = search;
                row.importance = search && bf16 ? importance.data() : nullptr;
                const QuantizeResult result = quantize(kernels, format.kind, row, rows);
                std::vector<float> bytes(target.codes.begin(), target.codes.end());
                bytes.insert(bytes.end(), target.scales.begin(), target.scales.end());
                const std::string what = std::string("quantize, ") + format.name + ", " + std::to_string(columns) + " columns";
                outputs.push_back({what, 0.0f, bytes});
                outputs.push_back({what + ": error", 1e-3f, {static_cast<float>(result.error), static_cast<float>(result.power)}});
                require(result.bad == -1, what + ": a number that is none, where there is none");
            }
}

void run_read(const KernelTable& kernels, Outputs& outputs) {
    const std::vector<uint8_t> bytes(3 << 18, 1);
    outputs.push_back({"read", 1e-5f, {read_memory(kernels, bytes.data(), static_cast<int64_t>(bytes.size()))}});
}

Outputs run_all(const KernelTable& kernels, int thread_count) {
    Outputs outputs;
    state = 1;
    set_threads(thread_count);
    run_linear(kernels, outputs);
    run_moe(kernels, outputs);
    run_attention(kernels, outputs);
    run_route(kernels, outputs);
    run_quantize(kernels, outputs);
    run_read(kernels, outputs);
    return outputs;
}

}  // namespace

int main() {
    Outputs expected;
    const std::vector<const KernelTable*>& tables = available_kernels();
    for (auto table = tables.rbegin(); table != tables.rend(); ++table) {
        const Outputs one = run_all(**table, 1), three = run_all(**table, 3);
        compare(three, one, true, std::string((*table)->name) + ", three threads and one");
        if (expected.empty()) expected = one;
        compare(one, expected, false, std::string((*table)->name) + " and " + tables.back()->name);
        printf("%s: %zu outputs\n", (*table)->name, one.size());
    }
}
