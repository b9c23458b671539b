// The row loops for avx2; setup.py gives this file its flags.
#define KD_ISA avx2
#include "sparse.h"

namespace kd {
const RowLoops& row_loops_avx2() { return avx2::kRowLoops; }
}  // namespace kd
