// The Python face. Arrays come as addresses: their types, shapes and layout were checked by mixlocal/kernels/cpu.py, in
// Python, where an interrupt that arrives meanwhile is raised as what it is. Nothing here calls back into Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "operations.h"
#include "pool.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

namespace nb = nanobind;

namespace mixlocal {
namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void linear_at(const std::string& isa, int kind, int64_t rows, int64_t columns, uintptr_t codes, uintptr_t scales,
               bool half_scales, uintptr_t codebook, uintptr_t x, int64_t tokens, uintptr_t out) {
    const KernelTable& kernels = kernels_named(isa);
    const Matrix weight = {static_cast<Kind>(kind), rows,        columns, at<const void>(codes), at<const void>(scales),
                           half_scales,             at<const float>(codebook)};
    const nb::gil_scoped_release unlocked;
    linear(kernels, weight, at<const float>(x), tokens, at<float>(out));
}

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

std::tuple<double, double, int64_t> quantize_at(const std::string& isa, int kind, int64_t rows, int64_t columns,
                                                uintptr_t source, bool bf16, uintptr_t codebook, uintptr_t codes,
                                                uintptr_t scales, bool half_scales) {
    static const float kNone[16] = {};
    const KernelTable& kernels = kernels_named(isa);
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
    const nb::gil_scoped_release unlocked;
    const QuantizeResult result = quantize(kernels, static_cast<Kind>(kind), row, rows);
    return {result.error, result.power, result.bad};
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const KernelTable* table : available_kernels()) names.emplace_back(table->name);
    return names;
}

}  // namespace
}  // namespace mixlocal

NB_MODULE(_native, m) {
    using namespace mixlocal;
    m.def("available_isas", &available_isas);
    m.def("threads", &threads);
    m.def("set_threads", &set_threads);
    m.def("linear", &linear_at);
    m.def("quantize", &quantize_at);
    m.attr("FOUR_BIT") = static_cast<int>(kFourBit);
    m.attr("INT8") = static_cast<int>(kInt8);
    m.attr("BF16") = static_cast<int>(kBf16);
}
