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

// The second pass over a row, a block at a time, from the first pass's finished state.
template <class Divergence, Kind kKind>
class ValuePass {
 public:
  ValuePass(Row<kKind>& row, RowState& state)
      : row_(row),
        r_(state),
        log_sum_s_(std::log(state.student.sum_exp)),
        log_sum_t_(std::log(state.teacher.sum_exp)),
        numbers_{(float)state.student.reference, (float)state.teacher.reference, (float)log_sum_s_,
                 (float)log_sum_t_, row.per_temperature.scale},
        divergence_(row.job.parameters, kKind == kSkewKL && disagree(state, log_sum_t_ - log_sum_s_)) {
    // NaN stays NaN, whatever the formula.
    r_.pair.value += nan_without_softmax(r_.student.sum_exp, r_.teacher.sum_exp);
  }

  void block(int64_t start, int n, int64_t b) {
    const float *s = nullptr, *t = nullptr;
    if constexpr (!Divergence::kFromProbabilities) {
      s = row_.student.floats(start, n, row_.scratch.student_block());
      t = row_.teacher.floats(start, n, row_.scratch.teacher_block());
    }
    if (b == 0 || references_ != row_.scratch.references(b)) {
      references_ = row_.scratch.references(b);
      share_s_ = (float)std::exp(row_.log_share(references_.student, r_.student));
      share_t_ = (float)std::exp(row_.log_share(references_.teacher, r_.teacher));
    }
    add_block(r_.pair, divergence_, numbers_, row_.student_exp(start), share_s_, row_.second(start), share_t_,
              s, t, padded(n));
  }

  void end() {
    if (r_.pair.value != r_.pair.value) r_.pair.sum_q_psi = r_.pair.value;  // NaN in the gradient too
  }

 private:
  Row<kKind>& row_;
  RowState& r_;
  const double log_sum_s_, log_sum_t_;
  const PairNumbers numbers_;
  const Divergence divergence_;
  References references_;
  float share_s_ = 0, share_t_ = 0;
};

template <class Divergence, Kind kKind>
void value(Row<kKind>& row, RowState& r) {
  ValuePass<Divergence, kKind> pass(row, r);
  row.walk(pass);
  pass.end();
}

}  // namespace KD_ISA
}  // namespace kd
