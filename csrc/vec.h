// Lanes of float and the few functions that the row arithmetic needs.
//
// A formula written over `Vec` serves CPU and GPU: it is a compiler vector on the host (vec_host.h) and a
// plain float on a device (vec_device.h). That is why SIMD and its dispatch are written by hand: a SIMD
// library would serve the CPU alone, and every divergence would then be written twice.
//
// vexp: a few ulp for x in [-87, 88], 0 below, NaN stays NaN. Above, the caller must not call it.
// quotient: a / b to two ulp, for b that neither b nor 1 / b is subnormal.
// rounded_product: a * b, not fused into the subtraction after it, where two equal products must cancel.
// decay: e^-y and 1 - e^-y to a few ulp each for y >= 0, inf too.
// log_ratio: log(p / m) to a few ulp, given d = p - m as exactly as p and m themselves: 0 where d is. m is at
// least kTiny. Of a p below kTiny the result is finite, and no more.
#pragma once

#include <math.h>

#include <cstdint>
#include <limits>

#include "compiled_for.h"

namespace kd {
namespace KD_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();
// A probability below it no longer counts. A quotient by it is finite, and so is its logarithm.
constexpr float kTiny = 1e-30f;

}  // namespace KD_ISA
}  // namespace kd

#if defined(__CUDACC__) || defined(KD_CUDA_HOST)
#include "vec_device.h"
#else
#include "vec_host.h"
#endif

namespace kd {
namespace KD_ISA {

// p / m = 2^k r. The difference of their bits is nearly that of their logarithms, and gives a k that leaves r
// in [2/3, 3/2]. log r = 2 atanh((r - 1) / (r + 1)). Numerator and denominator are taken times m, which
// leaves one quotient, and d as its numerator where k is 0. Elsewhere k is subtracted from the exponent of p;
// of 0 and of subnormals that makes another number. The polynomial is minimax, to 3e-9.
KD_HD Vec log_ratio(Vec p, Vec m, Vec d) {
  const Ints k = (as_ints(p) - as_ints(m) + 0x400000) & (int32_t)0xff800000;  // k's bits in an exponent
  const Vec over = select(k == 0, d, as_vec(as_ints(p) - k) - m);
  const Vec h = quotient(over, 0.5f * over + m), z = h * h;
  Vec y = splat(2.37301759e-3f);
  y = y * z + 1.24866157e-2f;
  y = y * z + 8.33336923e-2f;
  return y * (z * h) + h + exponent_times(0.693147181f, k);
}

struct Decay {
  Vec left, lost;
};

// As vexp, e^-y = 2^n 2^f, but with a polynomial for 2^f - 1, to 1e-8 of it. Where y is small n is 0, and
// 1 - e^-y is the polynomial alone: nothing is subtracted from 1, so no digits go.
KD_HD Decay decay(Vec y) {
  const Vec magic = splat(12582912.0f), t = vmin(y, splat(87.0f)) * -1.44269504088896341f;
  const Vec shifted = t + magic, f = t - (shifted - magic);
  const Vec scale = as_vec((as_ints(shifted) << 23) + 0x3f800000);  // 2^n
  Vec u = splat(1.540351206e-4f);
  u = u * f + 1.339119364e-3f;
  u = u * f + 9.618239239e-3f;
  u = u * f + 5.550356575e-2f;
  u = u * f + 2.402264977e-1f;
  u = u * f + 6.931471881e-1f;
  const Vec grown = scale * (u * f);
  return {select(y > 87.0f, splat(0.0f), scale + grown), (1.0f - scale) - grown};
}

// tanh: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would lose its digits.
KD_HD Vec vtanh(Vec x) {
  const Vec z = x * x;
  Vec y = splat(-5.70498872745e-3f);
  y = y * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  const Vec near_zero = y * z * x + x;
  const Vec e = vexp(vmin(vabs(x) * 2.0f, splat(80.0f)));
  const Vec far = 1.0f - 2.0f / (e + 1.0f);
  const Vec signed_far = x < 0.0f ? -far : far;
  return vabs(x) < 0.625f ? near_zero : signed_far;
}

}  // namespace KD_ISA
}  // namespace kd
