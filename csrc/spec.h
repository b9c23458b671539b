// What is static of a loss, and the names of what a row gives. Never a number that changes while training.
//
// kdkernels/backends/spec.py has the same fields in the same order, and sends the struct's bytes.
#pragma once

#include <cstdint>

#include "compiled_for.h"

namespace kd {

enum Kind : int64_t {
  kNone,
  kForwardKL,
  kReverseKL,
  kJSD,
  kSkewKL,
  kSkewReverseKL,
  kTotalVariation,
  kAlphaBeta,
  kMixed,
  kSkewReverseKLDetached,
  kOverlap
};

// What becomes of the vocabulary that a sparse target does not store (kdkernels/backends/outcomes.py).
enum Tail : int64_t { kDense, kBucket, kConditional, kRenormalize, kTruncate };

// What the loss is linear in. The divergence and the student's entropy are at T, the others at temperature 1.
enum Output { kSoft, kLabel, kSmooth, kLseSquared, kEntropy, kTeacherLabel, kOutputs };
// A finished row's results are its outputs, then these statistics.
enum Result { kStudentEntropy = kOutputs, kTeacherEntropy, kAgreement, kResults };

struct Spec {
  Kind kind = kNone;
  Tail tail = kDense;
  int64_t asked = 0;     // bit mask: 1 << Output for each that is computed
  int64_t tempered = 0;  // 0: every temperature is exactly 1
  int64_t stats = 0;     // whether entropies and agreement are asked for
  double student_scale = 1, student_softcap = 0, teacher_scale = 1, teacher_softcap = 0;

  KD_HD bool asks(Output o) const { return asked >> o & 1; }
  // Whether the state holds sum_exp_shift, which entropies are made of.
  KD_HD bool sums_shifts() const { return stats || asks(kEntropy); }
  // Whether one of the student's outputs at temperature 1 is asked for.
  KD_HD bool asks_hard() const { return (asked & (1 << kLabel | 1 << kSmooth | 1 << kLseSquared)) != 0; }
};
static_assert(sizeof(Spec) == 9 * 8, "spec.py packs nine numbers of eight bytes");

// A sparse target is two problems: the pass over the student's logits, and the divergence between outcomes.
// With these tails the temperature belongs to the first, with the others to the second.
KD_HD bool tempers_student(Tail tail) { return tail == kRenormalize || tail == kTruncate; }

KD_HD Spec student_spec_of(Spec spec) {
  spec.kind = kNone;
  if (!tempers_student(spec.tail)) spec.tempered = 0;
  return spec;
}

KD_HD Spec outcome_spec_of(const Spec& spec) {
  Spec outcomes;
  outcomes.kind = spec.kind;
  outcomes.asked = spec.asked & 1 << kSoft;
  outcomes.tempered = tempers_student(spec.tail) ? 0 : spec.tempered;
  outcomes.stats = spec.stats;
  return outcomes;
}

}  // namespace kd
