// The CPU's row loops as the dispatcher sees them.
#pragma once

#include "../job.h"

namespace kd {

// One set per instruction set. Each handles the rows [begin, end) on one thread.
struct RowLoops {
  void (*fused)(const Job&, int64_t begin, int64_t end);
  void (*accumulate)(const Job&, int64_t begin, int64_t end);
  void (*accumulate_value)(const Job&, int64_t begin, int64_t end);
  void (*gradient)(const Job&, int64_t begin, int64_t end);
  void (*fused_sparse)(const Job&, int64_t begin, int64_t end);
};

}  // namespace kd
