// The row loops for avx512 with its conversion to bf16; setup.py gives this file its flags.
#define KD_ISA avx512bf16
#include "sparse.h"

namespace kd {
const RowLoops& row_loops_avx512bf16() { return avx512bf16::kRowLoops; }
}  // namespace kd
