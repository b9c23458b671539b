// A divergence over one pair of logits, from the row's finished normalisers.
#pragma once

#include "../divergence.h"
#include "coefficients.cuh"

namespace kd {

using namespace KD_ISA;

template <Kind kKind, class Divergence>
class Formula {
 public:
  KD_DEVICE Formula(const double* parameters, const Normal& n)
      : functor_(parameters, kKind == kSkewKL && n.gap != 0) {}

  // phi and q_psi, for divergences without a closed form.
  KD_DEVICE Terms terms(const Normal& n, float s, float t) const {
    const Pair v = pair(n, s, t);
    return functor_(v.p, v.q, v.x, v.log_p, v.log_q);
  }

  // The soft output's gradient for the logit, before its map, with the row's weight.
  KD_DEVICE float gradient(const Normal& n, float s, float t) const {
    const Pair v = pair(n, s, t);
    if constexpr (kKind == kForwardKL) return (v.q - v.p) * n.soft;
    if constexpr (kKind == kReverseKL) return v.q > 0 ? v.q * (-v.x - n.sum_q_psi) * n.soft : v.q;
    if constexpr (!kHasClosedForm<Divergence>)
      return (functor_(v.p, v.q, v.x, v.log_p, v.log_q).q_psi - rounded_product(v.q, n.sum_q_psi)) * n.soft;
    return 0;
  }

 private:
  struct Pair {
    float p, q, x, log_p, log_q;  // x = log(p / q)
  };
  KD_DEVICE static Pair pair(const Normal& n, float s, float t) {
    constexpr float kLn2 = (float)(1 / kLog2eExact);
    const float d_s = s - n.reference_s, d_t = t - n.reference_t;
    const float u_s = d_s * n.factor - n.log2_sum_exp_s, u_t = d_t * n.factor - n.log2_sum_exp_t;
    return {fast_exp2(u_t), fast_exp2(u_s), (d_t - d_s) * (n.factor * kLn2) + n.gap, u_t * kLn2, u_s * kLn2};
  }

  Divergence functor_;
};

}  // namespace kd
