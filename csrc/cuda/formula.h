// A divergence over one pair of logits, from the row's finished normalisers.
#pragma once

#include <type_traits>

#include "../divergence.h"
#include "coefficients.h"

namespace kd {

using namespace KD_ISA;

template <int kKind, class Divergence>
class Formula {
  static constexpr bool kClosed = std::is_void_v<Divergence>;
  struct Nothing {
    KD_DEVICE Nothing(const Spec&, bool) {}
  };
  using Functor = std::conditional_t<kClosed, Nothing, Divergence>;

 public:
  // `factor`: log2(e) / T.
  KD_DEVICE Formula(const Spec& spec, const Normal& n, float factor)
      : functor_(spec, kKind == kSkewKL && n.gap != 0), factor_(factor) {}

  // phi and q_psi, for divergences without a closed form.
  KD_DEVICE Terms terms(const Normal& n, float s, float t) const {
    const Pair v = pair(n, s, t);
    return functor_(v.p, v.q, v.x, v.log_p, v.log_q);
  }

  // d(soft term)/d(logit before the temperature), with the row's weight.
  KD_DEVICE float gradient(const Normal& n, float s, float t) const {
    const Pair v = pair(n, s, t);
    if constexpr (kKind == kForwardKL) return (v.q - v.p) * n.soft;
    if constexpr (kKind == kReverseKL) return v.q > 0 ? v.q * (-v.x - n.slope) * n.soft : v.q;
    if constexpr (!kClosed)
      return (functor_(v.p, v.q, v.x, v.log_p, v.log_q).q_psi - rounded_product(v.q, n.slope)) * n.soft;
    return 0;
  }

 private:
  struct Pair {
    float p, q, x, log_p, log_q;  // x = log(p / q)
  };
  KD_DEVICE Pair pair(const Normal& n, float s, float t) const {
    constexpr float kLn2 = (float)(1 / kLog2eExact);
    const float d_s = s - n.m_s, d_t = t - n.m_t;
    const float u_s = d_s * factor_ - n.log2_z_s, u_t = d_t * factor_ - n.log2_z_t;
    return {fast_exp2(u_t), fast_exp2(u_s), (d_t - d_s) * (factor_ * kLn2) + n.gap, u_t * kLn2, u_s * kLn2};
  }

  Functor functor_;
  float factor_;
};

}  // namespace kd
