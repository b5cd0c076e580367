// The Python face. Arrays come as addresses: their types, shapes and layout were checked by mixlocal/kernels/cpu.py, in
// Python, where an interrupt that arrives meanwhile is raised as what it is. Nothing here calls back into Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "operations.h"
#include "pool.h"

namespace nb = nanobind;

namespace mixlocal {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// What a Python object stands for, and the Python object that keeps its arrays alive.
template <class T>
struct Held {
    T value;
    nb::object owner;
};
using HeldExpert = Held<Expert>;
using HeldAttention = Held<Attention>;
using HeldRouter = Held<Router>;

struct Levels {
    int32_t order[16];
    float levels[16], midpoints[15];

    explicit Levels(const float* book) {
        for (int i = 0; i < 16; ++i) order[i] = i;
        std::stable_sort(order, order + 16, [&](int32_t a, int32_t b) { return book[a] < book[b]; });
        for (int i = 0; i < 16; ++i) levels[i] = book[order[i]];
        for (int i = 0; i < 15; ++i) midpoints[i] = (levels[i + 1] + levels[i]) / 2;
    }
};

// One token's choice of one expert.
struct Pick {
    int64_t expert, token;
    float weight;
};

std::vector<Pick> picks_by_expert(const int64_t* ids, const float* weights, int64_t tokens, int64_t top_k) {
    std::vector<Pick> picks;
    picks.reserve(static_cast<size_t>(tokens * top_k));
    for (int64_t i = 0; i < tokens * top_k; ++i) picks.push_back({ids[i], i / top_k, weights[i]});
    std::stable_sort(picks.begin(), picks.end(), [](const Pick& a, const Pick& b) { return a.expert < b.expert; });
    return picks;
}

bool same_widths(const Expert& a, const Expert& b) { return a.w1.rows == b.w1.rows && a.w1.columns == b.w1.columns; }

class Kernels {
public:
    explicit Kernels(const std::string& isa) : table_(kernels_named(isa)) {}

    void linear(const Matrix& weight, uintptr_t x, int64_t tokens, uintptr_t out) const {
        const nb::gil_scoped_release unlocked;
        mixlocal::linear(table_, weight, nullptr, at<const float>(x), tokens, at<float>(out));
    }

    void norm_linear(uintptr_t norm, float eps, const Matrix& weight, uintptr_t x, int64_t tokens, uintptr_t out) const {
        const Norm first = {at<const float>(norm), eps};
        const nb::gil_scoped_release unlocked;
        mixlocal::linear(table_, weight, &first, at<const float>(x), tokens, at<float>(out));
    }

    void attention(const HeldAttention& layer, uintptr_t hidden, int64_t count, uintptr_t starts, uintptr_t counts, uintptr_t pages,
                   int64_t most_pages, uintptr_t cos, uintptr_t sin, uintptr_t keys, uintptr_t values, int64_t value_stride, bool half) const {
        const Sequences sequences = {count, at<const int64_t>(starts), at<const int64_t>(counts), at<const int64_t>(pages), most_pages};
        const KeyValues cache = {at<void>(keys), at<void>(values), value_stride, half};
        const nb::gil_scoped_release unlocked;
        mixlocal::attention(table_, layer.value, at<float>(hidden), sequences, at<const float>(cos), at<const float>(sin), cache);
    }

    void route(const HeldRouter& router, uintptr_t hidden, int64_t tokens, uintptr_t normed, uintptr_t ids, uintptr_t weights) const {
        const nb::gil_scoped_release unlocked;
        mixlocal::route(table_, router.value, at<const float>(hidden), tokens, at<float>(normed), at<int64_t>(ids), at<float>(weights));
    }

    // Returns the id of an expert that is chosen and is not in `experts`, or not of the width of the others.
    std::optional<int64_t> moe_ffn(uintptr_t x, int64_t dim, int64_t tokens, uintptr_t ids, uintptr_t weights, int64_t top_k, const nb::dict& experts,
                    uintptr_t out) const {
        const std::vector<Pick> picks = picks_by_expert(at<const int64_t>(ids), at<const float>(weights), tokens, top_k);
        std::vector<int64_t> pick_tokens(picks.size());
        std::vector<float> pick_weights(picks.size());
        std::vector<Share> shares;
        for (size_t i = 0; i < picks.size(); ++i) {
            pick_tokens[i] = picks[i].token;
            pick_weights[i] = picks[i].weight;
            if (i > 0 && picks[i].expert == picks[i - 1].expert) {
                ++shares.back().count;
                continue;
            }
            const nb::int_ id(picks[i].expert);
            if (!experts.contains(id)) return picks[i].expert;
            const Expert& expert = nb::cast<const HeldExpert&>(experts[id]).value;
            if (expert.w1.columns != dim || (!shares.empty() && !same_widths(expert, *shares.front().expert))) return picks[i].expert;
            shares.push_back({&expert, 1, pick_tokens.data() + i, pick_weights.data() + i});
        }
        const nb::gil_scoped_release unlocked;
        mixlocal::moe_ffn(table_, at<const float>(x), tokens, shares.data(), static_cast<int>(shares.size()), at<float>(out));
        return std::nullopt;
    }

    float read(uintptr_t data, int64_t bytes) const {
        const nb::gil_scoped_release unlocked;
        return read_memory(table_, at<const void>(data), bytes);
    }

    std::tuple<double, double, int64_t> quantize(int kind, int64_t rows, int64_t columns, uintptr_t source, bool bf16, uintptr_t codebook,
                                                 uintptr_t codes, uintptr_t scales, bool half_scales, bool fine, bool search,
                                                 uintptr_t importance) const {
        static const float kNone[16] = {};
        const Levels levels(kind == kFourBit ? at<const float>(codebook) : kNone);
        QuantizeRow row = {};
        row.source = at<const void>(source);
        row.bf16 = bf16;
        row.columns = columns;
        row.levels = levels.levels;
        row.midpoints = levels.midpoints;
        row.order = levels.order;
        row.codes = at<void>(codes);
        row.scales = at<void>(scales);
        row.half_scales = half_scales;
        row.fine = fine;
        row.search = search;
        row.importance = at<const float>(importance);
        const nb::gil_scoped_release unlocked;
        const QuantizeResult result = mixlocal::quantize(table_, static_cast<Kind>(kind), row, rows);
        return {result.error, result.power, result.bad};
    }

private:
    const KernelTable& table_;
};

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const KernelTable* table : available_kernels()) names.emplace_back(table->name);
    return names;
}

}  // namespace
}  // namespace mixlocal

NB_MODULE(_native, m) {
    using namespace mixlocal;
    nb::set_leak_warnings(false);  // a model that lives until the process ends is no leak
    m.def("available_isas", &available_isas);
    m.def("threads", &threads);
    m.def("set_threads", &set_threads);
    m.attr("FOUR_BIT") = static_cast<int>(kFourBit);
    m.attr("AFFINE") = static_cast<int>(kAffine);
    m.attr("INT8") = static_cast<int>(kInt8);
    m.attr("BF16") = static_cast<int>(kBf16);
    m.attr("FLOAT") = static_cast<int>(kFloat);

    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int kind, int64_t rows, int64_t columns, uintptr_t codes, uintptr_t scales, bool half_scales,
                            bool fine, uintptr_t levels, float step) {
            new (self) Matrix{static_cast<Kind>(kind), rows, columns, at<const void>(codes), at<const void>(scales), half_scales, fine,
                              at<const int8_t>(levels), step};
        });
    nb::class_<HeldExpert>(m, "Expert").def("__init__", [](HeldExpert* self, const Matrix& w1, const Matrix& w3, const Matrix& w2, nb::object owner) {
        new (self) HeldExpert{{w1, w3, w2}, std::move(owner)};
    });
    nb::class_<HeldAttention>(m, "Attention")
        .def("__init__", [](HeldAttention* self, uintptr_t norm, float eps, const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& o,
                            int64_t n_heads, int64_t n_kv_heads, int64_t head_dim, int64_t window, nb::object owner) {
            new (self) HeldAttention{{at<const float>(norm), eps, q, k, v, o, n_heads, n_kv_heads, head_dim, window}, std::move(owner)};
        });
    nb::class_<HeldRouter>(m, "Router").def("__init__", [](HeldRouter* self, uintptr_t norm, float eps, uintptr_t weight, int64_t dim,
                                                           int64_t experts, int64_t top_k, nb::object owner) {
        new (self) HeldRouter{{at<const float>(norm), eps, at<const float>(weight), dim, experts, top_k}, std::move(owner)};
    });
    nb::class_<Kernels>(m, "Kernels")
        .def(nb::init<std::string>())
        .def("linear", &Kernels::linear)
        .def("norm_linear", &Kernels::norm_linear)
        .def("attention", &Kernels::attention)
        .def("route", &Kernels::route)
        .def("moe_ffn", &Kernels::moe_ffn)
        .def("read", &Kernels::read)
        .def("quantize", &Kernels::quantize);
}
