// What each divergence is, once for host and device: the pointwise phi and q_psi = q dphi/dq.
//
// A functor is made of the divergence's parameters (kdkernels/divergences.py, in the order of its fields) and
// of whether p and q `disagree` in this row (row_state.h), which only SkewKL asks. It sees p, q, x = log(p /
// q), log p and log q, over Vec (vec.h), and returns phi and q_psi at once, since they share their
// logarithms. One with kFromProbabilities ignores all but p and q, which spares the loops a look at the
// logits. q_psi is defined up to c * q, and c is chosen so that it is exactly 0 where p = q. x may be +-inf
// (one side is padding) and is NaN where both are.
#pragma once

#include <type_traits>

#include "spec.h"
#include "vec.h"

namespace kd {
namespace KD_ISA {

struct Terms {
  Vec phi, q_psi;
};

// Stands for a functor where there is none: the divergence follows from the sums of the first pass.
struct ClosedForm {
  KD_HD ClosedForm(const double*, bool) {}
};
template <class Divergence>
constexpr bool kHasClosedForm = std::is_same_v<Divergence, ClosedForm>;

// weight * v, where weight 0 gives 0 even of inf and NaN.
KD_HD Vec times(Vec weight, Vec v) { return select(weight > 0.0f, weight * v, weight - weight); }

// A mixture a + b, large enough to divide by.
KD_HD Vec mixture(Vec a, Vec b) { return vmax(a + b, splat(kTiny)); }

// Between models that agree the terms cancel to second order. They do so only if all of them are computed
// from the same p and q: hence the logarithms come from p and q, not from the logits.
struct JSD {
  static constexpr bool kFromProbabilities = true;
  float beta, complement;
  KD_HD explicit JSD(const double* parameters, bool)
      : beta((float)parameters[0]), complement((float)(1.0 - parameters[0])) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec bp = beta * p, cq = complement * q, m = mixture(bp, cq), d = p - q;
    const Vec q_psi = cq * log_ratio(q, m, -beta * d);
    return {bp * log_ratio(p, m, complement * d) + q_psi, q_psi};
  }
};

// The skewed divergences add d to phi. It sums to 0 over a row and leaves of every term its second order.
//
// SkewKL's psi is -p / m. Adding 1 makes it 0 where p = q. But sum q p / m may be as small as the mass that p
// and q have in common. Where that is little, the 1 would be nearly all of every psi and of the sum of q psi,
// which are subtracted from each other. So it is not added where they `disagree`.
struct SkewKL {
  static constexpr bool kFromProbabilities = true;
  float alpha, complement;
  bool disagree;
  KD_HD SkewKL(const double* parameters, bool disagree)
      : alpha((float)parameters[0]), complement((float)(1.0 - parameters[0])), disagree(disagree) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec cq = complement * q, m = mixture(alpha * p, cq), d = complement * (q - p);
    return {d + p * log_ratio(p, m, -d), cq * quotient(disagree ? -p : d, m)};
  }
};

template <bool kDetached>
struct SkewReverseKL {
  static constexpr bool kFromProbabilities = true;
  float alpha, complement;
  KD_HD explicit SkewReverseKL(const double* parameters, bool)
      : alpha((float)parameters[0]), complement((float)(1.0 - parameters[0])) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec aq = alpha * q, m = mixture(aq, complement * p), d = complement * (p - q);
    const Vec q_log = q * log_ratio(q, m, -d);
    return {d + q_log, kDetached ? q_log : q_log + aq * quotient(d, m)};
  }
};

struct TotalVariation {
  static constexpr bool kFromProbabilities = true;
  KD_HD explicit TotalVariation(const double*, bool) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const Vec d = q - p, zero = d - d;
    const Vec half_q = 0.5f * q;
    return {0.5f * vabs(d), select(d > 0.0f, half_q, select(d < 0.0f, -half_q, zero))};
  }
};

// What both have in common. psi is 1 where q < p and else 0: its sum over q is then as small as the overlap,
// and keeps its digits, where total variation's would be 1/2 less something.
struct Overlap {
  static constexpr bool kFromProbabilities = true;
  KD_HD explicit Overlap(const double*, bool) {}
  KD_HD Terms operator()(Vec p, Vec q, Vec, Vec, Vec) const {
    const auto less = q < p;
    return {select(less, q, p), select(less, q, splat(0.0f))};
  }
};

struct Mixed {
  static constexpr bool kFromProbabilities = false;
  float forward, reverse;
  KD_HD explicit Mixed(const double* parameters, bool)
      : forward((float)parameters[0]), reverse((float)(1.0 - parameters[0])) {}
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
  // One of exp's three arguments: of_p log p + of_q log q.
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
  // The distance from one corner to another, per |x|. Less than kTiny counts as 0, which changes no finite
  // result.
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

  KD_HD AlphaBeta(const double* parameters, bool)
      : AlphaBeta(parameters[0], Corners(parameters[0], parameters[1])) {}
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

  // exp[h, t, -h] for |t| <= h < 3/8: a series. Its terms are the complete symmetric polynomials of degree n
  // in h, t and -h, over (n + 2)!.
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
    // Where p = q both are 0, whatever overflows.
    return {select(equal, zero, times(peak, select(reach < 0.75f, near, apart))), select(equal, zero, psi)};
  }
};

// Calls f with a kind and its functor's type. Without a teacher there is no divergence.
template <class F>
KD_HD void with_kind(Kind kind, bool teacher, F&& f) {
  switch (teacher ? kind : kNone) {
    case kForwardKL:
      return f.template operator()<kForwardKL, ClosedForm>();
    case kReverseKL:
      return f.template operator()<kReverseKL, ClosedForm>();
    case kJSD:
      return f.template operator()<kJSD, JSD>();
    case kSkewKL:
      return f.template operator()<kSkewKL, SkewKL>();
    case kSkewReverseKL:
      return f.template operator()<kSkewReverseKL, SkewReverseKL<false>>();
    case kSkewReverseKLDetached:
      return f.template operator()<kSkewReverseKLDetached, SkewReverseKL<true>>();
    case kTotalVariation:
      return f.template operator()<kTotalVariation, TotalVariation>();
    case kOverlap:
      return f.template operator()<kOverlap, Overlap>();
    case kAlphaBeta:
      return f.template operator()<kAlphaBeta, AlphaBeta>();
    case kMixed:
      return f.template operator()<kMixed, Mixed>();
    default:
      return f.template operator()<kNone, ClosedForm>();
  }
}

}  // namespace KD_ISA
}  // namespace kd
