// The numbers of a loss, in the order of kdkernels/backends/spec.py's Spec.to_floats.
#pragma once

namespace kd {

enum Kind {
  kNone,
  kForwardKL,
  kReverseKL,
  kJSD,
  kSkewKL,
  kSkewReverseKL,
  kTotalVariation,
  kAlphaBeta,
  kMixed
};

struct Spec {
  double kind, first, second, temperature, soft_weight, hard_weight, label_smoothing, z_loss;
  double student_scale, student_softcap, teacher_scale, teacher_softcap, teacher_hard_weight;
  double tail, linear;  // of a sparse target; the row loops are told its outcomes instead
};
constexpr int kSpecFloats = sizeof(Spec) / sizeof(double);

}  // namespace kd
