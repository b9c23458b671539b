// Columns of a finished gradient [rows, width], for products that leave most of them out (core/tolerance.py).
#pragma once

#include <algorithm>
#include <type_traits>

#include "convert.h"

namespace kd {
namespace KD_ISA {

// Of each column in [begin, end) the sum of its squares. A block's sums stay in L1 while every row passes
// once; every 64 rows they go on to fp64.
inline void column_squares(const Columns& of, int64_t begin, int64_t end) {
  constexpr int kBlock = 4096, kRows = 64;
  alignas(64) float sums[kBlock];
  with_dtype(of.gradient.dtype, [&]<DType kDType>() {
    constexpr int kBytes = bytes_of(kDType);
    for (int64_t start = begin; start < end; start += kBlock) {
      const int n = (int)std::min<int64_t>(kBlock, end - start), whole = n / kLanes * kLanes;
      for (int64_t first = 0; first < of.rows; first += kRows) {
        std::fill(sums, sums + n, 0.0f);
        for (int64_t i = first; i < std::min(first + kRows, of.rows); ++i) {
          const char* g = of.gradient.row(i) + start * kBytes;
          for (int c = 0; c < whole; c += kLanes) {
            const Vec v = read<kDType>(g + c * kBytes);
            store(sums + c, load(sums + c) + v * v);
          }
          if (whole == n) continue;
          float tail[kLanes];
          load_floats(of.gradient.row(i), kDType, start + whole, n - whole, tail);
          for (int c = whole; c < n; ++c) sums[c] += tail[c - whole] * tail[c - whole];
        }
        for (int c = 0; c < n; ++c) of.squares[start + c] += sums[c];
      }
    }
  });
}

// Sum of the first n entries, in blocks whose fp32 sums go on to fp64.
template <DType kDType>
double row_sum(const char* row, int64_t n) {
  constexpr int kBlock = 64 * kLanes;
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int many = (int)std::min<int64_t>(kBlock, n - start);
    const int whole = many / kLanes * kLanes;
    Vec lanes{};
    for (int c = 0; c < whole; c += kLanes)
      lanes = lanes + read<kDType>(row + (start + c) * bytes_of(kDType));
    total += sum(lanes);
    if (whole == many) continue;
    float tail[kLanes];
    load_floats(row, kDType, start + whole, many - whole, tail);
    for (int c = 0; c < many - whole; ++c) total += tail[c];
  }
  return total;
}

// Of the rows [begin, end): the columns `ids`, which ascend, move to the front, and `rest` gets the sum over
// the others. An entry never moves to the right, so a row is its own buffer.
inline void gather_columns(const Columns& of, int64_t begin, int64_t end) {
  with_dtype(of.gradient.dtype, [&]<DType kDType>() {
    using Bits = std::conditional_t<bytes_of(kDType) == 4, uint32_t, uint16_t>;
    for (int64_t i = begin; i < end; ++i) {
      char* row = of.gradient.row(i);
      const double total = row_sum<kDType>(row, of.width);
      for (int64_t k = 0; k < of.kept; ++k) ((Bits*)row)[k] = ((const Bits*)row)[of.ids[k]];
      of.rest[i] = (float)(total - row_sum<kDType>(row, of.kept));
    }
  });
}

}  // namespace KD_ISA
}  // namespace kd
