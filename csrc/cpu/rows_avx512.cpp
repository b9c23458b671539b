// The row loops for avx512; setup.py gives this file its flags.
#define KD_ISA avx512
#include "sparse.h"

namespace kd {
const RowLoops& row_loops_avx512() { return avx512::kRowLoops; }
}  // namespace kd
