// Second pass over a row, for divergences without a closed form: the divergence and the sum of q_psi.
//
// Leaves q_psi in the scratch, for the gradient.
#pragma once

#include "row.h"

namespace kd {
namespace KD_ISA {

// A row's numbers that turn a pair of logits into x, log p and log q.
struct PairNumbers {
  float reference_s, reference_t;  // subtracted first
  float log_sum_s, log_sum_t;      // subtracted second: the normaliser itself would lose a shift's digits
  float per_temperature;
};

// Adds a block's phi and q_psi to the state. `p` and `q` are the block's exponentials, which times share_t
// and share_s are probabilities; `s` and `t` its logits, where the divergence sees them. q_psi replaces p.
// Not inlined: on its own the loop has enough registers.
template <class Divergence>
__attribute__((noinline)) void add_block(PairState& pair, Divergence divergence, const PairNumbers& numbers,
                                         const float* q, float share_s, float* p, float share_t,
                                         const float* s, const float* t, int end) {
  const PairNumbers c = numbers;
  const float gap = c.log_sum_s - c.log_sum_t;
  Vec phi{}, q_psi{};
  for (int64_t first = 0; first < end; first += kGroup) {
    Vec group_phi{}, group_q_psi{};
    for (int64_t i = first; i < std::min<int64_t>(first + kGroup, end); i += kLanes) {
      __builtin_prefetch(q + i + kAhead);
      __builtin_prefetch(p + i + kAhead);
      const Vec p_i = rounded_product(load(p + i), share_t), q_i = rounded_product(load(q + i), share_s);
      Vec z_s{}, z_t{};
      if constexpr (!Divergence::kFromProbabilities) {
        __builtin_prefetch(s + i + kAhead);
        __builtin_prefetch(t + i + kAhead);
        z_s = load(s + i) - c.reference_s;
        z_t = load(t + i) - c.reference_t;
      }
      const Terms terms =
          divergence(p_i, q_i, (z_t - z_s) * c.per_temperature + gap, z_t * c.per_temperature - c.log_sum_t,
                     z_s * c.per_temperature - c.log_sum_s);
      group_phi += terms.phi;
      group_q_psi += terms.q_psi;
      store(p + i, terms.q_psi);
    }
    phi += group_phi;
    q_psi += group_q_psi;
  }
  pair.value += sum(phi);
  pair.sum_q_psi += sum(q_psi);
}

template <class Divergence, Kind kKind>
void value(Row<kKind>& row, RowState& r) {
  Scratch& scratch = row.scratch;
  const double log_sum_s = std::log(r.student.sum_exp), log_sum_t = std::log(r.teacher.sum_exp);
  const PairNumbers numbers{(float)r.student.reference, (float)r.teacher.reference, (float)log_sum_s,
                            (float)log_sum_t, row.per_temperature.scale};
  const Divergence divergence(row.job.parameters, kKind == kSkewKL && disagree(r, log_sum_t - log_sum_s));
  r.pair.value += 0 * (r.student.sum_exp + r.teacher.sum_exp);  // NaN logits stay NaN, whatever the formula
  References references;
  float share_s = 0, share_t = 0;
  row.each_block([&](int64_t start, int n, int64_t b) {
    const float *s = nullptr, *t = nullptr;
    if constexpr (!Divergence::kFromProbabilities) {
      s = row.student.floats(start, n, scratch.student_block());
      t = row.teacher.floats(start, n, scratch.teacher_block());
    }
    if (b == 0 || references != scratch.references(b)) {
      references = scratch.references(b);
      share_s = (float)std::exp(row.log_share(references.student, r.student));
      share_t = (float)std::exp(row.log_share(references.teacher, r.teacher));
    }
    add_block(r.pair, divergence, numbers, scratch.student_exp() + start, share_s, scratch.second() + start,
              share_t, s, t, padded(n));
  });
  if (r.pair.value != r.pair.value) r.pair.sum_q_psi = r.pair.value;  // NaN in the gradient too
}

}  // namespace KD_ISA
}  // namespace kd
