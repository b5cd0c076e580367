// The two operations of the module: threads and blocking over the functions of a KernelTable.
#pragma once

#include "kernels.h"

namespace mixlocal {

// out [tokens, rows] = x [tokens, columns] * weight^T, float32. Each output is computed by one thread, in an order that does
// not depend on the number of threads.
void linear(const KernelTable& kernels, const Matrix& weight, const float* x, int64_t tokens, float* out);

struct QuantizeResult {
    double error, power;  // sums of squares
    int64_t bad;          // flat index of the first NaN or infinity, or -1
};

// Quantizes [rows, columns] into codes and scales; `first` describes row 0, its codebook fields only for 4 bits.
QuantizeResult quantize(const KernelTable& kernels, Kind kind, const QuantizeRow& first, int64_t rows);

}  // namespace mixlocal
