// The CPU's row loops as the dispatcher sees them.
#pragma once

#include "../job.h"

namespace kd {

// A finished gradient `[rows, width]`, and what columns.h makes of it.
struct Columns {
  Matrix gradient;
  int64_t rows = 0, width = 0;
  double* squares = nullptr;     // [width], zeroed
  const int64_t* ids = nullptr;  // [kept], ascending
  int64_t kept = 0;
  float* rest = nullptr;  // [rows]
};

// One set per instruction set. Each handles the rows [begin, end) on one thread.
struct RowLoops {
  void (*fused)(const Job&, int64_t begin, int64_t end);
  void (*accumulate)(const Job&, int64_t begin, int64_t end);
  void (*accumulate_value)(const Job&, int64_t begin, int64_t end);
  void (*gradient)(const Job&, int64_t begin, int64_t end);
  void (*fused_sparse)(const Job&, int64_t begin, int64_t end);
  void (*column_squares)(const Columns&, int64_t begin, int64_t end);  // of columns, not rows
  void (*gather_columns)(const Columns&, int64_t begin, int64_t end);
};

}  // namespace kd
