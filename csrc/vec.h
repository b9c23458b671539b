// Lanes of float and the few functions that the row arithmetic needs.
//
// `Vec` is a compiler vector on the host (as wide as the instruction set that the file is
// compiled for) and a plain float on a GPU, so a formula written over Vec serves both.
// Every translation unit that is compiled with its own instruction set defines KD_ISA to its own
// namespace, which keeps the linker from mixing them.
//
// exp: a few ulp for x in [-87, 88], 0 below, NaN stays NaN; the caller keeps x finite above. exp_scaled is
// exp(x * scale), for the price of exp: what a temperature divides is then a distance, not a logit.
// decay: e^-y and 1 - e^-y to a few ulp each for y >= 0, inf too.
// log_ratio: log(p / m) to a few ulp, given d = p - m as exactly as p and m themselves: 0 where d is. m at
// least kTiny; of a p below it the result is finite, and no more.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#else
#define KD_HD inline __attribute__((always_inline))
#endif

#ifndef KD_ISA
#define KD_ISA generic
#endif

#if defined(__AVX2__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace kd {
namespace KD_ISA {

constexpr float kInf = std::numeric_limits<float>::infinity();
// Probabilities below it no longer count; a quotient by it, and its logarithm, stay finite.
constexpr float kTiny = 1e-30f;

#if defined(__CUDACC__) || defined(KD_CUDA_HOST)

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
// k times `each`, of 2^k's bits without the bias; no conversion, which is a slow instruction.
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

#else

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

KD_HD Vec splat(float x) { return x - Vec{}; }
KD_HD Vec select(Ints mask, Vec a, Vec b) { return mask ? a : b; }
// A NaN in `a` stays, one in `b` does not. One instruction each where the operands are in this order.
#if defined(__AVX512F__)
KD_HD Vec vmax(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)b, (__m512)a); }
KD_HD Vec vmin(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)b, (__m512)a); }
#elif defined(__AVX2__)
KD_HD Vec vmax(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)b, (__m256)a); }
KD_HD Vec vmin(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)b, (__m256)a); }
#else
KD_HD Vec vmax(Vec a, Vec b) { return a < b ? b : a; }
KD_HD Vec vmin(Vec a, Vec b) { return a > b ? b : a; }
#endif
KD_HD Ints as_ints(Vec v) { return (Ints)v; }
KD_HD Vec as_vec(Ints v) { return (Vec)v; }
// k times `each`, of 2^k's bits without the bias.
KD_HD Vec exponent_times(float each, Ints bits) {
  return __builtin_convertvector(bits, Vec) * (each / 8388608.0f);
}
KD_HD Vec vabs(Vec a) { return as_vec(as_ints(a) & 0x7fffffff); }

// a * b rounded: not to be fused into the subtraction after it, where two equal products must cancel.
KD_HD Vec rounded_product(Vec a, float b) {
  Vec v = a * b;
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

KD_HD Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KD_HD void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// scale, and the bounds of x outside of which exp(x * scale) is 0 or infinite.
struct Scale {
  float scale = 1, log2 = 1.44269504088896341f;  // log2: times log2 e
  float least = -200, low = -87, high = 88.72f;

  Scale() = default;
  KD_HD explicit Scale(double s)
      : scale((float)s),
        log2((float)(s * 1.44269504088896341)),
        least(bound(-200 / s)),
        low(bound(-87 / s)),
        high(bound(88.72 / s)) {}
  KD_HD static float bound(double x) { return x < -3e38 ? -3e38f : x > 3e38 ? 3e38f : (float)x; }
};

// 2^(x scale log2 e) = 2^n * 2^f: f comes from one fused multiply-add, so its error is that of the constant
// (3e-8 |x scale|, less than the rounding of the logits that x is a difference of); then a minimax
// polynomial of degree 5 with the constant term 1, so that exp(0) is exactly 1.
KD_HD Vec exp_scaled(Vec x, const Scale& s) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
#if defined(__AVX512F__)
  x = vmax(x, splat(s.least));
  const Vec n = (x * s.log2 + magic) - magic;
#else
  const Vec above = x < s.low ? splat(s.low) : x;
  const Vec n = (above * s.log2 + magic) - magic;
#endif
#if defined(__FMA__) || defined(__aarch64__)
  const Vec f = x * s.log2 - n;
#else  // without a fused product, subtract ln 2 in two parts first
  const Vec f = ((x * s.scale - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504088896341f;
#endif
  Vec y = splat(1.326472731e-03f);
  y = y * f + 9.671512991e-03f;
  y = y * f + 5.550733581e-02f;
  y = y * f + 2.402224243e-01f;
  y = y * f + 6.931470037e-01f;
  y = y * f + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const Ints bits = (Ints)(n + magic) << 23;
  y = (Vec)((Ints)y + bits);
  y = x < s.low ? Vec{} : y;
  y = x > s.high ? splat(kInf) : y;
  return x == x ? y : x;
#endif
}
KD_HD Vec vexp(Vec x) { return exp_scaled(x, Scale()); }

// a / b to two ulp, for b that neither b nor 1 / b is subnormal.
KD_HD Vec quotient(Vec a, Vec b) {
#if defined(__AVX512F__)
  const Vec r = (Vec)_mm512_rcp14_ps((__m512)b);
  return a * (r + r * (1.0f - b * r));
#else
  return a / b;
#endif
}

KD_HD double sum(Vec v) {
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}
KD_HD float max_lane(Vec v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best || v[i] != v[i] ? v[i] : best;
  return best;
}

#endif

// p / m = 2^k r. k is from the difference of their bits, which is nearly that of their logarithms, and leaves
// r in [2/3, 3/2]. log r = 2 atanh((r - 1) / (r + 1)), both of which times m: one quotient, whose numerator
// is d where k is 0. A minimax polynomial, to 3e-9.
KD_HD Vec log_ratio(Vec p, Vec m, Vec d) {
  const Ints k = (as_ints(p) - as_ints(m) + 0x400000) & (int32_t)0xff800000;  // its bits
  const Vec over = select(k == 0, d, p * as_vec(0x3f800000 - k) - m);
  const Vec h = quotient(over + over, 2.0f * m + over), z = h * h;
  Vec y = splat(2.37301759e-3f);
  y = y * z + 1.24866157e-2f;
  y = y * z + 8.33336923e-2f;
  return y * (z * h) + h + exponent_times(0.693147181f, k);
}

struct Decay {
  Vec left, lost;
};

// As vexp, but the polynomial is of 2^f - 1, to 1e-8 of it. Where y is small n is 0, and 1 - e^-y is the
// polynomial alone: nothing is subtracted from 1, so no digits go.
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
