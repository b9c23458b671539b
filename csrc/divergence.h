// What each divergence is, once for host and device: the pointwise phi and q_psi = q dphi/dq.
//
// A functor sees p, q, x = log(p / q), log p and log q, over Vec (vec.h), and returns both at once since
// they share their logarithms. One with kFromProbabilities ignores all but p and q, which spares the
// loops a look at the logits. As in kdkernels/divergences.py, q_psi is defined up to c * q and
// chosen to be exactly 0 at x = 0. x may be +-inf (one side is padding) and is NaN where both are.
#pragma once

#include "spec.h"
#include "vec.h"

namespace kd {
namespace KD_ISA {

struct Terms {
  Vec phi, q_psi;
};

// weight * v with 0 * inf = 0 * NaN = 0.
KD_HD Vec times(Vec weight, Vec v) { return select(weight > 0.0f, weight * v, weight - weight); }

// A mixture, which is divided by.
KD_HD Vec mixture(Vec a, Vec b) { return vmax(a + b, splat(kTiny)); }

// The logarithms come from p and q, not from the logits: between models that agree the terms cancel to
// second order, and only what is computed from the same numbers does so.
struct JSD {
  static constexpr bool kFromProbabilities = true;
  float beta, keep;
  KD_HD explicit JSD(const Spec& s) : beta((float)s.first), keep((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec bp = beta * p, kq = keep * q, m = mixture(bp, kq), d = p - q;
    const Vec q_psi = kq * log_ratio(q, m, -beta * d);
    return {bp * log_ratio(p, m, keep * d) + q_psi, q_psi};
  }
};

// The skewed divergences add d to phi, which sums to 0 over a row and leaves of every term its second order.
struct SkewKL {
  static constexpr bool kFromProbabilities = true;
  float alpha, keep;
  KD_HD explicit SkewKL(const Spec& s) : alpha((float)s.first), keep((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec kq = keep * q, m = mixture(alpha * p, kq), d = keep * (q - p);
    return {d + p * log_ratio(p, m, -d), kq * quotient(d, m)};
  }
};

template <bool kDetached>
struct SkewReverseKL {
  static constexpr bool kFromProbabilities = true;
  float alpha, keep;
  KD_HD explicit SkewReverseKL(const Spec& s) : alpha((float)s.first), keep((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec aq = alpha * q, m = mixture(aq, keep * p), d = keep * (p - q);
    const Vec q_log = q * log_ratio(q, m, -d);
    return {d + q_log, kDetached ? q_log : q_log + aq * quotient(d, m)};
  }
};

struct TotalVariation {
  static constexpr bool kFromProbabilities = true;
  KD_HD explicit TotalVariation(const Spec&) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec d = q - p, zero = d - d;
    const Vec half_q = 0.5f * q;
    return {0.5f * vabs(d), select(d > 0.0f, half_q, select(d < 0.0f, -half_q, zero))};
  }
};

struct Mixed {
  static constexpr bool kFromProbabilities = false;
  float forward, reverse;
  KD_HD explicit Mixed(const Spec& s) : forward((float)s.first), reverse((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec x, Vec, Vec) const {
    const Vec r = times(q, -x) * reverse;
    return {forward * times(p, x) + r, forward * (q - p) + r};
  }
};

// e^y - 1 - y for |y| < kSmall, by its series: between near equals a difference of powers keeps nothing.
constexpr float kSmall = 0.25f;
KD_HD Vec small_remainder(Vec y) {
  const Vec tail = y * (1.0f / 120 + y * (1.0f / 720 + y * (1.0f / 5040)));
  return y * y * (0.5f + y * (1.0f / 6 + y * (1.0f / 24 + tail)));
}

// The alpha-beta divergence and its limits; which formula is decided by the two numbers alone.
struct AlphaBeta {
  static constexpr bool kFromProbabilities = false;
  float a, b;
  KD_HD explicit AlphaBeta(const Spec& s) : a((float)s.first), b((float)s.second) {}

  KD_HD Vec power(Vec log_p, float u, Vec log_q, float v) const {
    Vec e = splat(0.0f);
    if (u != 0.0f) e = e + u * log_p;
    if (v != 0.0f) e = e + v * log_q;
    return vexp(vmin(e, splat(100.0f)));  // exp(100) is inf in fp32
  }

  KD_HD Terms operator()(Vec p, Vec q, Vec raw_x, Vec raw_log_p, Vec raw_log_q) const {
    const Vec zero = splat(0.0f);
    const auto padding = (raw_x != raw_x) & (p == 0.0f) & (q == 0.0f);
    const Vec x = select(padding, zero, raw_x);
    const Vec log_p = select(padding, zero, raw_log_p);
    const Vec log_q = select(padding, zero, raw_log_q);
    const Vec q_ab = power(log_p, 0.0f, log_q, a + b);
    const Vec p_ab = power(log_p, a + b, log_q, 0.0f);
    const Vec cross = power(log_p, a, log_q, b);
    const Vec y = a * x;  // cross = q_ab e^y
    const auto close = vabs(y) < kSmall;
    Vec phi, q_psi;
    if (a == 0.0f && b == 0.0f) {
      phi = 0.5f * x * x;
    } else if (b == 0.0f) {
      phi = (times(p_ab, a * x) - p_ab + q_ab) / (a * a);
    } else if (a == 0.0f) {
      phi = (times(q_ab, -b * x) - q_ab + p_ab) / (b * b);
    } else if (a + b == 0.0f) {
      phi = select(close, small_remainder(y), cross - 1.0f - y) / (a * a);
    } else {
      phi = -(cross - (a / (a + b)) * p_ab - (b / (a + b)) * q_ab) / (a * b);
    }
    if (a == 0.0f) {
      q_psi = times(q_ab, -x);
    } else {
      const Vec difference = select(close, -q_ab * (y + small_remainder(y)), q_ab - cross);
      q_psi = select(x == 0.0f, zero, difference / a);
    }
    // At x = 0 (padding too) both are 0; the terms of phi would only nearly cancel.
    return {select(x == 0.0f, zero, phi), select(padding, zero, q_psi)};
  }
};

// Calls f with the divergence's functor type and kind; closed forms get the type void.
template <class F>
KD_HD void with_kind(const Spec& spec, bool teacher, F&& f) {
  switch (teacher ? (int)spec.kind : kNone) {
    case kForwardKL: return f.template operator()<kForwardKL, void>();
    case kReverseKL: return f.template operator()<kReverseKL, void>();
    case kJSD: return f.template operator()<kJSD, JSD>();
    case kSkewKL: return f.template operator()<kSkewKL, SkewKL>();
    case kSkewReverseKL:
      if (spec.second != 0) return f.template operator()<kSkewReverseKL, SkewReverseKL<true>>();
      return f.template operator()<kSkewReverseKL, SkewReverseKL<false>>();
    case kTotalVariation: return f.template operator()<kTotalVariation, TotalVariation>();
    case kAlphaBeta: return f.template operator()<kAlphaBeta, AlphaBeta>();
    case kMixed: return f.template operator()<kMixed, Mixed>();
    default: return f.template operator()<kNone, void>();
  }
}

}  // namespace KD_ISA
}  // namespace kd
