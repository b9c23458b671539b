// The online state of a row: sums over the logits seen so far, relative to a running maximum of each side.
//
// docs/design.md derives it; kdkernels/backends/row_state.py has the same columns in the same order.
// Contract: states of different columns of a row merge into the state of all of them: raise both to the
// higher reference of each side, then add the sums.
// Numerics: sums inside a block are fp32. Across blocks, and in everything that is once per row, they are
// fp64: it costs nothing there and keeps the digits of the normaliser. References, tops and the label's logit
// are logits as they came, before the temperature. Divided by it they would be rounded, and the distances to
// them would lose their digits.
#pragma once

#include <math.h>

#include <cstdint>

#include "spec.h"

namespace kd {

// The reference of no logits. It is finite, so that reference - reference is 0.
constexpr double kNoReference = -3.4028234663852886e38;

// A row's normaliser, log sum exp(z), in two parts: of logits far from 0 it has no digits left for the sum,
// and what counts is its distance to other logits.
struct Normaliser {
  double reference = 0, log_sum_exp = 0;

  KD_HD double lse() const { return reference + log_sum_exp; }
  KD_HD double above(double z) const { return (reference - z) + log_sum_exp; }
};

// A row's softmax at T: q = exp((z - reference) / T - log_sum_exp), and the mean of (z - reference) / T under
// q. The entropy is log_sum_exp - mean_shift, and its derivative q (mean_shift - (z - reference) / T) / T:
// the normaliser cancels out of it.
struct Softmax {
  double reference = 0, log_sum_exp = 0, mean_shift = 0;
};

// z: this side's logits. T: the row's temperature.
struct SideState {
  double reference = kNoReference;  // the running maximum m
  double sum_exp = 0;               // sum e, e = exp((z - m) / T)
  double sum_exp_shift = 0;         // sum e (z - m) / T, for the entropy; only where the spec sums_shifts()
  double sum_exp_t1 = 0;            // sum exp(z - m); a copy of sum_exp where T is always 1
  double sum_logits = 0;            // sum z, for label smoothing
  double label_logit = 0;           // z of the label
  double top_logit = kNoReference;  // the maximum and its first column; only with statistics
  double top_index = 0;

  KD_HD Normaliser at_1() const { return {reference, log(sum_exp_t1)}; }
  KD_HD Softmax softmax() const { return {reference, log(sum_exp), sum_exp_shift / sum_exp}; }
  KD_HD double entropy() const { return log(sum_exp) - sum_exp_shift / sum_exp; }
};

// x = ((t - m_t) - (s - m_s)) / T, s and t being the student's and the teacher's logits.
struct PairState {
  double cross_s = 0, cross_t = 0;  // sum e_s x, sum e_t x
  double value = 0, sum_q_psi = 0;  // second pass: the divergence, and the sum of q_psi (divergence.h)
};

struct RowState {
  SideState student, teacher;
  PairState pair;
};
constexpr int kStateColumns = sizeof(RowState) / sizeof(double);
static_assert(kStateColumns == 20, "row_state.py has twenty columns");

// mass * shift, where no mass has no shift.
KD_HD double moment(double mass, double shift) { return mass > 0 ? mass * shift : 0.0; }

// What decays to nothing is 0, an infinity too: there p (or q) is 0, and 0 * inf counts as 0.
KD_HD double decayed(double sum, double decay) { return decay == 0 ? 0.0 : sum * decay; }

// How far a reference rises, over the temperature, and what the sums relative to it decay by.
struct Rise {
  double distance, decay;
};

// Moves a side's sums to a reference that is not lower.
KD_HD Rise raise(SideState& side, double reference, double temperature) {
  const double up = reference - side.reference;
  if (up == 0) return {0, 1};
  const double distance = up / temperature, decay = exp(-distance);
  side.sum_exp_shift = decayed(side.sum_exp_shift - moment(side.sum_exp, distance), decay);
  side.sum_exp *= decay;
  side.sum_exp_t1 *= exp(-up);
  side.reference = reference;
  return {distance, decay};
}

// Moves both sides, and the sums that know both.
KD_HD void raise(RowState& r, double student, double teacher, double temperature) {
  const double sum_exp_s = r.student.sum_exp, sum_exp_t = r.teacher.sum_exp;
  const Rise s = raise(r.student, student, temperature), t = raise(r.teacher, teacher, temperature);
  const double shift = s.distance - t.distance;
  r.pair.cross_s = decayed(r.pair.cross_s + moment(sum_exp_s, shift), s.decay);
  r.pair.cross_t = decayed(r.pair.cross_t + moment(sum_exp_t, shift), t.decay);
}

// 0, but NaN for a row without a softmax: a NaN logit makes a sum NaN, nothing but -inf leaves it 0.
KD_HD double nan_without_softmax(double sum_exp_s, double sum_exp_t) { return 0 / (sum_exp_s * sum_exp_t); }

KD_HD double divergence_value(const RowState& r, Kind kind) {
  const double gap = log(r.teacher.sum_exp) - log(r.student.sum_exp);
  if (kind == kForwardKL) return r.pair.cross_t / r.teacher.sum_exp - gap;
  if (kind == kReverseKL) return gap - r.pair.cross_s / r.student.sum_exp;
  return r.pair.value;
}

// ForwardKL is made of cross_t. SkewKL asks by it whether p and q `disagree`.
KD_HD constexpr bool needs_cross_t(Kind kind) { return kind == kForwardKL || kind == kSkewKL; }

// Whether KL(p || q) is above 1/2, given the mean of x under p, and log sum_exp of the teacher less the
// student's. Below, p and q have at least half their mass in common.
template <class T>
KD_HD bool disagree(T mean_x, T gap) {
  return !(mean_x - gap <= (T)0.5);
}
KD_HD bool disagree(const RowState& r, double gap) {
  return disagree(r.pair.cross_t / r.teacher.sum_exp, gap);
}

// The student's outputs at temperature 1: `at_1` is its normaliser there.
KD_HD void hard_results(const SideState& student, const Normaliser& at_1, const Spec& spec, int64_t vocab,
                        double* results) {
  if (spec.asks(kLabel)) results[kLabel] = at_1.above(student.label_logit);
  if (spec.asks(kSmooth)) results[kSmooth] = at_1.above(student.sum_logits / (double)vocab);
  if (spec.asks(kLseSquared)) results[kLseSquared] = at_1.lse() * at_1.lse();
}

// What is asked of a finished row. `teacher`: whether there is one.
KD_HD void finish(const RowState& r, const Spec& spec, bool teacher, int64_t vocab, double* results) {
  if (teacher && spec.asks(kSoft)) results[kSoft] = divergence_value(r, spec.kind);
  if (spec.asks_hard()) hard_results(r.student, r.student.at_1(), spec, vocab, results);
  if (spec.asks(kTeacherLabel)) results[kTeacherLabel] = r.teacher.at_1().above(r.teacher.label_logit);
  if (spec.asks(kEntropy)) results[kEntropy] = r.student.entropy();
  if (!spec.stats) return;
  results[kStudentEntropy] = r.student.entropy();
  if (!teacher) return;
  results[kTeacherEntropy] = r.teacher.entropy();
  results[kAgreement] = r.student.top_index == r.teacher.top_index;
}

}  // namespace kd
