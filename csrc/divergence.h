// What each divergence is, once for host and device: the pointwise phi and q_psi = q dphi/dq.
//
// A functor sees p, q, x = log(p / q), log p and log q, over Vec (vec.h), and returns both at once since
// they share their logarithms. One with kFromProbabilities ignores all but p and q, which spares the
// loops a look at the logits. As in kdkernels/divergences.py, q_psi is defined up to c * q and
// chosen to be exactly 0 at x = 0; but SkewKL has another constant in a row of which p and q `disagree`
// (row_state.h). x may be +-inf (one side is padding) and is NaN where both are.
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
  KD_HD explicit JSD(const Spec& s, bool) : beta((float)s.first), keep((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec bp = beta * p, kq = keep * q, m = mixture(bp, kq), d = p - q;
    const Vec q_psi = kq * log_ratio(q, m, -beta * d);
    return {bp * log_ratio(p, m, keep * d) + q_psi, q_psi};
  }
};

// The skewed divergences add d to phi, which sums to 0 over a row and leaves of every term its second order.
//
// SkewKL's psi is -p / m, to which 1 is added: 0 where p = q. But the slope, sum q p / m, is at least the
// mass that p and q have in common; where they have little, the 1 would be nearly all of every psi and of the
// slope, which cancel.
struct SkewKL {
  static constexpr bool kFromProbabilities = true;
  float alpha, keep;
  bool disagree;
  KD_HD SkewKL(const Spec& s, bool disagree)
      : alpha((float)s.first), keep((float)(1.0 - s.first)), disagree(disagree) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec kq = keep * q, m = mixture(alpha * p, kq), d = keep * (q - p);
    return {d + p * log_ratio(p, m, -d), kq * quotient(disagree ? -p : d, m)};
  }
};

template <bool kDetached>
struct SkewReverseKL {
  static constexpr bool kFromProbabilities = true;
  float alpha, keep;
  KD_HD explicit SkewReverseKL(const Spec& s, bool) : alpha((float)s.first), keep((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec aq = alpha * q, m = mixture(aq, keep * p), d = keep * (p - q);
    const Vec q_log = q * log_ratio(q, m, -d);
    return {d + q_log, kDetached ? q_log : q_log + aq * quotient(d, m)};
  }
};

struct TotalVariation {
  static constexpr bool kFromProbabilities = true;
  KD_HD explicit TotalVariation(const Spec&, bool) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec d = q - p, zero = d - d;
    const Vec half_q = 0.5f * q;
    return {0.5f * vabs(d), select(d > 0.0f, half_q, select(d < 0.0f, -half_q, zero))};
  }
};

struct Mixed {
  static constexpr bool kFromProbabilities = false;
  float forward, reverse;
  KD_HD explicit Mixed(const Spec& s, bool) : forward((float)s.first), reverse((float)(1.0 - s.first)) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec x, Vec, Vec) const {
    const Vec r = times(q, -x) * reverse;
    return {forward * times(p, x) + r, forward * (q - p) + r};
  }
};

// The alpha-beta divergence without limit cases. A term is x^2 exp[s log q, a log p + b log q, s log p] with
// s = a + b and exp[...] the divided difference of exp, and q_psi is -x exp[s log q, a log p + b log q]. Two
// of exp's arguments differ by a x, b x or s x, so which is the highest and which the lowest depends on x's
// sign alone.
struct AlphaBeta {
  static constexpr bool kFromProbabilities = false;
  // An argument of exp as a combination of the logarithms.
  struct Corner {
    double of_p, of_q;
  };
  struct Power {
    float of_p, of_q;
    KD_HD explicit Power(Corner c) : of_p((float)c.of_p), of_q((float)c.of_q) {}
    KD_HD Vec exponent(Vec log_p, Vec log_q) const {
      Vec e = splat(0.0f);
      if (of_p != 0.0f) e = e + of_p * log_p;
      if (of_q != 0.0f) e = e + of_q * log_q;
      return e;
    }
  };
  struct Corners {
    Corner low, middle, high;
    KD_HD static void order(Corner& first, Corner& second) {
      if (first.of_p <= second.of_p) return;
      const Corner last = first;
      first = second;
      second = last;
    }
    KD_HD Corners(double a, double b) : low{0, a + b}, middle{a, b}, high{a + b, 0} {
      order(low, middle);
      order(middle, high);
      order(low, middle);
    }
  };
  // The distance from one corner to another, per |x|. Below kTiny it is 0, which changes nothing of what is
  // finite.
  struct Gap {
    float rate, per_rate;
    KD_HD explicit Gap(double r)
        : rate(r < kTiny ? 0.0f : (float)r), per_rate(r < kTiny ? 0.0f : (float)(1 / r)) {}
    KD_HD Vec of(Vec distance) const { return rate == 0.0f ? splat(0.0f) : rate * distance; }
    // The integral of e^(-rate t) over the distance.
    KD_HD Vec span(Vec distance, Vec lost) const { return rate == 0.0f ? distance : lost * per_rate; }
  };

  Power low, high;
  Gap upper, lower, outer;  // high to middle, middle to low, high to low
  float inner;              // from their center to the middle one
  bool q_psi_upper,
      q_psi_lower;  // whether the two corners of q_psi are the ends of that gap; else of the outer

  KD_HD AlphaBeta(const Spec& s, bool) : AlphaBeta(s.first, Corners(s.first, s.second)) {}
  KD_HD AlphaBeta(double a, const Corners& c)
      : low(c.low),
        high(c.high),
        upper(c.high.of_p - c.middle.of_p),
        lower(c.middle.of_p - c.low.of_p),
        outer(c.high.of_p - c.low.of_p),
        inner((float)(c.middle.of_p - 0.5 * (c.low.of_p + c.high.of_p))),
        q_psi_upper(has_ends(c.high, c.middle, a)),
        q_psi_lower(has_ends(c.middle, c.low, a)) {}
  KD_HD static bool has_ends(Corner x, Corner y, double a) {
    return (x.of_p == 0 && y.of_p == a) || (x.of_p == a && y.of_p == 0);
  }

  // exp[h, t, -h] for |t| <= h < 3/8: a series whose terms are the complete symmetric polynomials of the
  // three over (n + 2)!.
  KD_HD static Vec series(Vec t, Vec h) {
    const Vec z = h * h;
    const Vec fourth = 1.0f / 720 + t * (1.0f / 5040 + t * (1.0f / 40320));
    const Vec second = 1.0f / 24 + t * (1.0f / 120 + t * fourth) + z * (fourth + z * (1.0f / 40320));
    return 0.5f + t * (1.0f / 6 + t * (1.0f / 24 + t * (1.0f / 120 + t * fourth))) + z * second;
  }
  // e^-h, for h < 3/8.
  KD_HD static Vec small_decay(Vec h) {
    const Vec tail = h * (1.0f / 24 - h * (1.0f / 120 - h * (1.0f / 720 - h * (1.0f / 5040))));
    return 1.0f - h * (1.0f - h * (0.5f - h * (1.0f / 6 - tail)));
  }

  KD_HD Terms operator()(Vec p, Vec q, Vec raw_x, Vec raw_log_p, Vec raw_log_q) const {
    const Vec zero = splat(0.0f);
    const auto padding = (raw_x != raw_x) & (p == 0.0f) & (q == 0.0f);
    const Vec x = select(padding, zero, raw_x), distance = vabs(x);
    const Vec log_p = select(padding, zero, raw_log_p), log_q = select(padding, zero, raw_log_q);
    const auto rising = x > 0.0f, equal = x == 0.0f;
    // From the highest corner down: over the first gap, then over the second.
    const Decay u = decay(upper.of(distance)), l = decay(lower.of(distance));
    const Vec u_span = upper.span(distance, u.lost), l_span = lower.span(distance, l.lost);
    const Vec left = select(rising, u.left, l.left);
    const Vec first = select(rising, u_span, l_span), second = select(rising, l_span, u_span);
    const Vec top = select(rising, high.exponent(log_p, log_q), low.exponent(log_p, log_q));
    const Vec peak = vexp(vmin(top, splat(100.0f)));  // exp(100) is inf in fp32
    const Vec reach = outer.of(distance), half = 0.5f * reach;
    const Vec near = distance * distance * small_decay(half) * series(inner == 0.0f ? zero : inner * x, half);
    const Vec apart = (first - times(left, second)) * outer.per_rate;
    Vec slope;
    if (q_psi_upper) {
      slope = select(rising, u_span, times(left, u_span));
    } else if (q_psi_lower) {
      slope = select(rising, times(left, l_span), l_span);
    } else {
      slope = outer.span(distance, select(rising, u.lost + u.left * l.lost, l.lost + l.left * u.lost));
    }
    const Vec psi = times(peak, select(rising, -slope, slope));
    // Between equals both are 0, whatever overflows.
    return {select(equal, zero, times(peak, select(reach < 0.75f, near, apart))), select(equal, zero, psi)};
  }
};

// Calls f with the divergence's functor type and kind; closed forms get the type void.
template <class F>
KD_HD void with_kind(const Spec& spec, bool teacher, F&& f) {
  switch (teacher ? (int)spec.kind : kNone) {
    case kForwardKL:
      return f.template operator()<kForwardKL, void>();
    case kReverseKL:
      return f.template operator()<kReverseKL, void>();
    case kJSD:
      return f.template operator()<kJSD, JSD>();
    case kSkewKL:
      return f.template operator()<kSkewKL, SkewKL>();
    case kSkewReverseKL:
      if (spec.second != 0) return f.template operator()<kSkewReverseKL, SkewReverseKL<true>>();
      return f.template operator()<kSkewReverseKL, SkewReverseKL<false>>();
    case kTotalVariation:
      return f.template operator()<kTotalVariation, TotalVariation>();
    case kAlphaBeta:
      return f.template operator()<kAlphaBeta, AlphaBeta>();
    case kMixed:
      return f.template operator()<kMixed, Mixed>();
    default:
      return f.template operator()<kNone, void>();
  }
}

}  // namespace KD_ISA
}  // namespace kd
