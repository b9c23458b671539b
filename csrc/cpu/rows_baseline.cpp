// The row loops for baseline; setup.py gives this file its flags.
#define KD_ISA baseline
#include "sparse.h"

namespace kd {
const RowLoops& row_loops_baseline() { return baseline::kRowLoops; }
}  // namespace kd
