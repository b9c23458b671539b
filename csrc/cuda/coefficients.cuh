// What the passes after the first need of a finished row, worked out once a row in fp64.
#pragma once

#include "../job.h"
#include "../row_state.h"
#include "platform.cuh"

namespace kd {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLog2eExact = 1.4426950408889634074;

// What turns a distance between logits into a power of two.
KD_DEVICE float log2e_over(double temperature) {
  return temperature == 1 ? kLog2e : (float)(kLog2eExact / temperature);
}

// What turns a pair of logits into p, q and their logarithms, and the weight of the soft output.
struct Normal {
  float factor;                          // log2(e) / T
  float reference_s, reference_t;        // running maxima
  float log2_sum_exp_s, log2_sum_exp_t;  // q = 2^((s - reference_s) factor - log2_sum_exp_s)
  float gap;        // log sum_exp_s - log sum_exp_t; of SkewKL, which needs none: disagree()
  float sum_q_psi;  // subtracted from what multiplies q
  float soft;       // what the divergence's gradient is multiplied by
};

// The gradient of an output at temperature 1: weight * e^(logit - lse), and `onehot` less at the label.
struct Pull {
  float weight = 0, reference = 0, log2_sum_exp = 0, onehot = 0;

  KD_DEVICE float operator()(float logit) const {
    return weight == 0 ? 0.0f : weight * fast_exp2((logit - reference) * kLog2e - log2_sum_exp);
  }
};

KD_DEVICE Pull pull(double weight, double onehot, const Normaliser& at_1) {
  return {(float)weight, (float)at_1.reference, (float)(at_1.log_sum_exp * kLog2eExact), (float)onehot};
}

// The entropy's gradient: q_j (mean_shift - shift_j) / T times the weight, from which the normaliser cancels
// (row_state.h).
struct EntropyPull {
  float factor = 0, reference = 0, log2_sum_exp = 0;
  float mean = 0, slope = 0;  // per unit of a logit; 0: the weight is 0, or no entropy is asked for

  KD_DEVICE float operator()(float logit) const {
    const float d = logit - reference, q = fast_exp2(d * factor - log2_sum_exp);
    return q == 0 ? 0.0f : q * (mean - d * slope);  // d may be -inf
  }
};

KD_DEVICE EntropyPull entropy_pull(double weight, const Softmax& row, double temperature) {
  if (weight == 0) return {};
  const double share = weight / temperature;
  return {log2e_over(temperature), (float)row.reference, (float)(row.log_sum_exp * kLog2eExact),
          (float)(share * row.mean_shift), (float)(share / temperature)};
}

struct Coefficients {
  Normal normal;
  float rest;  // of a sparse target's rest, times its softmax
  Pull hard, teacher_label;
  float spread;  // of label smoothing, the same in all columns
  double soft_weight;
  bool live;  // whether a weight is not 0
};

// log of each of a state's normalisers.
struct Logs {
  double sum_exp_s, sum_exp_t, sum_exp_t1_s, sum_exp_t1_t;
};

// By a warp, each in a lane of its own: a logarithm in fp64 takes as long as all else here.
KD_DEVICE Logs logs_of(const RowState& r) {
  const int lane = thread_index() % kWarp;
  const double mine = log(lane == 0   ? r.student.sum_exp
                          : lane == 1 ? r.teacher.sum_exp
                          : lane == 2 ? r.student.sum_exp_t1
                                      : r.teacher.sum_exp_t1);
  return {from_lane(mine, 0), from_lane(mine, 1), from_lane(mine, 2), from_lane(mine, 3)};
}

KD_DEVICE Normal normal(const RowState& r, const Logs& logs, Kind kind, double temperature,
                        double soft_weight) {
  Normal n;
  // Nothing may be left of a sparse target's rest. Then `rest` is 0 as well.
  const double log_s = kind == kNone && r.student.sum_exp == 0 ? 0 : logs.sum_exp_s;
  const double log_t = kind == kNone ? 0 : logs.sum_exp_t;
  n.factor = log2e_over(temperature);
  n.reference_s = (float)r.student.reference;
  n.reference_t = (float)r.teacher.reference;
  n.log2_sum_exp_s = (float)(log_s * kLog2eExact);
  n.log2_sum_exp_t = (float)(log_t * kLog2eExact);
  n.gap = (float)(log_s - log_t);
  // Not a field of its own: the kernel for bf16 has no register left on sm_90a, and would spill.
  if (kind == kSkewKL) n.gap = disagree(r, log_t - log_s) ? 1.0f : 0.0f;
  n.sum_q_psi = (float)r.pair.sum_q_psi;
  if (kind == kReverseKL) {  // log(q / p) - D: the gap is in both, and would only round
    n.gap = 0;
    n.sum_q_psi = (float)(-r.pair.cross_s / r.student.sum_exp);
  }
  n.soft = soft_weight == 0 ? 0.0f : (float)(soft_weight / temperature);
  return n;
}

// `at_1`: the student's normaliser at temperature 1. `rest`: of a sparse target, 0 without.
KD_DEVICE Coefficients coefficients(const RowState& r, const Logs& logs, Kind kind, double temperature,
                                    const RowWeights& weights, const Normaliser& at_1, double rest,
                                    int64_t vocab) {
  Coefficients c;
  c.normal = normal(r, logs, kind, temperature, weights.soft);
  c.rest = r.student.sum_exp > 0 && weights.soft != 0 ? (float)(weights.soft * rest) : 0.0f;
  const double squared = weights.lse_squared == 0 ? 0 : 2 * at_1.lse() * weights.lse_squared;
  c.hard = pull(weights.label + weights.smooth + squared, weights.label, at_1);
  c.teacher_label =
      pull(weights.teacher_label, weights.teacher_label, {r.teacher.reference, logs.sum_exp_t1_t});
  c.spread = (float)(weights.smooth / (double)vocab);
  c.soft_weight = weights.soft;
  c.live = weights.any_student() || weights.teacher_label != 0;
  return c;
}

}  // namespace kd
