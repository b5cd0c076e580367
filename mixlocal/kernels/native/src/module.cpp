// The Python face: checks every dtype, shape and stride, then lets the GIL go.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "operations.h"
#include "pool.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

namespace nb = nanobind;

namespace mixlocal {
namespace {

using Array = nb::ndarray<nb::device::cpu>;
using Shape = std::vector<int64_t>;

constexpr nb::dlpack::dtype kFloat32 = nb::dtype<float>();
constexpr nb::dlpack::dtype kUint8 = nb::dtype<uint8_t>();
constexpr nb::dlpack::dtype kInt8Type = nb::dtype<int8_t>();
constexpr nb::dlpack::dtype kFloat16 = {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
constexpr nb::dlpack::dtype kBfloat16 = {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string text(const Shape& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

Shape shape_of(const Array& array) {
    Shape shape;
    for (size_t i = 0; i < array.ndim(); ++i) shape.push_back(static_cast<int64_t>(array.shape(i)));
    return shape;
}

void check_shape(const char* name, const Array& array, const Shape& expected) {
    if (shape_of(array) != expected) refuse(std::string(name) + " has shape " + text(shape_of(array)) + ", not " + text(expected));
    if (array.size() == 0) return;
    int64_t stride = 1;
    for (size_t i = array.ndim(); i-- > 0; stride *= expected[i])
        if (expected[i] > 1 && array.stride(i) != stride) refuse(std::string(name) + " is not contiguous");
}

void check_type(const char* name, const Array& array, nb::dlpack::dtype expected, const char* expected_name) {
    if (array.dtype() != expected) refuse(std::string(name) + " is not " + expected_name);
}

bool is_half(const Array& scales) {
    if (scales.dtype() != kFloat16) check_type("scales", scales, kFloat32, "float16 or float32");
    return scales.dtype() == kFloat16;
}

int64_t blocks(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

void check_even(int64_t columns) {
    if (columns % 2) refuse("4-bit codes need an even number of columns, not " + std::to_string(columns));
}

void run_linear(const std::string& isa, Matrix weight, const Array& x, const Array& out) {
    if (x.ndim() != 2 || out.ndim() != 2) refuse("x and out must have two dimensions");
    const int64_t tokens = static_cast<int64_t>(x.shape(0));
    check_type("x", x, kFloat32, "float32");
    check_type("out", out, kFloat32, "float32");
    check_shape("x", x, {tokens, weight.columns});
    check_shape("out", out, {tokens, weight.rows});
    const KernelTable& kernels = kernels_named(isa);
    const float* const from = static_cast<const float*>(x.data());
    float* const to = static_cast<float*>(out.data());
    const nb::gil_scoped_release unlocked;
    linear(kernels, weight, from, tokens, to);
}

void linear_4bit(const std::string& isa, Array x, Array codebook, Array codes, Array scales, Array out) {
    if (codes.ndim() != 2) refuse("codes must have two dimensions");
    const int64_t rows = static_cast<int64_t>(codes.shape(0)), columns = static_cast<int64_t>(codes.shape(1)) * 2;
    check_type("codebook", codebook, kFloat32, "float32");
    check_shape("codebook", codebook, {16});
    check_type("codes", codes, kUint8, "uint8");
    check_shape("codes", codes, {rows, columns / 2});
    check_shape("scales", scales, {rows, blocks(columns)});
    const bool half = is_half(scales);
    run_linear(isa, {kFourBit, rows, columns, codes.data(), scales.data(), half, static_cast<const float*>(codebook.data())}, x, out);
}

void linear_int8(const std::string& isa, Array x, Array codes, Array scales, Array out) {
    if (codes.ndim() != 2) refuse("codes must have two dimensions");
    const int64_t rows = static_cast<int64_t>(codes.shape(0)), columns = static_cast<int64_t>(codes.shape(1));
    check_type("codes", codes, kInt8Type, "int8");
    check_shape("codes", codes, {rows, columns});
    check_type("scales", scales, kFloat32, "float32");
    check_shape("scales", scales, {rows, 1});
    run_linear(isa, {kInt8, rows, columns, codes.data(), scales.data(), false, nullptr}, x, out);
}

void linear_bf16(const std::string& isa, Array x, Array weight, Array out) {
    if (weight.ndim() != 2) refuse("weight must have two dimensions");
    const int64_t rows = static_cast<int64_t>(weight.shape(0)), columns = static_cast<int64_t>(weight.shape(1));
    check_type("weight", weight, kBfloat16, "bfloat16");
    check_shape("weight", weight, {rows, columns});
    run_linear(isa, {kBf16, rows, columns, weight.data(), nullptr, false, nullptr}, x, out);
}

using Quantized = std::tuple<double, double, int64_t>;

QuantizeRow source_row(const Array& weights) {
    if (weights.ndim() != 2) refuse("weights must have two dimensions");
    QuantizeRow row = {};
    row.bf16 = weights.dtype() == kBfloat16;
    if (!row.bf16) check_type("weights", weights, kFloat32, "bfloat16 or float32");
    check_shape("weights", weights, shape_of(weights));
    row.source = weights.data();
    row.columns = static_cast<int64_t>(weights.shape(1));
    return row;
}

Quantized run_quantize(const std::string& isa, Kind kind, const QuantizeRow& row, int64_t rows) {
    const KernelTable& kernels = kernels_named(isa);
    const nb::gil_scoped_release unlocked;
    const QuantizeResult result = quantize(kernels, kind, row, rows);
    return {result.error, result.power, result.bad};
}

Quantized quantize_4bit(const std::string& isa, Array weights, Array codebook, Array codes, Array scales) {
    QuantizeRow row = source_row(weights);
    const int64_t rows = static_cast<int64_t>(weights.shape(0));
    check_even(row.columns);
    check_type("codebook", codebook, kFloat32, "float32");
    check_shape("codebook", codebook, {16});
    check_type("codes", codes, kUint8, "uint8");
    check_shape("codes", codes, {rows, row.columns / 2});
    check_shape("scales", scales, {rows, blocks(row.columns)});
    row.half_scales = is_half(scales);
    row.codes = codes.data();
    row.scales = scales.data();

    const float* const book = static_cast<const float*>(codebook.data());
    int32_t order[16];
    float levels[16], midpoints[15];
    for (int i = 0; i < 16; ++i) order[i] = i;
    std::stable_sort(order, order + 16, [&](int32_t a, int32_t b) { return book[a] < book[b]; });
    for (int i = 0; i < 16; ++i) levels[i] = book[order[i]];
    for (int i = 0; i < 15; ++i) midpoints[i] = (levels[i + 1] + levels[i]) / 2;
    row.order = order;
    row.levels = levels;
    row.midpoints = midpoints;
    return run_quantize(isa, kFourBit, row, rows);
}

Quantized quantize_int8(const std::string& isa, Array weights, Array codes, Array scales) {
    QuantizeRow row = source_row(weights);
    const int64_t rows = static_cast<int64_t>(weights.shape(0));
    check_type("codes", codes, kInt8Type, "int8");
    check_shape("codes", codes, {rows, row.columns});
    check_type("scales", scales, kFloat32, "float32");
    check_shape("scales", scales, {rows, 1});
    row.codes = codes.data();
    row.scales = scales.data();
    return run_quantize(isa, kInt8, row, rows);
}

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const KernelTable* table : available_kernels()) names.emplace_back(table->name);
    return names;
}

}  // namespace
}  // namespace mixlocal

NB_MODULE(_native, m) {
    using namespace nb::literals;
    using namespace mixlocal;
    const auto strict = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("available_isas", &available_isas);
    m.def("threads", &threads);
    m.def("set_threads", &set_threads, "count"_a);
    m.def("linear_4bit", &linear_4bit, "isa"_a, strict("x"), strict("codebook"), strict("codes"), strict("scales"), strict("out"));
    m.def("linear_int8", &linear_int8, "isa"_a, strict("x"), strict("codes"), strict("scales"), strict("out"));
    m.def("linear_bf16", &linear_bf16, "isa"_a, strict("x"), strict("weight"), strict("out"));
    m.def("quantize_4bit", &quantize_4bit, "isa"_a, strict("weights"), strict("codebook"), strict("codes"), strict("scales"));
    m.def("quantize_int8", &quantize_int8, "isa"_a, strict("weights"), strict("codes"), strict("scales"));
}
