// What the passes after the first need of a finished row, worked out once a row in fp64.
#pragma once

#include "../job.h"
#include "../row_state.h"
#include "platform.h"

namespace kd {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLog2eExact = 1.4426950408889634074;

// What turns a pair of logits into p, q and their logarithms, and the weight of the soft term.
struct Normal {
  float m_s, m_t;            // maxima
  float log2_z_s, log2_z_t;  // q = 2^((s - m_s) factor - log2_z_s)
  float gap;                 // log z_s - log z_t; SkewKL, which needs none: 1 where p and q disagree, else 0
  float slope;               // subtracted from what multiplies q
  float soft;                // the row's weight on the divergence's gradient
};

// The gradient of a cross entropy: weight * (e^(logit - lse1) - onehot). lse1 in two parts, since the
// distance to it decides, and not its own size.
struct Pull {
  float weight = 0, lse1 = 0, rest = 0, onehot = 0;  // rest: of lse1, negative, times log2 e

  KD_DEVICE float operator()(float logit) const {
    return weight == 0 ? 0.0f : weight * fast_exp2((logit - lse1) * kLog2e + rest);
  }
};

KD_DEVICE Pull pull(double weight, double onehot, double lse1) {
  const float near = (float)lse1;
  return {(float)weight, near, (float)((near - lse1) * kLog2eExact), (float)onehot};
}

struct Coefficients {
  Normal normal;
  float rest;  // times q: a sparse target's tail
  Pull hard, teacher_hard;
  float spread;  // label smoothing
};

// log of one of a state's normalisers.
struct Logs {
  double z_s, z_t, z1_s, z1_t;
};

// By a warp, each in a lane of its own: a logarithm in fp64 takes as long as all else here.
KD_DEVICE Logs logs_of(const RowState& r) {
  const int lane = thread_index() % kWarp;
  const double mine = log(lane == 0 ? r.z_s : lane == 1 ? r.z_t : lane == 2 ? r.z1_s : r.z1_t);
  return {from_lane(mine, 0), from_lane(mine, 1), from_lane(mine, 2), from_lane(mine, 3)};
}

// `lse1`: the student's normaliser at temperature 1. `rest`: of a sparse target, 0 without. The hard terms
// count where the row has a label.
KD_DEVICE Coefficients coefficients(const RowState& r, const Logs& logs, const Spec& spec, int kind,
                                    double weight, bool labelled, double lse1, double rest, int64_t vocab) {
  Coefficients c;
  Normal& n = c.normal;
  // Of a sparse target's rest nothing may be left; then `rest` is 0 as well.
  const double log_z_s = kind == kNone && r.z_s == 0 ? 0 : logs.z_s, log_z_t = kind == kNone ? 0 : logs.z_t;
  n.m_s = (float)r.m_s;
  n.m_t = (float)r.m_t;
  n.log2_z_s = (float)(log_z_s * kLog2eExact);
  n.log2_z_t = (float)(log_z_t * kLog2eExact);
  n.gap = (float)(log_z_s - log_z_t);
  // Not a field of its own: the kernel for bf16 has no register left on sm_90a, and would spill.
  if (kind == kSkewKL) n.gap = disagree(r, log_z_t - log_z_s) ? 1.0f : 0.0f;
  n.slope = (float)r.slope;
  if (kind == kReverseKL) {  // log(q / p) - D: the gap is in both, and would only round
    n.gap = 0;
    n.slope = (float)(-r.x_s / r.z_s);
  }
  n.soft = (float)(weight * spec.soft_weight / spec.temperature);
  c.rest = r.z_s > 0 ? (float)(weight * rest) : 0.0f;
  const double hard = labelled ? weight * spec.hard_weight : 0;
  const double teacher = labelled ? weight * spec.teacher_hard_weight : 0;
  c.hard = pull(hard * (1 + 2 * spec.z_loss * lse1), hard * (1 - spec.label_smoothing), lse1);
  c.teacher_hard = pull(teacher, teacher, r.m_t + logs.z1_t);
  c.spread = (float)(hard * spec.label_smoothing / (double)vocab);
  return c;
}

}  // namespace kd
