#include "operations.h"
#include "pool.h"

#include <string.h>

#include <algorithm>
#include <vector>

namespace mixlocal {
namespace {

constexpr int64_t kItemElements = 1 << 16;

QuantizeRow row_at(const QuantizeRow& first, Kind kind, int64_t row) {
    const int64_t source = row * first.columns * (first.bf16 ? 2 : 4);
    const int64_t codes = kind == kFourBit || kind == kAffine ? row * (first.columns / 2) : row * first.columns;
    const int64_t planes = kind == kFourBit ? 1 : first.fine ? 4 : 2;
    const int64_t scales = kind == kInt8 ? row : row * planes * ((first.columns + kBlock - 1) / kBlock);
    QuantizeRow at = first;
    at.source = static_cast<const char*>(first.source) + source;
    at.codes = static_cast<char*>(first.codes) + codes;
    at.scales = static_cast<char*>(first.scales) + scales * (first.half_scales ? 2 : 4);
    at.error = at.power = 0.0;
    at.finite = true;
    return at;
}

int64_t first_not_finite(const QuantizeRow& row) {
    for (int64_t i = 0; i < row.columns; ++i) {
        uint32_t bits = 0;
        if (row.bf16) bits = static_cast<uint32_t>(static_cast<const uint16_t*>(row.source)[i]) << 16;
        else memcpy(&bits, static_cast<const char*>(row.source) + i * 4, sizeof bits);
        if ((bits & 0x7f800000) == 0x7f800000) return i;
    }
    return -1;
}

}  // namespace

QuantizeResult quantize(const KernelTable& kernels, Kind kind, const QuantizeRow& first, int64_t rows) {
    std::vector<QuantizeResult> results(static_cast<size_t>(rows));
    const int64_t step = std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, first.columns));
    for_each_item((rows + step - 1) / step, [&](int64_t item) {
        for (int64_t r = item * step; r < std::min((item + 1) * step, rows); ++r) {
            QuantizeRow row = row_at(first, kind, r);
            if (kind == kFourBit) kernels.quantize_four_bit(row);
            else if (kind == kAffine) kernels.quantize_affine(row);
            else kernels.quantize_int8(row);
            results[static_cast<size_t>(r)] = {row.error, row.power, row.finite ? -1 : r * row.columns + first_not_finite(row)};
        }
    });
    QuantizeResult total = {0.0, 0.0, -1};
    for (const QuantizeResult& result : results) {  // in the order of rows, whichever thread did them
        total.error += result.error;
        total.power += result.power;
        if (total.bad < 0) total.bad = result.bad;
    }
    return total;
}

}  // namespace mixlocal
