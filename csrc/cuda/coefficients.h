// What the passes after the first need of a finished row, worked out once a row in fp64.
#pragma once

#include "../job.h"
#include "../row_state.h"
#include "platform.h"

namespace kd {

constexpr double kLog2eExact = 1.4426950408889634074;

// What turns a pair of logits into p, q and their logarithms, and the weight of the soft term.
struct Normal {
  float m_s, m_t;                // maxima, of logits before the temperature
  float log2_z_s, log2_z_t;      // q = 2^((s - m_s) factor - log2_z_s)
  float gap;                     // log z_s - log z_t
  float slope;                   // subtracted from what multiplies q
  float soft;                    // the row's weight on the divergence's gradient
};

struct Coefficients {
  Normal normal;
  float rest;                      // times q: a sparse target's tail
  float pull, at, onehot, spread;  // hard: pull * 2^((s - m_s) log2 e + at) - onehot - spread
  float teacher_pull, teacher_at, teacher_onehot;
};

// `lse1`: the student's normaliser at temperature 1. `rest`: of a sparse target, 0 without. The hard terms
// count where the row has a label.
KD_DEVICE Coefficients coefficients(const RowState& r, const Spec& spec, int kind, double weight, bool labelled,
                                    double lse1, double rest, int64_t vocab) {
  Coefficients c;
  Normal& n = c.normal;
  const double log_z_s = r.z_s > 0 || r.z_s != r.z_s ? log(r.z_s) : 0;  // nothing is left of the rest: see `rest`
  const double log_z_t = kind == kNone ? 0 : log(r.z_t);
  n.m_s = (float)(r.m_s * spec.temperature);
  n.m_t = (float)(r.m_t * spec.temperature);
  n.log2_z_s = (float)(log_z_s * kLog2eExact);
  n.log2_z_t = (float)(log_z_t * kLog2eExact);
  n.gap = (float)(log_z_s - log_z_t);
  n.slope = (float)(kind == kReverseKL ? divergence_value(r, kind) : r.slope);
  n.soft = (float)(weight * spec.soft_weight / spec.temperature);
  c.rest = r.z_s > 0 ? (float)(weight * rest) : 0.0f;
  const double hard = labelled ? weight * spec.hard_weight : 0;
  const double teacher = labelled ? weight * spec.teacher_hard_weight : 0;
  c.pull = (float)(hard * (1 + 2 * spec.z_loss * lse1));
  c.at = (float)((r.m_s * spec.temperature - lse1) * kLog2eExact);
  c.onehot = (float)(hard * (1 - spec.label_smoothing));
  c.spread = (float)(hard * spec.label_smoothing / (double)vocab);
  c.teacher_pull = c.teacher_onehot = (float)teacher;
  c.teacher_at = (float)(-log(r.z1_t) * kLog2eExact);
  return c;
}

}  // namespace kd
