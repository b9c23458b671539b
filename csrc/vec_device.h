// Vec on a GPU: one float, since every thread has a column of its own. Included by vec.h.
#pragma once

namespace kd {
namespace KD_ISA {

using Vec = float;
using Ints = int32_t;
constexpr int kLanes = 1;
KD_HD Vec splat(float x) { return x; }
KD_HD Vec select(bool mask, Vec a, Vec b) { return mask ? a : b; }
KD_HD Vec vexp(Vec x) { return expf(x); }
KD_HD Vec vmin(Vec a, Vec b) { return fminf(a, b); }
KD_HD Vec vmax(Vec a, Vec b) { return fmaxf(a, b); }
KD_HD Vec vabs(Vec a) { return fabsf(a); }
KD_HD Ints as_ints(Vec v) { return __builtin_bit_cast(Ints, v); }
KD_HD Vec as_vec(Ints v) { return __builtin_bit_cast(Vec, v); }
// k times `each`, given the bits of k in an exponent. A conversion would be a slow instruction.
KD_HD Vec exponent_times(float each, Ints bits) {
  return (as_vec((bits >> 23) + 0x4b400000) - 12582912.0f) * each;
}
#if defined(__CUDA_ARCH__)
KD_HD Vec inverse(Vec b) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
  return y;
}
KD_HD Vec rounded_product(Vec a, float b) { return __fmul_rn(a, b); }
#else
KD_HD Vec inverse(Vec b) { return 1.0f / b; }
KD_HD Vec rounded_product(Vec a, float b) { return a * b; }
#endif
KD_HD Vec quotient(Vec a, Vec b) { return a * inverse(b); }

}  // namespace KD_ISA
}  // namespace kd
