// Vec on a CPU: a compiler vector as wide as the instruction set of the file. Included by vec.h.
//
// exp_scaled is exp(x * scale) for the price of exp: what a temperature divides is then a distance, not a
// logit.
#pragma once

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace kd {
namespace KD_ISA {

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
// k times `each`, given the bits of k in an exponent.
KD_HD Vec exponent_times(float each, Ints bits) {
  return __builtin_convertvector(bits, Vec) * (each / 8388608.0f);
}
KD_HD Vec vabs(Vec a) { return as_vec(as_ints(a) & 0x7fffffff); }

// The compiler cannot fuse a product that the empty assembly might have changed.
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

// A factor of exp's argument, and the lowest x that exp_scaled may be given: exp(low * scale) comes out as 0.
// `kTakesLower`: it may be given lower ones too. They come out as 0; below -1e15 / scale, where the steps
// between floats are too wide for the polynomial, as 0, inf or NaN.
struct Scale {
#if defined(__AVX512F__)
  static constexpr double kLeast = -300;
  static constexpr bool kTakesLower = true;
#else
  static constexpr double kLeast = -127;  // 2^-127 is the exponent of 0
  static constexpr bool kTakesLower = false;
#endif
  float scale = 1, log2 = 1.44269504088896341f;  // log2: times log2 e
  float low = bound(kLeast / 1.44269504088896341);

  Scale() = default;
  KD_HD explicit Scale(double s)
      : scale((float)s),
        log2((float)(s * 1.44269504088896341)),
        low(bound(kLeast / (s * 1.44269504088896341))) {}
  KD_HD static constexpr float bound(double x) { return x < -3e38 ? -3e38f : (float)x; }
};

// exp(x * scale) of an x from scale.low on, up to 88 / scale; 0 below -87 / scale. Above, the result means
// nothing: the caller sees to it. No other checks, so that this is ten instructions.
//
// 2^(x scale log2 e) = 2^n * 2^f. f comes from one fused multiply-add, so its error is that of the constant:
// 3e-8 |x scale|, less than the rounding of the logits that x is a difference of. 2^f is a minimax polynomial
// of degree 5. Its constant term is 1, so that exp(0) is exactly 1.
KD_HD Vec exp_scaled(Vec x, const Scale& s) {
  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits. 127 more make it the
  // exponent of 2^n, once shifted.
  const Vec magic = splat(12582912.0f + 127.0f);
  const Vec shifted = x * s.log2 + magic, n = shifted - magic;
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
  return y * as_vec(as_ints(shifted) << 23);
#endif
}
KD_HD Vec vexp(Vec x) {
  const Scale one;
  return exp_scaled(vmax(vmin(x, splat(88.9f)), splat(one.low)), one);
}

// A divider works beside the multipliers, which Newton's steps from an estimate would keep busy.
KD_HD Vec quotient(Vec a, Vec b) { return a / b; }

// In pairs: in a chain each addition would wait for the one before it.
KD_HD double sum(Vec v) {
  double lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = v[i];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}
// Of lanes without NaN.
KD_HD float max_lane(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] < lanes[i + half] ? lanes[i + half] : lanes[i];
  return lanes[0];
}

}  // namespace KD_ISA
}  // namespace kd
