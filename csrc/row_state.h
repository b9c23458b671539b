// The online state of a row: sums over the logits seen so far, relative to running maxima.
//
// The layout is kdkernels/backends/row_state.py's. Sums inside a block are fp32, across blocks and
// in everything that is once per row fp64: it costs nothing there and keeps lse's digits. Maxima, tops and
// the label's logit are logits as they came, before the temperature: divided by it they would be rounded, and
// what is near to them in value would lose its digits.
#pragma once

#include <math.h>

#include <cstdint>

#include "spec.h"
#include "vec.h"

namespace kd {

struct RowState {
  double m_s, z_s, m_t, z_t;       // maxima; sum e, e = exp((s - m_s) / T)
  double x_s, x_t;                 // sum e x,  x = ((t - m_t) - (s - m_s)) / T
  double e_s, e_t;                 // sum e (s - m_s) / T, sum e (t - m_t) / T
  double z1_s, z1_t;               // sum exp(s - m_s), sum exp(t - m_t)
  double sum_s, label_s, label_t;  // sum of the logits; the label's
  double top_s, arg_s, top_t, arg_t;
  double value, slope;  // second pass

  KD_HD double lse_s(double temperature) const { return m_s / temperature + log(z_s); }
  KD_HD double lse1_s() const { return m_s + log(z1_s); }
  KD_HD double lse1_t() const { return m_t + log(z1_t); }
};
constexpr int kStateColumns = sizeof(RowState) / sizeof(double);

constexpr double kNothing = -3.4028234663852886e38;  // the maximum of nothing; finite: m - m is 0

KD_HD RowState empty_state() {
  RowState s{};
  s.m_s = s.m_t = s.top_s = s.top_t = kNothing;
  return s;
}

KD_HD double kept(double mass, double shift) { return mass > 0 ? mass * shift : 0.0; }

// What decays to nothing is 0, an infinity too: there p (or q) is 0, and 0 * inf counts as 0.
KD_HD double faded(double sum, double decay) { return decay == 0 ? 0.0 : sum * decay; }

// Move the sums to the higher maxima m_s and m_t.
KD_HD void raise(RowState& r, double m_s, double m_t, double temperature) {
  const double up_s = m_s - r.m_s, up_t = m_t - r.m_t;
  if (up_s == 0 && up_t == 0) return;
  const double far_s = up_s / temperature, far_t = up_t / temperature;
  const double k_s = exp(-far_s), k_t = exp(-far_t);
  r.x_s = faded(r.x_s + kept(r.z_s, far_s - far_t), k_s);
  r.x_t = faded(r.x_t + kept(r.z_t, far_s - far_t), k_t);
  r.e_s = faded(r.e_s - kept(r.z_s, far_s), k_s);
  r.e_t = faded(r.e_t - kept(r.z_t, far_t), k_t);
  r.z_s *= k_s;
  r.z_t *= k_t;
  r.z1_s *= exp(-up_s);
  r.z1_t *= exp(-up_t);
  r.m_s = m_s;
  r.m_t = m_t;
}

KD_HD double divergence_value(const RowState& r, int kind) {
  const double gap = log(r.z_t) - log(r.z_s);
  if (kind == kForwardKL) return r.x_t / r.z_t - gap;
  if (kind == kReverseKL) return gap - r.x_s / r.z_s;
  return r.value;
}

// Whether a divergence needs x_t: ForwardKL is made of it, SkewKL asks by it whether p and q `disagree`.
KD_HD constexpr bool needs_x_t(int kind) { return kind == kForwardKL || kind == kSkewKL; }

// Whether KL(p || q) is above 1/2, given log z_t - log z_s. Below, p and q have at least half their mass in
// common.
KD_HD bool disagree(const RowState& r, double gap) { return !(r.x_t / r.z_t - gap <= 0.5); }

// The student's cross entropy, lse being its normaliser at temperature 1 and `gap` its distance to the
// label's logit.
KD_HD double hard_term(const RowState& r, double lse, double gap, const Spec& spec, int64_t vocab) {
  const double smooth = spec.label_smoothing;
  double hard = (smooth < 1 ? (1 - smooth) * gap : 0) + spec.z_loss * lse * lse;
  if (smooth != 0) hard += smooth * (lse - r.sum_s / (double)vocab);
  return hard;
}

// results: soft, hard, student entropy, teacher entropy, agreement, teacher's hard term.
KD_HD void finish(const RowState& r, const Spec& spec, bool soft, bool labelled, int64_t vocab,
                  double* results) {
  results[2] = log(r.z_s) - r.e_s / r.z_s;
  if (soft) {
    results[0] = divergence_value(r, (int)spec.kind);
    results[3] = log(r.z_t) - r.e_t / r.z_t;
    results[4] = r.arg_s == r.arg_t;
  }
  if (!labelled) return;
  // The maximum's distance to the label first: both may be far from 0, where a sum has no digits for a small
  // gap.
  if (spec.hard_weight != 0)
    results[1] = hard_term(r, r.lse1_s(), (r.m_s - r.label_s) + log(r.z1_s), spec, vocab);
  if (spec.teacher_hard_weight != 0) results[5] = (r.m_t - r.label_t) + log(r.z1_t);
}

}  // namespace kd
